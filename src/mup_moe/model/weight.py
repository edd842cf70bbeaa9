"""A tensor of the model and its role."""

import torch
from torch import Tensor, nn

from mup_moe.parametrization import ROLES

# Roles that are looked up or multiplied elementwise rather than by a matrix product.
_NO_MATMUL = ("embedding", "norm")


class Weight(nn.Module):
    """One parameter, stacked over R replicas, with what a parametrization needs to know of it.

    Args:
        role: one of `ROLES`; anything else raises ValueError.
        shape: the tensor's own shape, without the replica axis.
        fan_in: entries that one output sums over.
        fan_out: outputs that one input feeds.
        replicas: R, the leading axis of `value`.
        into_residual: the output is added to the residual stream.
        active: the share of the tensor that one token is multiplied by (top_k / experts).
        fill: a constant to start from in place of random numbers (norms).

    """

    def __init__(
        self,
        role: str,
        shape: tuple[int, ...],
        *,
        fan_in: int,
        fan_out: int,
        replicas: int,
        into_residual: bool = False,
        active: float = 1.0,
        fill: float | None = None,
    ) -> None:
        super().__init__()
        if role not in ROLES:
            raise ValueError(f"role {role!r} is unknown: use one of {', '.join(ROLES)}, or add it to the table")
        self.role = role
        self.fan_in = fan_in
        self.fan_out = fan_out
        self.into_residual = into_residual
        self.active = active
        self.fill = fill
        self.value = nn.Parameter(torch.empty(replicas, *shape))
        # One per replica, or None where all are 1 and the product is left out.
        self.register_buffer("multiplier_R", None, persistent=False)
        self.multiplier_R: Tensor | None

    def scale(self, x_RXY: Tensor) -> Tensor:
        """`x_RXY` times the multiplier of each replica."""
        return x_RXY if self.multiplier_R is None else (x_RXY * self.multiplier_R[:, None, None]).to(x_RXY.dtype)

    @property
    def size(self) -> int:
        """Entries of one replica."""
        return self.value.numel() // self.value.shape[0]

    @property
    def is_matmul(self) -> bool:
        """Whether a token's FLOPs include a product with this tensor."""
        return self.role not in _NO_MATMUL


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """All weights of a model by name. Raises ValueError for a parameter outside of a `Weight`."""
    weights = {name: module for name, module in model.named_modules() if isinstance(module, Weight)}
    for name, _ in model.named_parameters():
        if name.removesuffix(".value") not in weights:
            raise ValueError(f"parameter {name!r} has no role: create it as a Weight")
    return weights
