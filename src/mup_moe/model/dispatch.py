"""Tokens to the slots of their experts, and the experts' outputs back: static shapes, no scatter.

An assignment is a (k, token) pair, numbered k * N + token. An expert has C slots, its capacity.

Axes: R replicas, N tokens, D width, E experts, K experts of a token, A = K * N assignments,
M = E * C slots.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mup_moe.config.settings import DROPLESS
from mup_moe.model import operators
from mup_moe.model.inventory import ModelShape
from mup_moe.model.router import Choice


@dataclass(frozen=True)
class Load:
    """How many assignments experts have."""

    kept_RKN: Tensor  # whether the assignment got a slot
    load_RE: Tensor  # each expert's share of the assignments, dropped ones included


@dataclass(frozen=True)
class Routing(Load):
    """Which assignment has which slot."""

    gates_RKN: Tensor  # of each assignment; 0 where it was dropped
    slot_RKN: Tensor  # of each assignment (expert * C + position); any slot if dropped
    assignment_RM: Tensor  # in each slot; any assignment if the slot is empty
    filled_RM: Tensor  # whether the slot holds one


def capacity(tokens: int, shape: ModelShape, factor: float | str) -> int:
    """Slots per expert: factor times its expected assignments, rounded up; all tokens if dropless."""
    if factor == DROPLESS:
        return tokens
    # The small subtrahend undoes rounding: 1.1 * 100 tokens on 10 experts is 11 slots, not 12.
    return min(tokens, max(1, math.ceil(float(factor) * tokens * shape.active_experts / shape.total_experts - 1e-9)))


def assign_slots(choice: Choice, capacity: int) -> Routing:
    """Gives each expert's `capacity` slots to first choices before second ones, and to earlier tokens before later."""
    replicas, tokens, experts = choice.logits_RNE.shape
    active, device = choice.expert_RNK.shape[-1], choice.logits_RNE.device
    assignments = active * tokens
    expert_RA = choice.expert_RNK.transpose(1, 2).reshape(replicas, assignments)
    queue = _queue_by_count if operators.prefers_dense(device) else _queue_by_sort
    position_RA, assignment_REC, counts_RE = queue(expert_RA, experts, capacity)
    kept_RA = position_RA < capacity
    kept_RKN = kept_RA.view(replicas, active, tokens)
    slot_RA = (expert_RA * capacity + position_RA).where(kept_RA, 0)
    filled_REC = torch.arange(capacity, device=device) < counts_RE[:, :, None]
    return Routing(
        gates_RKN=choice.gates_RNK.transpose(1, 2) * kept_RKN,
        slot_RKN=slot_RA.view(replicas, active, tokens),
        kept_RKN=kept_RKN,
        assignment_RM=assignment_REC.reshape(replicas, -1),
        filled_RM=filled_REC.reshape(replicas, -1),
        load_RE=counts_RE / assignments,
    )


# In two forms that give the same result: one for a CPU, which sorts fast, and one without sort and
# scatter, which a GPU runs in a few fused launches.


def _queue_by_sort(expert_RA: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """How assignments queue for their experts, given the expert of each.

    Returns the position of each assignment in its expert's queue [R, A], the assignment at each of the
    first `capacity` positions of each queue [R, E, C] (any one beyond the queue's end), and the queues'
    lengths [R, E].
    """
    replicas, assignments = expert_RA.shape
    device = expert_RA.device
    # A stable sort by expert puts assignments in order of precedence within each expert.
    sorted_RA, order_RA = expert_RA.sort(dim=-1, stable=True)
    bounds_RE1 = torch.searchsorted(
        sorted_RA, torch.arange(experts + 1, device=device).expand(replicas, -1).contiguous()
    )
    starts_RE, counts_RE = bounds_RE1[:, :-1], bounds_RE1.diff(dim=-1)
    position_sorted_RA = torch.arange(assignments, device=device) - starts_RE.gather(1, sorted_RA)
    position_RA = torch.empty_like(order_RA).scatter_(1, order_RA, position_sorted_RA)
    index_REC = (starts_RE[:, :, None] + torch.arange(capacity, device=device)).clamp(max=assignments - 1)
    return position_RA, order_RA.gather(1, index_REC.flatten(1)).view_as(index_REC), counts_RE


def _queue_by_count(expert_RA: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_queue_by_sort`."""
    replicas, assignments = expert_RA.shape
    number_E1 = torch.arange(experts, device=expert_RA.device)[:, None]
    # How many assignments of each expert there are up to each assignment.
    count_REA = (expert_RA[:, None] == number_E1).to(torch.int32).cumsum(-1, dtype=torch.int32)
    position_RA = count_REA.gather(1, expert_RA[:, None])[:, 0].long() - 1
    wanted_C = torch.arange(1, capacity + 1, dtype=torch.int32, device=expert_RA.device)
    wanted_REC = wanted_C.expand(replicas, experts, -1).contiguous()
    assignment_REC = torch.searchsorted(count_REA, wanted_REC).clamp(max=assignments - 1)
    return position_RA, assignment_REC, count_REA[..., -1].long()


class _GatherRows(torch.autograd.Function):
    """y[j] = x[index[j]], for an index whose transpose is known.

    Row i of x is read by the outputs `inverse[:, i]` where `keep[:, i]` holds, so that the gradient
    is a gather too. Autograd's scatter-add is as fast on a CPU, but not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x_RID: Tensor, index_RJ: Tensor, inverse_RKI: Tensor, keep_RKI: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_RKI, keep_RKI)
        return operators.rows(x_RID, index_RJ)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inverse_RKI, keep_RKI = ctx.saved_tensors
        (dy_RJD,) = gradients
        replicas, copies, rows = inverse_RKI.shape
        dx_RKID = operators.rows(dy_RJD, inverse_RKI.view(replicas, -1)).view(replicas, copies, rows, -1)
        dx_RKID = dx_RKID * keep_RKI[..., None]
        return (dx_RKID[:, 0] if copies == 1 else dx_RKID.sum(1)), None, None, None


def dispatch(x_RND: Tensor, routing: Routing) -> Tensor:
    """The rows of `x_RND` in their slots [R, M, D]. An empty slot holds a row that nothing reads."""
    token_RM = routing.assignment_RM % x_RND.shape[1]
    y: Tensor = _GatherRows.apply(x_RND, token_RM, routing.slot_RKN, routing.kept_RKN)  # type: ignore[no-untyped-call]
    return y


def gather_outputs(y_RMD: Tensor, routing: Routing) -> Tensor:
    """The expert's output of each assignment, [R, K, N, D]; of a dropped one some other output."""
    replicas, active, tokens = routing.slot_RKN.shape
    z_RAD: Tensor = _GatherRows.apply(  # type: ignore[no-untyped-call]
        y_RMD, routing.slot_RKN.view(replicas, -1), routing.assignment_RM[:, None], routing.filled_RM[:, None]
    )
    return z_RAD.view(replicas, active, tokens, -1)


def combine(z_RKND: Tensor, gates_RKN: Tensor) -> Tensor:
    """The gated sum of each token's experts, [R, N, D]; 0 for a token that was dropped."""
    # Gates are float32, and so is the product, even under autocast.
    gated_RKND = z_RKND * gates_RKN[..., None]
    return gated_RKND[:, 0] if gates_RKN.shape[1] == 1 else gated_RKND.sum(1)
