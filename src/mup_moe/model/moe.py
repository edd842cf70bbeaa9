"""A mixture-of-experts layer with static shapes: routing, dispatch, experts, combination.

Axes: R replicas, N tokens, D width, E experts, K top-k, C capacity (places per expert),
M = E * C places, F expert size. Every shape follows from the settings alone, so that the layer
compiles, can be captured in a CUDA graph, and carries replicas.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mup_moe.config.settings import DROPLESS, ModelSettings
from mup_moe.model import hardware
from mup_moe.model.inventory import moe_tensors
from mup_moe.model.shape import ModelShape
from mup_moe.model.tap import Tap
from mup_moe.model.weight import Weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class RouterStatistics:
    """What a layer's router did with a batch, per replica.

    balance_R: load-balancing loss, 1 at perfect balance (Switch Transformer, eq. 4; divided by
        top-k so that granularity does not change its scale).
    z_R: router z-loss, the mean squared log-sum-exp of the logits (ST-MoE, eq. 5).
    dropped_R: the share of assignments that found their expert full.
    max_load_R: the busiest expert's share of assignments, times the number of experts.
    """

    balance_R: Tensor
    z_R: Tensor
    dropped_R: Tensor
    max_load_R: Tensor


@dataclass(frozen=True)
class Routing:
    """Which token sits at which place. A choice is a (k, token) pair, numbered k * N + token.

    gates_RKN: the router's probability of each choice; 0 where the choice was dropped.
    place_RKN: the place (expert * C + position) of each choice; any place if dropped.
    kept_RKN: whether the choice got a place.
    choice_RM: the choice at each place; any choice if the place is empty.
    filled_RM: whether a choice sits there.
    """

    gates_RKN: Tensor
    place_RKN: Tensor
    kept_RKN: Tensor
    choice_RM: Tensor
    filled_RM: Tensor


def capacity(tokens: int, shape: ModelShape, factor: float | str) -> int:
    """Places per expert: factor times its expected assignments, rounded up; all tokens if dropless."""
    if factor == DROPLESS:
        return tokens
    # The small subtrahend undoes rounding: 1.1 * 100 tokens on 10 experts is 11 places, not 12.
    return min(tokens, max(1, math.ceil(float(factor) * tokens * shape.top_k / shape.experts - 1e-9)))


def route(
    logits_RNE: Tensor, top_k: int, capacity: int, *, renormalize: bool = False
) -> tuple[Routing, RouterStatistics]:
    """Sends each token to its `top_k` most probable experts while places last.

    Places go to first choices before second ones, and to earlier tokens before later ones. The gate
    is the softmax over all experts, un-renormalised by default (Switch Transformer, eq. 2).
    """
    replicas, tokens, experts = logits_RNE.shape
    probabilities_RNE = logits_RNE.softmax(-1)
    dense = hardware.prefers_dense(logits_RNE.device)
    gates_RNK, expert_RNK = (_top_by_argmax if dense else _top_by_sort)(probabilities_RNE, top_k)
    if renormalize:
        gates_RNK = gates_RNK / gates_RNK.sum(-1, keepdim=True)

    choices = top_k * tokens
    expert_RA = expert_RNK.transpose(1, 2).reshape(replicas, choices)
    position_RA, choice_REC, counts_RE = (_queue_by_count if dense else _queue_by_sort)(expert_RA, experts, capacity)
    kept_RA = position_RA < capacity
    place_RA = (expert_RA * capacity + position_RA).where(kept_RA, 0)
    filled_REC = torch.arange(capacity, device=logits_RNE.device) < counts_RE[:, :, None]
    kept_RKN = kept_RA.view(replicas, top_k, tokens)
    routing = Routing(
        gates_RKN=gates_RNK.transpose(1, 2) * kept_RKN,
        place_RKN=place_RA.view(replicas, top_k, tokens),
        kept_RKN=kept_RKN,
        choice_RM=choice_REC.reshape(replicas, -1),
        filled_RM=filled_REC.reshape(replicas, -1),
    )
    load_RE = counts_RE / choices
    statistics = RouterStatistics(
        balance_R=experts * (load_RE * probabilities_RNE.mean(1)).sum(-1),
        z_R=logits_RNE.logsumexp(-1).square().mean(-1),
        dropped_R=1 - kept_RA.float().mean(-1),
        max_load_R=experts * load_RE.amax(-1),
    )
    return routing, statistics


# The two halves of routing, each in two forms that give the same result: one for a CPU, which sorts
# fast, and one without sort and scatter, which a GPU runs in a few fused launches.
# Axes: A = K * N choices, k * N + n each; beside those above.


def _top_by_sort(probabilities_RNE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` largest probabilities of each token, [R, N, K], and their experts; the largest first."""
    gates_RNK, expert_RNK = probabilities_RNE.topk(top_k, dim=-1)
    return gates_RNK, expert_RNK


def _top_by_argmax(probabilities_RNE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As `_top_by_sort`; of equal probabilities the first expert's."""
    number_E = torch.arange(probabilities_RNE.shape[-1], device=probabilities_RNE.device)
    left_RNE, chosen = probabilities_RNE.detach(), []
    for _ in range(top_k):
        chosen.append(left_RNE.argmax(-1, keepdim=True))
        left_RNE = left_RNE.masked_fill(number_E == chosen[-1], -math.inf)
    expert_RNK = torch.cat(chosen, -1)
    # The gradient of a gather would be a scatter.
    gates_RNK = (probabilities_RNE[:, :, None] * (expert_RNK[..., None] == number_E)).sum(-1)
    return gates_RNK, expert_RNK


def _queue_by_sort(expert_RA: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """How choices queue for their experts, given the expert of each.

    Returns the position of each choice in its expert's queue [R, A], the choice at each of the first
    `capacity` positions of each queue [R, E, C] (any choice beyond the queue's end), and the queues'
    lengths [R, E].
    """
    replicas, choices = expert_RA.shape
    device = expert_RA.device
    # A stable sort by expert puts choices in order of precedence within each expert.
    sorted_RA, order_RA = expert_RA.sort(dim=-1, stable=True)
    bounds_RE1 = torch.searchsorted(
        sorted_RA, torch.arange(experts + 1, device=device).expand(replicas, -1).contiguous()
    )
    starts_RE, counts_RE = bounds_RE1[:, :-1], bounds_RE1.diff(dim=-1)
    position_sorted_RA = torch.arange(choices, device=device) - starts_RE.gather(1, sorted_RA)
    position_RA = torch.empty_like(order_RA).scatter_(1, order_RA, position_sorted_RA)
    index_REC = (starts_RE[:, :, None] + torch.arange(capacity, device=device)).clamp(max=choices - 1)
    return position_RA, order_RA.gather(1, index_REC.flatten(1)).view_as(index_REC), counts_RE


def _queue_by_count(expert_RA: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_queue_by_sort`."""
    replicas, choices = expert_RA.shape
    number_E1 = torch.arange(experts, device=expert_RA.device)[:, None]
    # How many choices of each expert there are up to each choice.
    count_REA = (expert_RA[:, None] == number_E1).to(torch.int32).cumsum(-1, dtype=torch.int32)
    position_RA = count_REA.gather(1, expert_RA[:, None])[:, 0].long() - 1
    wanted_C = torch.arange(1, capacity + 1, dtype=torch.int32, device=expert_RA.device)
    wanted_REC = wanted_C.expand(replicas, experts, -1).contiguous()
    choice_REC = torch.searchsorted(count_REA, wanted_REC).clamp(max=choices - 1)
    return position_RA, choice_REC, count_REA[..., -1].long()


class _GatherRows(torch.autograd.Function):
    """y[j] = x[index[j]], for an index whose transpose is known.

    Row i of x is read by the outputs `inverse[:, i]` where `keep[:, i]` holds, so that the gradient
    is a gather too. Autograd's scatter-add is as fast on a CPU, but not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x_RID: Tensor, index_RJ: Tensor, inverse_RKI: Tensor, keep_RKI: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_RKI, keep_RKI)
        return _rows(x_RID, index_RJ)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inverse_RKI, keep_RKI = ctx.saved_tensors
        (dy_RJD,) = gradients
        replicas, copies, rows = inverse_RKI.shape
        dx_RKID = _rows(dy_RJD, inverse_RKI.view(replicas, -1)).view(replicas, copies, rows, -1)
        dx_RKID = dx_RKID * keep_RKI[..., None]
        return (dx_RKID[:, 0] if copies == 1 else dx_RKID.sum(1)), None, None, None


def _rows(x_RID: Tensor, index_RJ: Tensor) -> Tensor:
    replicas, rows, width = x_RID.shape
    if replicas > 1:
        index_RJ = index_RJ + rows * torch.arange(replicas, device=x_RID.device)[:, None]
    return x_RID.reshape(-1, width).index_select(0, index_RJ.reshape(-1)).view(replicas, -1, width)


def dispatch(x_RND: Tensor, routing: Routing) -> Tensor:
    """The rows of `x_RND` in places [R, M, D]. An empty place holds a row that nothing reads."""
    token_RM = routing.choice_RM % x_RND.shape[1]
    y: Tensor = _GatherRows.apply(x_RND, token_RM, routing.place_RKN, routing.kept_RKN)  # type: ignore[no-untyped-call]
    return y


def collect(y_RMD: Tensor, routing: Routing) -> Tensor:
    """The expert's output of each choice, [R, K, N, D]; for a dropped choice some other one's."""
    replicas, top_k, tokens = routing.place_RKN.shape
    z_RAD: Tensor = _GatherRows.apply(  # type: ignore[no-untyped-call]
        y_RMD, routing.place_RKN.view(replicas, -1), routing.choice_RM[:, None], routing.filled_RM[:, None]
    )
    return z_RAD.view(replicas, top_k, tokens, -1)


def combine(z_RKND: Tensor, gates_RKN: Tensor) -> Tensor:
    """The gated sum of each token's experts, [R, N, D]; 0 for a token that was dropped."""
    # Gates are float32, and so is the product, even under autocast.
    gated_RKND = z_RKND * gates_RKN[..., None]
    return gated_RKND[:, 0] if gates_RKN.shape[1] == 1 else gated_RKND.sum(1)


class MoE(nn.Module):
    """Router and experts: y = sum over the chosen experts of gate_k * E_k(x)."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        self.shape = shape
        self.settings = settings
        tensors = moe_tensors(shape, settings)
        self.router = Weight(tensors["router"], replicas)
        self.up, self.down = Weight(tensors["up"], replicas), Weight(tensors["down"], replicas)
        self.logits, self.gates, self.expert_outputs = Tap(), Tap(), Tap()

    def router_logits(self, x_RND: Tensor) -> Tensor:
        """Router logits [R, N, E], in float32 even under autocast (Switch Transformer, section 2.4)."""
        with torch.autocast(x_RND.device.type, enabled=False):
            return self.router.times(x_RND.to(self.router.value.dtype))

    def forward(self, x_RND: Tensor) -> tuple[Tensor, RouterStatistics]:
        """Tokens [R, N, D] to tokens [R, N, D], and what the router did."""
        places = capacity(x_RND.shape[1], self.shape, self.settings.capacity_factor)
        routing, statistics = route(
            self.logits(self.router_logits(x_RND)),
            self.shape.top_k,
            places,
            renormalize=self.settings.renormalize_gates,
        )
        x_RMD = dispatch(x_RND, routing)
        y_RMD = self.down.times(ACTIVATIONS[self.settings.activation](self.up.times(x_RMD)))
        z_RKND = self.expert_outputs(collect(y_RMD, routing))
        return combine(z_RKND, self.gates(routing.gates_RKN)), statistics
