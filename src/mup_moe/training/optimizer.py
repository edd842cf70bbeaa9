"""The base of every optimizer: a learning rate and weight decay per replica and tensor, and a schedule.

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

# The same as in torch.nn.utils.clip_grad_norm_.
CLIP_EPS = 1e-6

# Returns a function in compiled form, or None if it should be called as it is.
Compile: TypeAlias = Callable[[Callable[..., Tensor]], Callable[..., Tensor] | None]


def schedule(step: int, settings: TrainingSettings) -> float:
    """Returns the learning rate of a step (from 0) relative to its peak: linear warm-up, then cosine decay."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    span = max(settings.steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / span))
    return settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine


class ReplicaOptimizer(ABC):
    """An optimizer whose learning rate and weight decay differ between replicas and tensors.

    model: R replicas, with tensors stacked on the leading axis. factors: each replica's factors by tensor name.
    learning_rates: each replica's global peak learning rate. settings: what all replicas share.
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
        # By state name and tensor name, stacked like the parameters.
        self._states = {
            state: {name: torch.zeros_like(weight.value.detach()) for name, weight in self._weights.items()}
            for state in OPTIMIZERS[settings.optimizer].state
        }
        # The peak learning rate and weight decay of each replica, by tensor name.
        self._peaks = {
            name: [rate * row[name].lr for rate, row in zip(learning_rates, factors, strict=True)]
            for name in self._weights
        }
        self._decays = {
            name: [settings.weight_decay * row[name].weight_decay for row in factors] for name in self._weights
        }
        # The number of steps in the states, in as many tensors as the update needs.
        self._taken: list[Tensor] = []
        self._prepare(model)

    @abstractmethod
    def _prepare(self, model: ReplicaModel) -> None:
        """Sets up what an update needs besides the states, including `_taken`."""

    @abstractmethod
    def _update(self, gradients: dict[str, Tensor], factor_1: Tensor) -> Tensor:
        """Does the work of `step` for gradients [R, ...] by name, which it may overwrite."""

    @torch.no_grad()
    def step(self, factor_1: Tensor) -> Tensor:
        """Clips each replica's gradient, takes a step, and returns the gradient norms [R] before clipping.

        factor_1: the value of `schedule` for the step, one element on the model's device, so that a captured
        CUDA graph follows it. Reads and then clears the gradients of the model's parameters.
        """
        gradients = {}
        for name, weight in self._weights.items():
            assert weight.value.grad is not None, f"{name} has no gradient"
            gradients[name] = weight.value.grad
        norms_R = self._update(gradients, factor_1)
        self.clear_gradients()
        return norms_R

    def use(self, compile: Compile) -> None:  # noqa: B027 - torch's own kernels gain nothing
        """Compiles the parts of a step that benefit from it."""

    def set_steps(self, steps: int) -> None:
        """Sets the number of steps that the tensors in `state` come from."""
        for taken in self._taken:
            taken.fill_(steps)

    def state(self) -> dict[str, Tensor]:
        """Returns everything that a step changes, stacked like the parameters: "state/tensor" -> [R, ...]."""
        return {f"{state}/{name}": t for state, of_name in self._states.items() for name, t in of_name.items()}

    def clear_gradients(self) -> None:
        """Drops the gradients of the model's parameters."""
        for weight in self._weights.values():
            weight.value.grad = None


class StackedOptimizer(ReplicaOptimizer):
    """An optimizer on the stacked tensors, for compilation: the number of launches is the same for any R."""

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
        """Updates one tensor [R, ...] and its state by one step, in place.

        gradient: already clipped. rate, decay: each replica's learning rate and weight decay, [R, 1, ...].
        taken: the number of steps taken, including this one, as one number on the device.
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
        """See `ReplicaOptimizer.use`."""
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
    """Clips gradients [R, ...], updates each tensor in place, and returns the gradient norms [R] before clipping."""
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
    """Returns the factory of the optimizer that the settings name; it takes the arguments of `ReplicaOptimizer`."""
    return pkgutil.resolve_name(OPTIMIZERS[settings.optimizer].made_by)  # type: ignore[no-any-return]
