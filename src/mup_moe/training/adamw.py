"""AdamW in two forms, one for CPUs and one for GPUs.

Weight decay is decoupled as in torch: each step shrinks a tensor by (its learning rate * its weight decay), so
that only the table's weight_decay factor determines whether decay scales with width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mup_moe.config.settings import TrainingSettings
from mup_moe.model import operators
from mup_moe.model.replicas import ReplicaModel
from mup_moe.training.optimizer import CLIP_EPS, ReplicaOptimizer, StackedOptimizer


@dataclass(frozen=True)
class _Group:
    """Tensors of one replica with the same rates. peak: their peak learning rate. update: torch's update of them."""

    peak: float
    names: Sequence[str]
    update: Callable[..., None]


class SlicedAdamW(ReplicaOptimizer):
    """torch's fused AdamW on each replica's slices, which makes one pass over memory."""

    def _prepare(self, model: ReplicaModel) -> None:
        self._groups = [self._groups_of(replica) for replica in range(model.replicas)]
        self._peaks_G = torch.tensor([group.peak for of_one in self._groups for group in of_one], device=model.device)

    def _groups_of(self, replica: int) -> list[_Group]:
        names_of: dict[tuple[float, float], list[str]] = {}
        for name in self._weights:
            names_of.setdefault((self._peaks[name][replica], self._decays[name][replica]), []).append(name)
        return [self._group(replica, names, *rates) for rates, names in sorted(names_of.items())]

    def _group(self, replica: int, names: Sequence[str], peak: float, weight_decay: float) -> _Group:
        settings = self._settings
        taken = [torch.zeros((), device=self._weights[name].value.device) for name in names]
        self._taken += taken
        # Use the functional form: torch's optimizer classes import its compiler, which takes a second per cell.
        update = partial(
            adamw,
            # Each slice shares storage with the stacked tensor.
            [self._weights[name].value.detach()[replica] for name in names],
            exp_avgs=[self._states["exp_avg"][name][replica] for name in names],
            exp_avg_sqs=[self._states["exp_avg_sq"][name][replica] for name in names],
            max_exp_avg_sqs=[],
            state_steps=taken,
            fused=True,
            amsgrad=False,
            beta1=settings.adam_betas[0],
            beta2=settings.adam_betas[1],
            weight_decay=weight_decay,
            eps=settings.adam_eps,
            maximize=False,
        )
        return _Group(peak, names, update)

    def _update(self, gradients: dict[str, Tensor], factor_1: Tensor) -> Tensor:
        clip, rates = self._settings.clip_norm, iter((self._peaks_G * factor_1).unbind())
        norms = []
        for replica, groups in enumerate(self._groups):
            slices = {name: gradient[replica] for name, gradient in gradients.items()}
            norms.append(torch.nn.utils.get_total_norm(slices.values()))
            if clip is not None:
                torch._foreach_mul_(list(slices.values()), (clip / (norms[-1] + CLIP_EPS)).clamp(max=1.0))
            for group in groups:
                group.update(grads=[slices[name] for name in group.names], lr=next(rates))
        return torch.stack(norms)


class StackedAdamW(StackedOptimizer):
    """AdamW written out for the stacked tensors."""

    @staticmethod
    def update(
        tensor: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        rate: Tensor,
        decay: Tensor,
        taken: Tensor,
        settings: TrainingSettings,
    ) -> None:
        """See `StackedOptimizer.update`."""
        beta1, beta2 = settings.adam_betas
        # 1 - beta^t, accurate even when beta^t is close to 1.
        correction1, correction2 = (-torch.expm1(taken * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (exp_avg_sq / correction2).sqrt() + settings.adam_eps
        tensor.mul_(1 - rate * decay).sub_(rate / correction1 * exp_avg / size)


def adamw_for(model: ReplicaModel, *others: Any) -> ReplicaOptimizer:
    """Returns AdamW in the form that suits the model's device."""
    form = StackedAdamW if operators.prefers_dense(model.device) else SlicedAdamW
    return form(model, *others)
