"""The decoder-only transformer of the paper, MoE or dense, for R replicas at once.

Axes: R replicas, B sequences, S positions, N = B * S tokens, D width, F feed-forward size,
V vocabulary. The model knows nothing of parametrizations but a role per tensor: what a role means
is applied from outside (`model.scaling`, `model.initialize`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.attention import Attention
from mup_moe.model.cross_entropy import cross_entropy
from mup_moe.model.inventory import feed_forward_tensors, norm_tensors, tensors_of
from mup_moe.model.lookup import lookup
from mup_moe.model.moe import ACTIVATIONS, MoE, RouterStatistics
from mup_moe.model.shape import ModelShape
from mup_moe.model.tap import Tap
from mup_moe.model.weight import Weight


class Norm(nn.Module):
    """LayerNorm over D with gain and bias, each replica its own."""

    def __init__(self, width: int, replicas: int) -> None:
        super().__init__()
        tensors = norm_tensors(width)
        self.gain, self.bias = Weight(tensors["gain"], replicas), Weight(tensors["bias"], replicas)

    def forward(self, x_RND: Tensor) -> Tensor:
        """Normalised tokens [R, N, D]."""
        normal_RND = F.layer_norm(x_RND, x_RND.shape[-1:])
        return self.gain.scale(normal_RND * self.gain.value[:, None]) + self.bias.scale(self.bias.value[:, None])


class FeedForward(nn.Module):
    """The dense twin of the MoE layer."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        tensors = feed_forward_tensors(shape)
        self.activation = ACTIVATIONS[settings.activation]
        self.up, self.down = Weight(tensors["up"], replicas), Weight(tensors["down"], replicas)

    def forward(self, x_RND: Tensor) -> tuple[Tensor, None]:
        """Tokens [R, N, D] to tokens [R, N, D]; no router, no statistics."""
        return self.down.times(self.activation(self.up.times(x_RND))), None


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        self.attention_norm = Norm(shape.width, replicas)
        self.attention = Attention(shape, replicas)
        self.feed_forward_norm = Norm(shape.width, replicas)
        self.feed_forward = (FeedForward if shape.dense else MoE)(shape, settings, replicas)
        self.attention_output, self.feed_forward_output = Tap(), Tap()

    def forward(self, x_RND: Tensor, sequence: int) -> tuple[Tensor, RouterStatistics | None]:
        """Tokens [R, N, D] to tokens [R, N, D], and the router's statistics, if there is one."""
        x_RND = x_RND + self.attention_output(self.attention(self.attention_norm(x_RND), sequence))
        y_RND, statistics = self.feed_forward(self.feed_forward_norm(x_RND))
        return x_RND + self.feed_forward_output(y_RND), statistics


@dataclass(frozen=True)
class Losses:
    """The losses and router statistics of a batch, each [R]; means over blocks, 0 if dense."""

    cross_entropy_R: Tensor
    balance_R: Tensor
    z_R: Tensor
    dropped_R: Tensor
    max_load_R: Tensor


class Transformer(nn.Module):
    """R replicas of one shape. Tensors are uninitialised until `model.initialize`."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int = 1) -> None:
        super().__init__()
        self.shape = shape
        self.settings = settings
        self.replicas = replicas
        tensors = tensors_of(shape, settings)
        self.token, self.position = Weight(tensors["token"], replicas), Weight(tensors["position"], replicas)
        self.blocks = nn.ModuleList(Block(shape, settings, replicas) for _ in range(settings.blocks))
        self.final_norm = Norm(shape.width, replicas) if settings.final_norm else nn.Identity()
        self.unembedding = Weight(tensors["unembedding"], replicas)
        self.embedded, self.logits = Tap(), Tap()

    @property
    def device(self) -> torch.device:
        """Where the tensors live, all of them."""
        return self.token.value.device

    def forward(self, tokens_RBS: Tensor) -> tuple[Tensor, list[RouterStatistics]]:
        """Token ids [R, B, S] to logits [R, N, V], and the routers' statistics, block by block."""
        sequence = tokens_RBS.shape[-1]
        position_RSD = self.position.scale(self.position.value[:, :sequence])
        x_RND = self.token.scale(lookup(self.token.value, tokens_RBS.flatten(1)))
        x_RBSD = x_RND.unflatten(1, (-1, sequence)) + position_RSD[:, None]
        x_RND = (x_RBSD * self.settings.embedding_multiplier).flatten(1, 2)
        x_RND = self.embedded(x_RND)
        statistics = []
        for block in self.blocks:
            x_RND, router = block(x_RND, sequence)
            if router is not None:
                statistics.append(router)
        x_RND = self.unembedding.scale(self.final_norm(x_RND) * self.settings.logit_multiplier)
        return self.logits(x_RND @ self.unembedding.value), statistics

    def losses(self, tokens_RBS: Tensor, targets_RBS: Tensor) -> Losses:
        """The losses of predicting `targets_RBS` from `tokens_RBS`; each replica's own batch mean."""
        logits_RNV, statistics = self(tokens_RBS)
        cross_entropy_R = cross_entropy(logits_RNV, targets_RBS.flatten(1)).mean(-1)
        if not statistics:
            zero_R = torch.zeros_like(cross_entropy_R)
            return Losses(cross_entropy_R, zero_R, zero_R, zero_R, zero_R)
        means = (
            torch.stack([getattr(router, name) for router in statistics]).mean(0)
            for name in ("balance_R", "z_R", "dropped_R", "max_load_R")
        )
        return Losses(cross_entropy_R, *means)

    def objective(self, losses: Losses) -> Tensor:
        """What is minimised: summed over replicas, which share no parameter."""
        settings = self.settings
        return (losses.cross_entropy_R + settings.balance_loss * losses.balance_R + settings.z_loss * losses.z_R).sum()
