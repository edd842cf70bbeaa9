"""What the training loop needs of a model: R replicas of one shape, and their losses.

Axes: R replicas, B sequences, S positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.inventory import ModelShape
from mup_moe.model.metrics import AUXILIARY_LOSSES


class ReplicaModel(nn.Module, ABC):
    """R replicas of one shape. Tensors are uninitialised until `model.initialize`."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        self.shape = shape
        self.settings = settings
        self.replicas = replicas

    @property
    def config(self) -> ModelShape:
        """The sizes, where a role table looks for them."""
        return self.shape

    @property
    def device(self) -> torch.device:
        """Where the tensors live, all of them."""
        return next(self.parameters()).device

    @abstractmethod
    def forward(self, tokens_RBS: Tensor, targets_RBS: Tensor) -> dict[str, Tensor]:
        """The losses of predicting `targets_RBS` from `tokens_RBS`, and what is observed besides: [R] each, by name.

        Those of `METRICS` but for the gradient's norm; each replica's own mean over its batch.
        """

    def objective(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What is minimised: summed over replicas, which share no parameter."""
        weights = {name: getattr(self.settings, name) for name in AUXILIARY_LOSSES}
        if self.settings.balance_loss_times_top_k:
            weights["balance_loss"] *= self.shape.active_experts
        auxiliary = [weights[name] * losses[name] for name in AUXILIARY_LOSSES]
        return sum(auxiliary, start=losses["train_loss"]).sum()
