"""The decoder-only transformer of the paper, MoE or dense, for R replicas at once.

Axes: R replicas, B sequences, S positions, N = B * S tokens, D width, F feed-forward size,
V vocabulary. All that the model knows of parametrizations is a role per tensor; the meaning of a role
is applied from outside (`model.scaling`, `model.initialize`).
"""

from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.attention import Attention
from mup_moe.model.inventory import ModelShape, tensors_of
from mup_moe.model.layers import FeedForward, Norm, Tap, Weight
from mup_moe.model.metrics import Pass, measure
from mup_moe.model.moe import MoE, Routed
from mup_moe.model.operators import cross_entropy, linear_cross_entropy, lookup, prefers_static
from mup_moe.model.products import product
from mup_moe.model.replicas import ReplicaModel


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        self.attention_norm = Norm(shape, settings, replicas)
        self.attention = Attention(shape, settings, replicas)
        self.feed_forward_norm = Norm(shape, settings, replicas)
        self.feed_forward = (FeedForward if shape.dense else MoE)(shape, settings, replicas)
        self.attention_output, self.feed_forward_output = Tap(), Tap()

    def forward(self, x_RND: Tensor, sequence: int) -> tuple[Tensor, Routed | None]:
        """Maps tokens [R, N, D] to tokens [R, N, D], and returns what the router did, if there is one."""
        x_RND = x_RND + self.attention_output(self.attention(self.attention_norm(x_RND), sequence))
        y_RND, routed = self.feed_forward(self.feed_forward_norm(x_RND))
        return x_RND + self.feed_forward_output(y_RND), routed


class Transformer(ReplicaModel):
    """R replicas of the paper's model with one shape."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int = 1) -> None:
        super().__init__(shape, settings, replicas)
        tensors = tensors_of(shape, settings)
        self.token = Weight(tensors["token"], replicas)
        self.position = Weight(tensors["position"], replicas) if "position" in tensors else None
        self.blocks = nn.ModuleList(Block(shape, settings, replicas) for _ in range(settings.blocks))
        self.final_norm = Norm(shape, settings, replicas) if settings.final_norm else nn.Identity()
        self.unembedding = Weight(tensors["unembedding"], replicas)
        self.embedded, self.logits = Tap(), Tap()

    def features(self, tokens_RBS: Tensor) -> tuple[Tensor, list[Routed]]:
        """Maps token ids [R, B, S] to the unembedding's input [R, N, D], and returns what each block's router did."""
        sequence = tokens_RBS.shape[-1]
        x_RND = self.token.scale(lookup(self.token.value, tokens_RBS.flatten(1)))
        if self.position is not None:
            position_RSD = self.position.scale(self.position.value[:, :sequence])
            x_RND = (x_RND.unflatten(1, (-1, sequence)) + position_RSD[:, None]).flatten(1, 2)
        x_RND = self.embedded(x_RND * self.settings.embedding_multiplier)
        routed = []
        for block in self.blocks:
            x_RND, of_block = block(x_RND, sequence)
            if of_block is not None:
                routed.append(of_block)
        return self.unembedding.scale(self.final_norm(x_RND) * self.settings.logit_multiplier), routed

    def predict(self, tokens_RBS: Tensor) -> Tensor:
        """Maps token ids [R, B, S] to logits [R, N, V]."""
        return self._logits(self.features(tokens_RBS)[0])

    def _logits(self, x_RND: Tensor) -> Tensor:
        logits_RNV: Tensor = self.logits(product(x_RND, self.unembedding.value))
        return logits_RNV

    def forward(self, tokens_RBS: Tensor, targets_RBS: Tensor) -> dict[str, Tensor]:
        """Returns the losses, as `ReplicaModel.forward` does."""
        x_RND, routed = self.features(tokens_RBS)
        targets_RN = targets_RBS.flatten(1)
        if self.logits.watched or prefers_static(x_RND.device):
            losses_RN = cross_entropy(self._logits(x_RND), targets_RN)
            return measure(Pass(losses_RN.mean(1), losses_RN, routed))
        return measure(Pass(*linear_cross_entropy(x_RND, self.unembedding.value, targets_RN), routed))
