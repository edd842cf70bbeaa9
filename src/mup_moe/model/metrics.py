"""What is recorded of every training step: each metric is a function of a forward pass.

Axes: R replicas, N tokens, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mup_moe.model.moe import Routed


@dataclass(frozen=True)
class Pass:
    """A forward pass over a batch."""

    loss_R: Tensor  # the mean cross-entropy, in nats
    cross_entropy_RN: Tensor  # each token's, to be observed: it may have no gradient
    routed: Sequence[Routed]  # what the routers did, block by block; nothing if dense


Metric: TypeAlias = Callable[[Pass], Tensor]


def _of_routers(of_one: Callable[[Routed], Tensor]) -> Metric:
    """The mean over blocks; 0 if dense."""

    def metric(forward: Pass) -> Tensor:
        if not forward.routed:
            return torch.zeros_like(forward.loss_R)
        return torch.stack([of_one(routed) for routed in forward.routed]).mean(0)

    return metric


def balance(routed: Routed) -> Tensor:
    """The load-balancing loss [R], 1 at perfect balance (Switch Transformer, eq. 4).

    Of sigmoid gates as DeepSeek-V3 (eqs. 17 to 20) has it, over the whole batch. Divided by top-k, so that
    granularity does not change its scale.
    """
    load_RE = routed.routing.load_RE
    return load_RE.shape[-1] * (load_RE * routed.choice.share_RNE.mean(1)).sum(-1)


def router_z(routed: Routed) -> Tensor:
    """The router z-loss [R], the mean squared log-sum-exp of the logits (ST-MoE, eq. 5)."""
    return routed.choice.logits_RNE.logsumexp(-1).square().mean(-1)


def dropped(routed: Routed) -> Tensor:
    """The share of assignments that found their expert full, [R]."""
    return 1 - routed.routing.kept_RKN.flatten(1).float().mean(-1)


def max_load(routed: Routed) -> Tensor:
    """The busiest expert's share of assignments, times the number of experts, [R]."""
    load_RE = routed.routing.load_RE
    return load_RE.shape[-1] * load_RE.amax(-1)


# What is minimised beside the cross-entropy, each times the setting of its name.
AUXILIARY_LOSSES: Mapping[str, Metric] = {
    "balance_loss": _of_routers(balance),
    "z_loss": _of_routers(router_z),
}
# What is observed only.
OBSERVED: Mapping[str, Metric] = {
    "dropped_fraction": _of_routers(dropped),
    "max_expert_load": _of_routers(max_load),
}
# The columns of history.csv; the optimizer knows the gradient's norm.
METRICS = ("train_loss", *AUXILIARY_LOSSES, "gradient_norm", *OBSERVED)


def measure(forward: Pass) -> dict[str, Tensor]:
    """All metrics of a forward pass by name, each [R]."""
    metrics = {name: metric(forward) for of_kind in (AUXILIARY_LOSSES, OBSERVED) for name, metric in of_kind.items()}
    return {"train_loss": forward.loss_R} | metrics
