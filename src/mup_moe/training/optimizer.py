"""AdamW with a learning rate per replica and per tensor, and the schedule that they share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mup_moe.config.settings import TrainingSettings
from mup_moe.model.scaling import Factors
from mup_moe.model.transformer import Transformer
from mup_moe.model.weight import weights_of


def schedule(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step (from 0) over its peak: linear warm-up, then a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    span = max(settings.steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / span))
    return settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine


@dataclass(frozen=True)
class _Group:
    """Slices of one replica that share their rates, and Adam's state of each."""

    peak: float  # the learning rate at its highest
    weight_decay: float
    tensors: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


class ReplicaAdamW:
    """torch's fused AdamW on the slices that belong to each replica.

    Args:
        model: R replicas, their tensors stacked on the leading axis.
        factors: per replica, each tensor's factors by name.
        learning_rates: per replica, the global peak learning rate.

    Decoupled weight decay as in torch: a tensor shrinks by (its learning rate * its weight decay) a
    step, so that the table's weight_decay factor alone decides whether decay follows the width.

    """

    # The functional form: torch's optimizer classes import its compiler, a second for every cell.

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
        # A slice shares the replica's storage.
        self._slices = [
            {name: weight.value.detach()[replica] for name, weight in self._weights.items()}
            for replica in range(model.replicas)
        ]
        self._groups = [
            self._group(replica, [n for n, f in row.items() if (f.adam_lr, f.weight_decay) == pair], rate, *pair)
            for replica, (row, rate) in enumerate(zip(factors, learning_rates, strict=True))
            for pair in sorted({(f.adam_lr, f.weight_decay) for f in row.values()})
        ]
        self._peaks_G = torch.tensor([group.peak for group in self._groups], device=model.device)
        grouped = sum(tensor.numel() for group in self._groups for tensor in group.tensors)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert grouped == total, f"the groups hold {grouped} of the model's {total} entries"

    def _group(self, replica: int, names: Sequence[str], rate: float, lr: float, decay: float) -> _Group:
        tensors = [self._slices[replica][name] for name in names]
        return _Group(
            peak=rate * lr,
            weight_decay=self._settings.weight_decay * decay,
            tensors=tensors,
            exp_avgs=[self._moments["exp_avg"][name][replica] for name in names],
            exp_avg_sqs=[self._moments["exp_avg_sq"][name][replica] for name in names],
            steps=[torch.zeros((), device=tensor.device) for tensor in tensors],
        )

    @torch.no_grad()
    def step(self, factor: Tensor) -> Tensor:
        """Clips each replica's gradient and takes a step; the gradient norms [R] before clipping.

        factor: what `schedule` says of the step, one element on the model's device, so that a
        captured CUDA graph follows it. Reads and then clears the gradients of the model's parameters.
        """
        for replica, slices in enumerate(self._slices):
            for name, weight in self._weights.items():
                assert weight.value.grad is not None, f"{name} has no gradient"
                slices[name].grad = weight.value.grad[replica]
        norms = []
        for slices in self._slices:
            norm = torch.nn.utils.get_total_norm([t.grad for t in slices.values() if t.grad is not None])
            norms.append(norm)
            if self._settings.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(slices.values(), self._settings.clip_norm, norm)
        rates_G = self._peaks_G * factor
        beta1, beta2 = self._settings.adam_betas
        for group, rate in zip(self._groups, rates_G.unbind(), strict=True):
            adamw(
                group.tensors,
                [tensor.grad for tensor in group.tensors if tensor.grad is not None],
                group.exp_avgs,
                group.exp_avg_sqs,
                [],
                group.steps,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=rate,
                weight_decay=group.weight_decay,
                eps=self._settings.adam_eps,
                maximize=False,
            )
        for holder in (*(w.value for w in self._weights.values()), *(t for s in self._slices for t in s.values())):
            holder.grad = None
        return torch.stack(norms)

    def state(self) -> dict[str, Tensor]:
        """Adam's moments, stacked over replicas as the parameters are: "moment/tensor" -> [R, ...]."""
        return {f"{moment}/{name}": t for moment, of_name in self._moments.items() for name, t in of_name.items()}

    def set_steps(self, steps: int) -> None:
        """Says how many steps the moments in `state` have seen."""
        for group in self._groups:
            for taken in group.steps:
                taken.fill_(steps)
