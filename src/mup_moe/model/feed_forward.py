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


class FeedForward(nn.Module):
    """The dense twin of the MoE layer."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        tensors = feed_forward_tensors(shape)
        self.activation = ACTIVATIONS[settings.activation]
        self.up, self.down = Weight(tensors["up"], replicas), Weight(tensors["down"], replicas)

    def forward(self, x_RND: Tensor) -> tuple[Tensor, None]:
        """Tokens [R, N, D] to tokens [R, N, D]; no router, nothing routed."""
        return self.down.times(self.activation(self.up.times(x_RND))), None
