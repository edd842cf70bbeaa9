"""AdamW with a learning rate per replica and per tensor, and the schedule that they share."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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


class ReplicaAdamW:
    """torch's fused AdamW on the slices that belong to each replica.

    Args:
        model: R replicas, their tensors stacked on the leading axis.
        factors: per replica, each tensor's factors by name.
        learning_rates: per replica, the global peak learning rate.

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
        # A slice is a leaf of its own that shares the replica's storage.
        self._slices = [
            {name: weight.value.detach()[replica] for name, weight in self._weights.items()}
            for replica in range(model.replicas)
        ]
        groups: list[dict[str, object]] = []
        for slices, row, rate in zip(self._slices, factors, learning_rates, strict=True):
            for lr, decay in sorted({(f.adam_lr, f.weight_decay) for f in row.values()}):
                members = [slices[name] for name, f in row.items() if (f.adam_lr, f.weight_decay) == (lr, decay)]
                groups.append(
                    {
                        "params": members,
                        "lr": 0.0,
                        "peak": rate * lr,
                        "weight_decay": settings.weight_decay * decay,
                    }
                )
        grouped = sum(t.numel() for group in groups for t in group["params"])  # type: ignore[attr-defined]
        total = sum(parameter.numel() for parameter in model.parameters())
        assert grouped == total, f"the parameter groups hold {grouped} of the model's {total} entries"
        self._adamw = torch.optim.AdamW(groups, betas=settings.adam_betas, eps=settings.adam_eps, fused=True)

    def step(self, step: int) -> Tensor:
        """Clips each replica's gradient and takes step number `step`; the gradient norms [R] before.

        Reads and then clears the gradients of the model's parameters.
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
        factor = schedule(step, self._settings)
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self._adamw.step()
        for weight in self._weights.values():
            weight.value.grad = None
        return torch.stack(norms)

    def state(self) -> dict[str, Tensor]:
        """Adam's moments, stacked over replicas as the parameters are: "moment/tensor" -> [R, ...]."""
        moments = {}
        for name in self._weights:
            for moment in ("exp_avg", "exp_avg_sq"):
                states = [self._adamw.state[slices[name]] for slices in self._slices]
                if all(states):
                    moments[f"{moment}/{name}"] = torch.stack([state[moment] for state in states])
        return moments

    def load_state(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Restores `state` as it was after `steps` steps."""
        for replica, slices in enumerate(self._slices):
            for name, tensor in slices.items():
                self._adamw.state[tensor] = {
                    "step": torch.tensor(float(steps), device=tensor.device),
                    "exp_avg": moments[f"exp_avg/{name}"][replica].to(tensor.device).clone(),
                    "exp_avg_sq": moments[f"exp_avg_sq/{name}"][replica].to(tensor.device).clone(),
                }
