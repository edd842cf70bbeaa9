"""The interface that the training loop expects of a model: R replicas of one shape, and their losses.

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
    """R replicas of one shape. Tensors are uninitialized until `model.initialize`."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        self.shape = shape
        self.settings = settings
        self.replicas = replicas

    @property
    def config(self) -> ModelShape:
        """The shape, under the name at which role tables look for sizes."""
        return self.shape

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return next(self.parameters()).device

    @abstractmethod
    def forward(self, tokens_RBS: Tensor, targets_RBS: Tensor) -> dict[str, Tensor]:
        """Returns the losses of predicting `targets_RBS` from `tokens_RBS` and other metrics by name, each [R].

        These are all of `METRICS` except the gradient norm, each a replica's mean over its batch.
        """

    def objective(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Returns the quantity to minimize: the sum over replicas, which share no parameters."""
        weights = {name: getattr(self.settings, name) for name in AUXILIARY_LOSSES}
        if self.settings.balance_loss_times_top_k:
            weights["balance_loss"] *= self.shape.active_experts
        auxiliary = [weights[name] * losses[name] for name in AUXILIARY_LOSSES]
        return sum(auxiliary, start=losses["train_loss"]).sum()
