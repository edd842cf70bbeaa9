"""The metrics recorded at every training step; each one is a function of a forward pass.

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
    cross_entropy_RN: Tensor  # of each token, for observation only: it may have no gradient
    routed: Sequence[Routed]  # what the routers did, block by block; empty if dense


Metric: TypeAlias = Callable[[Pass], Tensor]


def _of_routers(of_one: Callable[[Routed], Tensor]) -> Metric:
    """Returns the metric that averages over blocks; it is 0 for a dense model."""

    def metric(forward: Pass) -> Tensor:
        if not forward.routed:
            return torch.zeros_like(forward.loss_R)
        return torch.stack([of_one(routed) for routed in forward.routed]).mean(0)

    return metric


def balance(routed: Routed) -> Tensor:
    """Returns the load-balancing loss [R], which is 1 at perfect balance (Switch Transformer, eq. 4).

    For sigmoid gates it follows DeepSeek-V3 (eqs. 17 to 20), over the whole batch. It is divided by top-k, so that
    granularity does not change its scale.
    """
    load_RE = routed.routing.load_RE
    return load_RE.shape[-1] * (load_RE * routed.choice.share_RNE.mean(1)).sum(-1)


def router_z(routed: Routed) -> Tensor:
    """Returns the router z-loss [R]: the mean squared log-sum-exp of the logits (ST-MoE, eq. 5)."""
    return routed.choice.logits_RNE.logsumexp(-1).square().mean(-1)


def dropped(routed: Routed) -> Tensor:
    """Returns the share of assignments dropped because their expert was full, [R]."""
    return 1 - routed.routing.kept_RKN.flatten(1).float().mean(-1)


def max_load(routed: Routed) -> Tensor:
    """Returns the busiest expert's share of assignments times the number of experts, [R]."""
    load_RE = routed.routing.load_RE
    return load_RE.shape[-1] * load_RE.amax(-1)


# Minimized in addition to the cross-entropy, each multiplied by the setting of the same name.
AUXILIARY_LOSSES: Mapping[str, Metric] = {
    "balance_loss": _of_routers(balance),
    "z_loss": _of_routers(router_z),
}
# Only observed, not minimized.
OBSERVED: Mapping[str, Metric] = {
    "dropped_fraction": _of_routers(dropped),
    "max_expert_load": _of_routers(max_load),
}
# The columns of history.csv; the optimizer supplies the gradient's norm.
METRICS = ("train_loss", *AUXILIARY_LOSSES, "gradient_norm", *OBSERVED)


def measure(forward: Pass) -> dict[str, Tensor]:
    """Returns all metrics of a forward pass by name, each [R]."""
    metrics = {name: metric(forward) for of_kind in (AUXILIARY_LOSSES, OBSERVED) for name, metric in of_kind.items()}
    return {"train_loss": forward.loss_R} | metrics
