"""The feed-forward layer, dense, and the product that it shares with experts.

Axes: R replicas, N tokens, D width, F feed-forward size.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.inventory import feed_forward_tensors
from mup_moe.model.shape import ModelShape
from mup_moe.model.weight import Weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def feed_forward(
    x_RNI: Tensor, up: Weight, gate: Weight | None, down: Weight, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """down(activation(up(x))); with a gate down(activation(gate(x)) * up(x)) (Shazeer 2020, eq. 6).

    Of tokens, or of experts' rows, as the weights are (`Weight.times`).
    """
    if gate is None:
        return down.times(activation(up.times(x_RNI)))
    return down.times(activation(gate.times(x_RNI)) * up.times(x_RNI))


class FeedForward(nn.Module):
    """The dense twin of the MoE layer."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        tensors = feed_forward_tensors(shape, settings)
        self.activation = ACTIVATIONS[settings.activation]
        self.up = Weight(tensors["up"], replicas)
        self.gate = Weight(tensors["gate"], replicas) if "gate" in tensors else None
        self.down = Weight(tensors["down"], replicas)

    def forward(self, x_RND: Tensor) -> tuple[Tensor, None]:
        """Tokens [R, N, D] to tokens [R, N, D]; no router, nothing routed."""
        return feed_forward(x_RND, self.up, self.gate, self.down, self.activation), None
