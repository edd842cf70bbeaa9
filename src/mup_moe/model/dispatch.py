"""Moves tokens to the rows of their experts, and the experts' outputs back, without scattering tokens.

An assignment is a (k, token) pair with the number k * N + token, plus r * A in replica r. An expert has up to C rows,
its capacity. The rows of all replicas and experts form one list. It holds C rows per expert, filled or not, so that
every shape is static; where that is faster, it holds only the filled rows.

Axes: R replicas, N tokens, D width, E experts, K experts of a token, A = K * N assignments, M rows, G = R * E.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mup_moe.config.settings import DROPLESS
from mup_moe.model import operators
from mup_moe.model.inventory import ModelShape
from mup_moe.model.router import Choice


@dataclass(frozen=True)
class Load:
    """How the assignments are distributed over the experts."""

    kept_RKN: Tensor  # whether the assignment got a row
    load_RE: Tensor  # each expert's share of the assignments, including dropped ones


@dataclass(frozen=True)
class Routing(Load):
    """Maps assignments to rows and back."""

    gates_RKN: Tensor  # the gate of each assignment; 0 if it was dropped
    row_RKN: Tensor  # the row of each assignment; an arbitrary row of its replica if it was dropped
    assignment_M: Tensor  # the assignment in each row; an arbitrary one if the row is empty
    filled_M: Tensor | None  # whether the row holds an assignment; None if all rows do
    ends_G: Tensor | None  # where each expert's rows end; None if every expert has C rows


def capacity(tokens: int, shape: ModelShape, factor: float | str) -> int:
    """Returns the most rows per expert: factor times its expected assignments, rounded up; all tokens if dropless."""
    if factor == DROPLESS:
        return tokens
    # Subtracting 1e-9 undoes rounding: 1.1 * 100 tokens on 10 experts is 11 rows, not 12.
    return min(tokens, max(1, math.ceil(float(factor) * tokens * shape.active_experts / shape.total_experts - 1e-9)))


def assign_rows(choice: Choice, capacity: int, ragged: bool = False) -> Routing:
    """Fills each expert's `capacity` rows with first choices before second ones, and earlier tokens before later ones.

    ragged: leave out rows that would be empty.
    """
    replicas, tokens, experts = choice.logits_RNE.shape
    active = choice.expert_RNK.shape[-1]
    expert_RA = choice.expert_RNK.transpose(1, 2).reshape(replicas, active * tokens)
    rows = (_filled_rows if ragged else _equal_rows)(expert_RA, experts, capacity)
    kept_RKN = rows.kept_RA.view(replicas, active, tokens)
    return Routing(
        gates_RKN=choice.gates_RNK.transpose(1, 2) * kept_RKN,
        # A row of the same replica, so that non-finite values never reach another replica.
        row_RKN=rows.row_RA.where(rows.kept_RA, rows.first_R1).view_as(kept_RKN),
        kept_RKN=kept_RKN,
        assignment_M=rows.assignment_M,
        filled_M=rows.filled_M,
        ends_G=rows.ends_G,
        load_RE=rows.counts_RE / (active * tokens),
    )


@dataclass(frozen=True)
class _Rows:
    """The list of rows; tensors have the same meaning as in `Routing`."""

    kept_RA: Tensor
    row_RA: Tensor  # for a dropped assignment, the row that it would have had
    first_R1: Tensor  # the first row of each replica
    assignment_M: Tensor
    filled_M: Tensor | None
    ends_G: Tensor | None
    counts_RE: Tensor  # the number of assignments of each expert


def _filled_rows(expert_RA: Tensor, experts: int, capacity: int) -> _Rows:
    queue = _sorted(expert_RA, experts)
    kept_RA = queue.position_RA < capacity
    rows_RE = queue.counts_RE.clamp(max=capacity)
    ends_G = rows_RE.flatten().cumsum(0)
    starts_RE = ends_G.view_as(rows_RE) - rows_RE
    return _Rows(
        kept_RA=kept_RA,
        row_RA=starts_RE.gather(1, expert_RA) + queue.position_RA,
        first_R1=starts_RE[:, :1],
        assignment_M=_over_replicas(queue.order_RA, expert_RA)[kept_RA.gather(1, queue.order_RA)],
        filled_M=None,
        ends_G=ends_G,
        counts_RE=queue.counts_RE,
    )


def _equal_rows(expert_RA: Tensor, experts: int, capacity: int) -> _Rows:
    device = expert_RA.device
    form = _queue_by_count if operators.prefers_dense(device) else _queue_by_sort
    position_RA, assignment_REC, counts_RE = form(expert_RA, experts, capacity)
    first_R1 = experts * capacity * torch.arange(len(expert_RA), device=device)[:, None]
    return _Rows(
        kept_RA=position_RA < capacity,
        row_RA=first_R1 + expert_RA * capacity + position_RA,
        first_R1=first_R1,
        assignment_M=_over_replicas(assignment_REC.flatten(1), expert_RA).flatten(),
        filled_M=(torch.arange(capacity, device=device) < counts_RE[:, :, None]).flatten(),
        ends_G=None,
        counts_RE=counts_RE,
    )


def _over_replicas(assignment_RX: Tensor, expert_RA: Tensor) -> Tensor:
    """Converts assignment numbers within a replica to numbers over all replicas."""
    replicas, assignments = expert_RA.shape
    return assignment_RX + assignments * torch.arange(replicas, device=expert_RA.device)[:, None]


@dataclass(frozen=True)
class _Sorted:
    """Assignments sorted by expert, and by precedence within an expert."""

    order_RA: Tensor  # the assignment at each place of the sorted list
    position_RA: Tensor  # the position of each assignment in its expert's queue
    starts_RE: Tensor  # the place at which each queue starts
    counts_RE: Tensor  # the length of each queue


def _sorted(expert_RA: Tensor, experts: int) -> _Sorted:
    replicas, assignments = expert_RA.shape
    device = expert_RA.device
    sorted_RA, order_RA = expert_RA.sort(dim=-1, stable=True)
    bounds_RE1 = torch.searchsorted(
        sorted_RA, torch.arange(experts + 1, device=device).expand(replicas, -1).contiguous()
    )
    starts_RE, counts_RE = bounds_RE1[:, :-1], bounds_RE1.diff(dim=-1)
    position_sorted_RA = torch.arange(assignments, device=device) - starts_RE.gather(1, sorted_RA)
    position_RA = torch.empty_like(order_RA).scatter_(1, order_RA, position_sorted_RA)
    return _Sorted(order_RA, position_RA, starts_RE, counts_RE)


# Two implementations with the same result: one for a CPU, which sorts fast, and one without sort and
# scatter, which a GPU runs in a few fused launches.


def _queue_by_sort(expert_RA: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queues assignments for their experts, given the expert of each assignment.

    Returns the position of each assignment in its expert's queue [R, A], the assignment at each of the
    first `capacity` positions of each queue [R, E, C] (arbitrary beyond the queue's end), and the queues'
    lengths [R, E].
    """
    queue, places = _sorted(expert_RA, experts), torch.arange(capacity, device=expert_RA.device)
    index_REC = (queue.starts_RE[:, :, None] + places).clamp(max=expert_RA.shape[1] - 1)
    assignment_REC = queue.order_RA.gather(1, index_REC.flatten(1)).view_as(index_REC)
    return queue.position_RA, assignment_REC, queue.counts_RE


def _queue_by_count(expert_RA: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same as `_queue_by_sort`."""
    replicas, assignments = expert_RA.shape
    number_E1 = torch.arange(experts, device=expert_RA.device)[:, None]
    # The number of assignments of each expert up to and including each assignment.
    count_REA = (expert_RA[:, None] == number_E1).to(torch.int32).cumsum(-1, dtype=torch.int32)
    position_RA = count_REA.gather(1, expert_RA[:, None])[:, 0].long() - 1
    wanted_C = torch.arange(1, capacity + 1, dtype=torch.int32, device=expert_RA.device)
    wanted_REC = wanted_C.expand(replicas, experts, -1).contiguous()
    assignment_REC = torch.searchsorted(count_REA, wanted_REC).clamp(max=assignments - 1)
    return position_RA, assignment_REC, count_REA[..., -1].long()


class _GatherRows(torch.autograd.Function):
    """Computes y[j] = x[index[j]] for an index with a known transpose.

    The outputs `inverse[:, i]` read row i of x where `keep[:, i]` is true (None: everywhere), so the gradient is a
    gather too. Autograd's scatter-add is as fast on a CPU, but not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x_ID: Tensor, index_J: Tensor, inverse_KI: Tensor, keep_KI: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse_KI, keep_KI)
        return F.embedding(index_J, x_ID)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inverse_KI, keep_KI = ctx.saved_tensors
        (dy_JD,) = gradients
        dx_KID = F.embedding(inverse_KI, dy_JD)
        if keep_KI is not None:
            dx_KID = dx_KID * keep_KI[..., None]
        return (dx_KID[0] if len(dx_KID) == 1 else dx_KID.sum(0)), None, None, None


def dispatch(x_RND: Tensor, routing: Routing) -> Tensor:
    """Returns the tokens in their rows, [M, D]. An empty row holds a token that nothing reads."""
    active, tokens = routing.row_RKN.shape[1:]
    replica_M, assignment_M = routing.assignment_M // (active * tokens), routing.assignment_M
    token_M = assignment_M % tokens + tokens * replica_M
    row_KI, kept_KI = (t.transpose(0, 1).flatten(1) for t in (routing.row_RKN, routing.kept_RKN))
    y: Tensor = _GatherRows.apply(x_RND.flatten(0, 1), token_M, row_KI, kept_KI)  # type: ignore[no-untyped-call]
    return y


def gather_outputs(y_MD: Tensor, routing: Routing) -> Tensor:
    """Returns the expert output of each assignment, [R, K, N, D]; for a dropped one, some other output."""
    filled_1M = None if routing.filled_M is None else routing.filled_M[None]
    z_ID: Tensor = _GatherRows.apply(  # type: ignore[no-untyped-call]
        y_MD, routing.row_RKN.flatten(), routing.assignment_M[None], filled_1M
    )
    return z_ID.view(*routing.row_RKN.shape, -1)


def combine(z_RKND: Tensor, gates_RKN: Tensor) -> Tensor:
    """Returns the gated sum of each token's expert outputs, [R, N, D]; 0 for a dropped token."""
    # Gates are float32, so the product is too, even under autocast.
    gated_RKND = z_RKND * gates_RKN[..., None]
    return gated_RKND[:, 0] if gates_RKN.shape[1] == 1 else gated_RKND.sum(1)
