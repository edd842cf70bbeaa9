"""AdamW with a learning rate per replica and per tensor, and the schedule that they share.

Axes: R replicas, T tensors.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mup_moe.config.settings import TrainingSettings
from mup_moe.model import hardware
from mup_moe.model.scaling import Factors
from mup_moe.model.transformer import Transformer
from mup_moe.model.weight import weights_of

# As torch.nn.utils.clip_grad_norm_ has it.
_CLIP_EPS = 1e-6

# Gives the compiled form of a function, or None where it is to be called as it is.
Compile: TypeAlias = Callable[[Callable[..., Tensor]], Callable[..., Tensor] | None]


def schedule(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step (from 0) over its peak: linear warm-up, then a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    span = max(settings.steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / span))
    return settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine


class ReplicaAdamW(ABC):
    """AdamW whose learning rate and weight decay differ between replicas and tensors.

    Args:
        model: R replicas, their tensors stacked on the leading axis.
        factors: per replica, each tensor's factors by name.
        learning_rates: per replica, the global peak learning rate.
        settings: what is the same for all.

    Decoupled weight decay as in torch: a tensor shrinks by (its learning rate * its weight decay) a
    step, so that the table's weight_decay factor alone decides whether decay follows the width.

    """

    def __init__(
        self,
        model: Transformer,
        factors: Sequence[Mapping[str, Factors]],
        learning_rates: Sequence[float],
        settings: TrainingSettings,
    ) -> None:
        self._settings = settings
        self._weights = weights_of(model)
        self._moments = {
            moment: {name: torch.zeros_like(weight.value.detach()) for name, weight in self._weights.items()}
            for moment in ("exp_avg", "exp_avg_sq")
        }
        # Of each tensor by name, for each replica: the learning rate at its highest, and the weight decay.
        self._peaks = {
            name: [rate * row[name].adam_lr for rate, row in zip(learning_rates, factors, strict=True)]
            for name in self._weights
        }
        self._decays = {
            name: [settings.weight_decay * row[name].weight_decay for row in factors] for name in self._weights
        }
        self._prepare(model)

    @abstractmethod
    def _prepare(self, model: Transformer) -> None:
        """Sets up what a step needs beside the moments."""

    @abstractmethod
    def step(self, factor_1: Tensor) -> Tensor:
        """Clips each replica's gradient and takes a step; the gradient norms [R] before clipping.

        factor_1: what `schedule` says of the step, one element on the model's device, so that a
        captured CUDA graph follows it. Reads and then clears the gradients of the model's parameters.
        """

    @abstractmethod
    def use(self, compile: Compile) -> None:
        """Compiles what a step gains by."""

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Says how many steps the moments in `state` have seen."""

    def state(self) -> dict[str, Tensor]:
        """Adam's moments, stacked over replicas as the parameters are: "moment/tensor" -> [R, ...]."""
        return {f"{moment}/{name}": t for moment, of_name in self._moments.items() for name, t in of_name.items()}

    def _gradients(self) -> dict[str, Tensor]:
        """The gradient of every tensor [R, ...] by name."""
        gradients = {name: weight.value.grad for name, weight in self._weights.items()}
        without = [name for name, gradient in gradients.items() if gradient is None]
        assert not without, f"{', '.join(without)} have no gradient"
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def clear_gradients(self) -> None:
        """Drops the gradients of the model's parameters."""
        for weight in self._weights.values():
            weight.value.grad = None


@dataclass(frozen=True)
class _Group:
    """Slices of one replica that share their rates, and Adam's state of each."""

    peak: float  # the learning rate at its highest
    weight_decay: float
    names: Sequence[str]
    tensors: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


class SlicedAdamW(ReplicaAdamW):
    """torch's fused AdamW on the slices that belong to each replica: one pass over memory."""

    # The functional form: torch's optimizer classes import its compiler, a second for every cell.

    def _prepare(self, model: Transformer) -> None:
        self._groups = [self._groups_of(replica) for replica in range(model.replicas)]
        peaks = [group.peak for groups in self._groups for group in groups]
        self._peaks_G = torch.tensor(peaks, device=model.device)
        grouped = sum(tensor.numel() for groups in self._groups for group in groups for tensor in group.tensors)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert grouped == total, f"the groups hold {grouped} of the model's {total} entries"

    def _groups_of(self, replica: int) -> list[_Group]:
        names_of: dict[tuple[float, float], list[str]] = {}
        for name in self._weights:
            names_of.setdefault((self._peaks[name][replica], self._decays[name][replica]), []).append(name)
        return [self._group(replica, names, *rates) for rates, names in sorted(names_of.items())]

    def _group(self, replica: int, names: Sequence[str], peak: float, weight_decay: float) -> _Group:
        # A slice shares the replica's storage.
        tensors = [self._weights[name].value.detach()[replica] for name in names]
        return _Group(
            peak=peak,
            weight_decay=weight_decay,
            names=names,
            tensors=tensors,
            exp_avgs=[self._moments["exp_avg"][name][replica] for name in names],
            exp_avg_sqs=[self._moments["exp_avg_sq"][name][replica] for name in names],
            steps=[torch.zeros((), device=tensor.device) for tensor in tensors],
        )

    @torch.no_grad()
    def step(self, factor_1: Tensor) -> Tensor:
        """As of `ReplicaAdamW`."""
        settings, gradients = self._settings, self._gradients()
        rates = iter((self._peaks_G * factor_1).unbind())
        norms = []
        for replica, groups in enumerate(self._groups):
            slices = {name: gradient[replica] for name, gradient in gradients.items()}
            norm = torch.nn.utils.get_total_norm(slices.values())
            norms.append(norm)
            if settings.clip_norm is not None:
                scale = (settings.clip_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
                torch._foreach_mul_(list(slices.values()), scale)
            for group in groups:
                adamw(
                    group.tensors,
                    [slices[name] for name in group.names],
                    group.exp_avgs,
                    group.exp_avg_sqs,
                    [],
                    group.steps,
                    fused=True,
                    amsgrad=False,
                    beta1=settings.adam_betas[0],
                    beta2=settings.adam_betas[1],
                    lr=next(rates),
                    weight_decay=group.weight_decay,
                    eps=settings.adam_eps,
                    maximize=False,
                )
        self.clear_gradients()
        return torch.stack(norms)

    def use(self, compile: Compile) -> None:
        """As of `ReplicaAdamW`: torch's own kernel needs no compiler."""

    def set_steps(self, steps: int) -> None:
        """As of `ReplicaAdamW`."""
        for group in (group for groups in self._groups for group in groups):
            for taken in group.steps:
                taken.fill_(steps)


class StackedAdamW(ReplicaAdamW):
    """AdamW written out on the stacked tensors, to be compiled: as many launches for any number of replicas."""

    def _prepare(self, model: Transformer) -> None:
        self._update = _clip_and_update
        self._tensors = [weight.value.detach() for weight in self._weights.values()]
        self._peaks_TR, self._decays_TR = (
            torch.tensor(list(of_name.values()), device=model.device) for of_name in (self._peaks, self._decays)
        )
        self._taken = torch.zeros((), device=model.device)

    def use(self, compile: Compile) -> None:
        """As of `ReplicaAdamW`."""
        self._update = compile(_clip_and_update) or _clip_and_update

    @torch.no_grad()
    def step(self, factor_1: Tensor) -> Tensor:
        """As of `ReplicaAdamW`."""
        norms_R = self._update(
            self._tensors,
            list(self._gradients().values()),
            list(self._moments["exp_avg"].values()),
            list(self._moments["exp_avg_sq"].values()),
            self._peaks_TR * factor_1,
            self._decays_TR,
            self._taken,
            self._settings,
        )
        self.clear_gradients()
        return norms_R

    def set_steps(self, steps: int) -> None:
        """As of `ReplicaAdamW`."""
        self._taken.fill_(steps)


def _clip_and_update(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rates_TR: Tensor,
    decays_TR: Tensor,
    taken: Tensor,
    settings: TrainingSettings,
) -> Tensor:
    """Clips gradients [R, ...] and takes a step of AdamW in place; the gradient norms [R] before clipping."""

    def over(x_R: Tensor, like: Tensor) -> Tensor:
        return x_R.view(-1, *([1] * (like.dim() - 1)))

    beta1, beta2 = settings.adam_betas
    norms_R = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    taken += 1
    # 1 - beta^t, exact while beta^t is near 1.
    correction1, correction2 = (-torch.expm1(taken * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
    for row, (tensor, gradient, exp_avg, exp_avg_sq) in enumerate(
        zip(tensors, gradients, exp_avgs, exp_avg_sqs, strict=True)
    ):
        if settings.clip_norm is not None:
            gradient = gradient * over((settings.clip_norm / (norms_R + _CLIP_EPS)).clamp(max=1.0), gradient)
        rate_R = rates_TR[row]
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (exp_avg_sq / correction2).sqrt() + settings.adam_eps
        tensor.mul_(over(1 - rate_R * decays_TR[row], tensor)).sub_(over(rate_R / correction1, tensor) * exp_avg / size)
    return norms_R


def replica_adamw(
    model: Transformer,
    factors: Sequence[Mapping[str, Factors]],
    learning_rates: Sequence[float],
    settings: TrainingSettings,
) -> ReplicaAdamW:
    """The form of `ReplicaAdamW` that suits the model's device."""
    form = StackedAdamW if hardware.prefers_dense(model.device) else SlicedAdamW
    return form(model, factors, learning_rates, settings)
