"""Building blocks of the model: the parameters of R replicas, norms, the feed-forward layer, and taps.

Axes: R replicas, N tokens, D width, F feed-forward size, I inputs and O outputs of a product,
M rows in G runs.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mup_moe.config.roles import QUANTITIES
from mup_moe.config.settings import ModelSettings
from mup_moe.model.inventory import ModelShape, TensorSpec, feed_forward_tensors, norm_tensors
from mup_moe.model.products import grouped_product, product

# Maps rows to rows.
Product: TypeAlias = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Product] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
# Each uses torch's default eps.
_NORMS: dict[str, Callable[..., Tensor]] = {"layernorm": F.layer_norm, "rmsnorm": F.rms_norm}


# A tap's name -> the quantity observed there, in the order of the columns in figures.
TAPS = ("embedded", "attention_output", "feed_forward_output", "feed_forward.logits", "logits")
OBSERVED = dict(zip(TAPS, QUANTITIES, strict=True))


class Tap(nn.Identity):
    """A named place where a forward hook can see a tensor; it does nothing without a hook."""

    @property
    def watched(self) -> bool:
        """Whether a hook is registered."""
        return bool(self._forward_hooks)


class Weight(nn.Module):
    """One tensor of the inventory, stacked over R replicas: `value` [R, *spec.shape], uninitialized."""

    def __init__(self, spec: TensorSpec, replicas: int) -> None:
        super().__init__()
        self.spec = spec
        self.value = nn.Parameter(torch.empty(replicas, *spec.shape))
        # One per replica, or None if all are 1 and the multiplication is skipped.
        self.register_buffer("multiplier_R", None, persistent=False)
        self.multiplier_R: Tensor | None

    def scaled(self) -> Tensor:
        """Returns `value` times the multiplier of each replica."""
        each = (-1, *([1] * (self.value.dim() - 1)))
        return self.value if self.multiplier_R is None else self.value * self.multiplier_R.view(each)

    def scale(self, x_RXY: Tensor) -> Tensor:
        """Returns `x_RXY` times the multiplier of each replica."""
        return x_RXY if self.multiplier_R is None else (x_RXY * self.multiplier_R[:, None, None]).to(x_RXY.dtype)

    def times(self, x_RNI: Tensor) -> Tensor:
        """Returns each row times the matrix and the multiplier, [R, N, O]."""
        return self.scale(product(x_RNI, self.value))

    def times_each(self, x_MI: Tensor, ends_G: Tensor | None) -> Tensor:
        """Returns each row times the matrix of its run, [M, O], for a stack of one matrix per run of rows.

        There are G = R * E runs. ends_G: where the runs end; None if all have the same length.
        """
        value_GIO, replicas = self.value.flatten(0, 1), len(self.value)
        if ends_G is None:
            y_GCO = torch.bmm(x_MI.view(len(value_GIO), -1, x_MI.shape[1]), value_GIO)
            return self.scale(y_GCO.view(replicas, -1, y_GCO.shape[-1])).flatten(0, 1)
        y_MO = grouped_product(x_MI, value_GIO, ends_G)
        if self.multiplier_R is None:
            return y_MO
        rows_R = ends_G.view(replicas, -1)[:, -1].diff(prepend=ends_G.new_zeros(1))
        return y_MO * self.multiplier_R.repeat_interleave(rows_R, output_size=len(y_MO))[:, None].to(y_MO.dtype)


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Returns all weights of a model by name. Raises ValueError for a parameter outside a `Weight`."""
    weights = {name: module for name, module in model.named_modules() if isinstance(module, Weight)}
    for name, _ in model.named_parameters():
        if name.removesuffix(".value") not in weights:
            raise ValueError(f"parameter {name!r} has no role: create it as a Weight")
    return weights


class Norm(nn.Module):
    """LayerNorm with gain and bias, or RMSNorm with gain (Zhang and Sennrich, 2019), one per replica."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        tensors = norm_tensors(shape, settings)
        self.normalize = _NORMS[settings.norm]
        self.gain = Weight(tensors["gain"], replicas)
        self.bias = Weight(tensors["bias"], replicas) if "bias" in tensors else None

    def forward(self, x_RND: Tensor) -> Tensor:
        """Returns normalized tokens [R, N, D]."""
        y_RND = self.gain.scale(self.normalize(x_RND, x_RND.shape[-1:]) * self.gain.value[:, None])
        return y_RND if self.bias is None else y_RND + self.bias.scale(self.bias.value[:, None])


def feed_forward(x: Tensor, up: Product, gate: Product | None, down: Product, activation: Product) -> Tensor:
    """Returns down(activation(up(x))); with a gate, down(activation(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""
    if gate is None:
        return down(activation(up(x)))
    return down(activation(gate(x)) * up(x))


class FeedForward(nn.Module):
    """The dense counterpart of the MoE layer."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        tensors = feed_forward_tensors(shape, settings)
        self.activation = ACTIVATIONS[settings.activation]
        self.up = Weight(tensors["up"], replicas)
        self.gate = Weight(tensors["gate"], replicas) if "gate" in tensors else None
        self.down = Weight(tensors["down"], replicas)

    def forward(self, x_RND: Tensor) -> tuple[Tensor, None]:
        """Maps tokens [R, N, D] to tokens [R, N, D]; returns None for the routing, since there is no router."""
        gate = None if self.gate is None else self.gate.times
        return feed_forward(x_RND, self.up.times, gate, self.down.times, self.activation), None
