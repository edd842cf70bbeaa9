"""Chooses the experts of each token and their weights.

Axes: R replicas, N tokens, D width, E experts, K experts of a token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mup_moe.model import operators
from mup_moe.model.layers import Weight


@dataclass(frozen=True)
class Choice:
    """The experts of each token, the best first."""

    logits_RNE: Tensor  # the router's logits
    share_RNE: Tensor  # each expert's share of a token; sums to 1 over experts
    expert_RNK: Tensor  # the chosen experts
    gates_RNK: Tensor  # the weight of each chosen expert's output


class Router(Weight):
    """One matrix that scores all experts for each token."""

    def logits(self, x_RND: Tensor) -> Tensor:
        """Returns router logits [R, N, E], in float32 even under autocast (Switch Transformer, section 2.4)."""
        with torch.autocast(x_RND.device.type, enabled=False):
            # `times` is avoided: numpy gains nothing with so few columns, and bfloat16 runs stay bit-identical.
            return self.scale(x_RND.to(self.value.dtype) @ self.value)


def choose(logits_RNE: Tensor, active_experts: int, gates: str = "softmax", renormalize: bool = False) -> Choice:
    """Chooses the `active_experts` experts with the highest scores for each token; the scores are the gates.

    gates: "softmax" scores by the softmax over all experts (Switch Transformer, eq. 2). "sigmoid" scores by the sigmoid
    of each logit; an expert's share of a token is its score divided by the sum over all experts (DeepSeek-V3, eqs. 15
    and 19). "sqrt" is softmax followed by the square root of each gate, so that with `renormalize` the squares of a
    token's gates sum to 1 (HyperP, arXiv 2603.28743). renormalize: scale the gates of a token to sum to 1.
    """
    scores_RNE, share_RNE = scores_of(logits_RNE, gates)
    if operators.prefers_dense(logits_RNE.device):
        gates_RNK, expert_RNK = _top_by_argmax(scores_RNE, active_experts)
    else:
        gates_RNK, expert_RNK = scores_RNE.topk(active_experts, dim=-1)
    if renormalize:
        gates_RNK = gates_RNK / gates_RNK.sum(-1, keepdim=True)
    if gates == "sqrt":
        # The clamp gives a gate of 0 a zero gradient instead of an infinite one.
        gates_RNK = gates_RNK.clamp_min(1e-30).sqrt()
    return Choice(logits_RNE, share_RNE, expert_RNK, gates_RNK)


def scores_of(logits_RNE: Tensor, gates: str) -> tuple[Tensor, Tensor]:
    """Returns each expert's score and its share of a token, which sums to 1 over experts; equal for softmax gates."""
    if gates == "sigmoid":
        scores_RNE = logits_RNE.sigmoid()
        return scores_RNE, scores_RNE / scores_RNE.sum(-1, keepdim=True)
    scores_RNE = logits_RNE.softmax(-1)
    return scores_RNE, scores_RNE


def _top_by_argmax(scores_RNE: Tensor, active_experts: int) -> tuple[Tensor, Tensor]:
    """Returns the same as `topk`, without sort and scatter, in a few fused launches; ties go to the first expert."""
    number_E = torch.arange(scores_RNE.shape[-1], device=scores_RNE.device)
    left_RNE, chosen = scores_RNE.detach(), []
    for _ in range(active_experts):
        chosen.append(left_RNE.argmax(-1, keepdim=True))
        left_RNE = left_RNE.masked_fill(number_E == chosen[-1], -math.inf)
    expert_RNK = torch.cat(chosen, -1)
    # The gradient of a gather would be a scatter.
    gates_RNK = (scores_RNE[:, :, None] * (expert_RNK[..., None] == number_E)).sum(-1)
    return gates_RNK, expert_RNK
