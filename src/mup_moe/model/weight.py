"""A parameter of R replicas, and what a parametrization knows of it."""

import torch
from torch import Tensor, nn

from mup_moe.model.inventory import TensorSpec


class Weight(nn.Module):
    """One tensor of the inventory, stacked over R replicas: `value` [R, *spec.shape], uninitialised."""

    def __init__(self, spec: TensorSpec, replicas: int) -> None:
        super().__init__()
        self.spec = spec
        self.value = nn.Parameter(torch.empty(replicas, *spec.shape))
        # One per replica, or None where all are 1 and the product is left out.
        self.register_buffer("multiplier_R", None, persistent=False)
        self.multiplier_R: Tensor | None

    def scale(self, x_RXY: Tensor) -> Tensor:
        """`x_RXY` times the multiplier of each replica."""
        return x_RXY if self.multiplier_R is None else (x_RXY * self.multiplier_R[:, None, None]).to(x_RXY.dtype)

    def times(self, x_RNI: Tensor) -> Tensor:
        """Each row times the matrix and the multiplier, [R, N, O].

        Of a stack of E matrices, each is for one of E runs of rows, all of one length.
        """
        if self.value.dim() == 3:
            return self.scale(x_RNI @ self.value)
        replicas, experts, fan_in, fan_out = self.value.shape
        # Replicas and experts are one batch of matrix products: (R E) C I @ (R E) I O.
        product = torch.bmm(x_RNI.view(replicas * experts, -1, fan_in), self.value.flatten(0, 1))
        return self.scale(product.view(replicas, -1, fan_out))


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """All weights of a model by name. Raises ValueError for a parameter outside of a `Weight`."""
    weights = {name: module for name, module in model.named_modules() if isinstance(module, Weight)}
    for name, _ in model.named_parameters():
        if name.removesuffix(".value") not in weights:
            raise ValueError(f"parameter {name!r} has no role: create it as a Weight")
    return weights
