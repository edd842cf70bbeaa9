"""What every optimizer has: a learning rate and weight decay per replica and tensor, and a schedule.

Axes: R replicas, T tensors.
"""

import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mup_moe.config.optimizers import OPTIMIZERS
from mup_moe.config.settings import TrainingSettings
from mup_moe.model.layers import weights_of
from mup_moe.model.replicas import ReplicaModel
from mup_moe.model.scaling import Factors

# As torch.nn.utils.clip_grad_norm_ has it.
CLIP_EPS = 1e-6

# Gives the compiled form of a function, or None where it is to be called as it is.
Compile: TypeAlias = Callable[[Callable[..., Tensor]], Callable[..., Tensor] | None]


def schedule(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step (from 0) over its peak: linear warm-up, then a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    span = max(settings.steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / span))
    return settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine


class ReplicaOptimizer(ABC):
    """An optimizer whose learning rate and weight decay differ between replicas and tensors.

    model: R replicas, their tensors stacked on the leading axis. factors: per replica, each tensor's factors by
    name. learning_rates: per replica, the global peak learning rate. settings: what is the same for all.
    """

    def __init__(
        self,
        model: ReplicaModel,
        factors: Sequence[Mapping[str, Factors]],
        learning_rates: Sequence[float],
        settings: TrainingSettings,
    ) -> None:
        self._settings = settings
        self._weights = weights_of(model)
        # By the name of the state, then of the tensor, stacked as the parameters are.
        self._states = {
            state: {name: torch.zeros_like(weight.value.detach()) for name, weight in self._weights.items()}
            for state in OPTIMIZERS[settings.optimizer].state
        }
        # Of each tensor by name, for each replica: the learning rate at its highest, and the weight decay.
        self._peaks = {
            name: [rate * row[name].lr for rate, row in zip(learning_rates, factors, strict=True)]
            for name in self._weights
        }
        self._decays = {
            name: [settings.weight_decay * row[name].weight_decay for row in factors] for name in self._weights
        }
        # How many steps the states have seen, in as many tensors as the update wants.
        self._taken: list[Tensor] = []
        self._prepare(model)

    @abstractmethod
    def _prepare(self, model: ReplicaModel) -> None:
        """Sets up what an update needs beside the states, `_taken` too."""

    @abstractmethod
    def _update(self, gradients: dict[str, Tensor], factor_1: Tensor) -> Tensor:
        """What `step` says, for gradients [R, ...] by name, which it may overwrite."""

    @torch.no_grad()
    def step(self, factor_1: Tensor) -> Tensor:
        """Clips each replica's gradient and takes a step; the gradient norms [R] before clipping.

        factor_1: what `schedule` says of the step, one element on the model's device, so that a
        captured CUDA graph follows it. Reads and then clears the gradients of the model's parameters.
        """
        gradients = {}
        for name, weight in self._weights.items():
            assert weight.value.grad is not None, f"{name} has no gradient"
            gradients[name] = weight.value.grad
        norms_R = self._update(gradients, factor_1)
        self.clear_gradients()
        return norms_R

    def use(self, compile: Compile) -> None:  # noqa: B027 - torch's own kernels gain nothing
        """Compiles what a step gains by."""

    def set_steps(self, steps: int) -> None:
        """Says how many steps the tensors in `state` have seen."""
        for taken in self._taken:
            taken.fill_(steps)

    def state(self) -> dict[str, Tensor]:
        """All that a step changes, stacked over replicas as the parameters are: "state/tensor" -> [R, ...]."""
        return {f"{state}/{name}": t for state, of_name in self._states.items() for name, t in of_name.items()}

    def clear_gradients(self) -> None:
        """Drops the gradients of the model's parameters."""
        for weight in self._weights.values():
            weight.value.grad = None


class StackedOptimizer(ReplicaOptimizer):
    """An optimizer written out on the stacked tensors, to be compiled: as many launches for any number of replicas."""

    @staticmethod
    @abstractmethod
    def update(
        tensor: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        rate: Tensor,
        decay: Tensor,
        taken: Tensor,
        settings: TrainingSettings,
    ) -> None:
        """Takes one tensor [R, ...] and its state a step further, in place.

        gradient: clipped. rate, decay: the learning rate and weight decay of each replica, [R, 1, ...].
        taken: the steps taken, this one included; one number on the device.
        """

    def _prepare(self, model: ReplicaModel) -> None:
        self._clip_and_update: Callable[..., Tensor] = _clip_and_update
        self._tensors = [weight.value.detach() for weight in self._weights.values()]
        self._states_T = [{state: of_name[name] for state, of_name in self._states.items()} for name in self._weights]
        self._peaks_TR, self._decays_TR = (
            torch.tensor(list(of_name.values()), device=model.device) for of_name in (self._peaks, self._decays)
        )
        self._taken = [torch.zeros((), device=model.device)]

    def use(self, compile: Compile) -> None:
        """As of `ReplicaOptimizer`."""
        self._clip_and_update = compile(_clip_and_update) or _clip_and_update

    def _update(self, gradients: dict[str, Tensor], factor_1: Tensor) -> Tensor:
        return self._clip_and_update(
            self.update,
            self._tensors,
            list(gradients.values()),
            self._states_T,
            self._peaks_TR * factor_1,
            self._decays_TR,
            *self._taken,
            self._settings,
        )


def _clip_and_update(
    update: Callable[..., None],
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    rates_TR: Tensor,
    decays_TR: Tensor,
    taken: Tensor,
    settings: TrainingSettings,
) -> Tensor:
    """Clips gradients [R, ...] and updates each tensor in place; the gradient norms [R] before clipping."""
    norms_R = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    taken += 1
    for tensor, gradient, state, rate_R, decay_R in zip(
        tensors, gradients, states, rates_TR.unbind(), decays_TR.unbind(), strict=True
    ):
        each = (-1, *([1] * (tensor.dim() - 1)))
        if settings.clip_norm is not None:
            gradient = gradient * (settings.clip_norm / (norms_R + CLIP_EPS)).clamp(max=1.0).view(each)
        update(tensor, gradient, state, rate_R.view(each), decay_R.view(each), taken, settings)
    return norms_R


def optimizer_of(settings: TrainingSettings) -> Callable[..., ReplicaOptimizer]:
    """What makes the optimizer that the settings name; takes what `ReplicaOptimizer` does."""
    return pkgutil.resolve_name(OPTIMIZERS[settings.optimizer].made_by)  # type: ignore[no-any-return]
