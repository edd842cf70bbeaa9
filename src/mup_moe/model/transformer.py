"""The decoder-only transformer of the paper, MoE or dense, for R replicas at once.

Axes: R replicas, B sequences, S positions, N = B * S tokens, D width, F feed-forward size,
V vocabulary. The model knows nothing of parametrizations but a role per
tensor: what a role means is applied from outside (`model.scaling`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.attention import Attention
from mup_moe.model.cross_entropy import cross_entropy
from mup_moe.model.lookup import lookup
from mup_moe.model.moe import ACTIVATIONS, MoE, RouterStatistics
from mup_moe.model.shape import ModelShape
from mup_moe.model.tap import Tap
from mup_moe.model.weight import Weight, weights_of


class Norm(nn.Module):
    """LayerNorm over D with gain and bias, each replica its own."""

    def __init__(self, width: int, replicas: int) -> None:
        super().__init__()
        self.gain = Weight("norm", (width,), fan_in=1, fan_out=1, replicas=replicas, fill=1.0)
        self.bias = Weight("norm", (width,), fan_in=1, fan_out=1, replicas=replicas, fill=0.0)

    def forward(self, x_RND: Tensor) -> Tensor:
        """Normalised tokens [R, N, D]."""
        normal_RND = F.layer_norm(x_RND, x_RND.shape[-1:])
        return self.gain.scale(normal_RND * self.gain.value[:, None]) + self.bias.scale(self.bias.value[:, None])


class FeedForward(nn.Module):
    """The dense twin of the MoE layer."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        width, size = shape.width, shape.expert_size
        self.activation = ACTIVATIONS[settings.activation]
        self.up = Weight("feed_forward", (width, size), fan_in=width, fan_out=size, replicas=replicas)
        self.down = Weight(
            "feed_forward", (size, width), fan_in=size, fan_out=width, replicas=replicas, into_residual=True
        )

    def forward(self, x_RND: Tensor) -> tuple[Tensor, None]:
        """Tokens [R, N, D] to tokens [R, N, D]; no router, no statistics."""
        hidden_RNF = self.activation(self.up.scale(x_RND @ self.up.value))
        return self.down.scale(hidden_RNF @ self.down.value), None


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
    """R replicas of one shape. Tensors are uninitialised until `model.scaling.initialize`."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int = 1) -> None:
        super().__init__()
        self.shape = shape
        self.settings = settings
        self.replicas = replicas
        width, vocabulary = shape.width, shape.vocabulary
        # A lookup sums over one row: its fan_in is 1.
        self.token = Weight("embedding", (vocabulary, width), fan_in=1, fan_out=width, replicas=replicas)
        self.position = Weight("embedding", (settings.sequence, width), fan_in=1, fan_out=width, replicas=replicas)
        self.blocks = nn.ModuleList(Block(shape, settings, replicas) for _ in range(settings.blocks))
        self.final_norm = Norm(width, replicas) if settings.final_norm else nn.Identity()
        self.unembedding = Weight(
            "unembedding", (width, vocabulary), fan_in=width, fan_out=vocabulary, replicas=replicas
        )
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


@dataclass(frozen=True)
class ModelSize:
    """What one replica costs.

    parameters: all of them; active_parameters: those that one token meets.
    flops_per_token: training FLOPs, 6 per active matrix entry and 12 * blocks * width * sequence for
        attention (PaLM, appendix B; the causal half is not discounted).
    """

    parameters: int
    active_parameters: int
    flops_per_token: int


def model_size(shape: ModelShape, settings: ModelSettings) -> ModelSize:
    """The size of a model of this shape, counted on an instance without storage."""
    with torch.device("meta"):
        weights = weights_of(Transformer(shape, settings)).values()
    matmul = sum(weight.size * weight.active for weight in weights if weight.is_matmul)
    return ModelSize(
        parameters=sum(weight.size for weight in weights),
        active_parameters=round(sum(weight.size * weight.active for weight in weights)),
        flops_per_token=round(6 * matmul + 12 * settings.blocks * shape.width * settings.sequence),
    )
