"""AdamW, in the two forms that suit a CPU and a GPU.

Decoupled weight decay as in torch: a tensor shrinks by (its learning rate * its weight decay) a step,
so that the table's weight_decay factor alone decides whether decay follows the width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mup_moe.config.settings import TrainingSettings
from mup_moe.model import hardware
from mup_moe.model.transformer import Transformer
from mup_moe.training.optimizer import CLIP_EPS, Compile, ReplicaOptimizer, StackedOptimizer


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


class SlicedAdamW(ReplicaOptimizer):
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
            exp_avgs=[self._states["exp_avg"][name][replica] for name in names],
            exp_avg_sqs=[self._states["exp_avg_sq"][name][replica] for name in names],
            steps=[torch.zeros((), device=tensor.device) for tensor in tensors],
        )

    @torch.no_grad()
    def step(self, factor_1: Tensor) -> Tensor:
        """As of `ReplicaOptimizer`."""
        settings, gradients = self._settings, self._gradients()
        rates = iter((self._peaks_G * factor_1).unbind())
        norms = []
        for replica, groups in enumerate(self._groups):
            slices = {name: gradient[replica] for name, gradient in gradients.items()}
            norm = torch.nn.utils.get_total_norm(slices.values())
            norms.append(norm)
            if settings.clip_norm is not None:
                scale = (settings.clip_norm / (norm + CLIP_EPS)).clamp(max=1.0)
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
        """As of `ReplicaOptimizer`: torch's own kernel needs no compiler."""

    def set_steps(self, steps: int) -> None:
        """As of `ReplicaOptimizer`."""
        for group in (group for groups in self._groups for group in groups):
            for taken in group.steps:
                taken.fill_(steps)


class StackedAdamW(StackedOptimizer):
    """AdamW written out on the stacked tensors."""

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
        """As of `StackedOptimizer`."""
        beta1, beta2 = settings.adam_betas
        # 1 - beta^t, exact while beta^t is near 1.
        correction1, correction2 = (-torch.expm1(taken * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (exp_avg_sq / correction2).sqrt() + settings.adam_eps
        tensor.mul_(1 - rate * decay).sub_(rate / correction1 * exp_avg / size)


def adamw_for(model: Transformer, *others: Any) -> ReplicaOptimizer:
    """The form of AdamW that suits the model's device."""
    form = StackedAdamW if hardware.prefers_dense(model.device) else SlicedAdamW
    return form(model, *others)
