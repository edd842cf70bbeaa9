"""Causal multi-head attention.

Axes: R replicas, N tokens, D width, X sequences of all replicas, H heads, S positions, P head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.inventory import ModelShape, attention_tensors
from mup_moe.model.layers import Weight

_ROTARY_BASE = 10_000.0
# Smaller heads are faster with our own products than with torch's CPU kernel (float32).
_NARROW = 16


def causal_attention(q_XHSP: Tensor, k_XHSP: Tensor, v_XHSP: Tensor) -> Tensor:
    """Returns softmax(q.k) v over each position and those before it, [X, H, S, P]; does not scale the logits."""
    *_, positions, size = shape = q_XHSP.shape
    on_cpu, narrow = q_XHSP.device.type == "cpu", size < _NARROW
    # On a CPU, torch's own kernel takes several times as long in bfloat16 as in float32 (docs/decisions.md).
    if not on_cpu or not (narrow or q_XHSP.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q_XHSP, k_XHSP, v_XHSP, is_causal=True, scale=1.0)
    later_SS = torch.full((positions, positions), -math.inf, dtype=q_XHSP.dtype).triu(1)
    if q_XHSP.dtype == torch.bfloat16:
        q, k, v = (t.reshape(-1, positions, size) for t in (q_XHSP, k_XHSP, v_XHSP))
        weights = torch.baddbmm(later_SS, q, k.mT).softmax(-1, dtype=torch.float32)
        return torch.bmm(weights.to(v.dtype), v).view(shape)
    # Put the long axis last: products of rows with few entries are slow.
    q, k, v = (t.mT.reshape(-1, size, positions) for t in (q_XHSP, k_XHSP, v_XHSP))
    mixed, half = [], -(-positions // 2)
    # The first half of the positions never sees the second.
    for start, end in ((0, half), (half, positions)):
        weights = torch.baddbmm(later_SS[start:end, :end], q[..., start:end].mT, k[..., :end]).softmax(-1)
        mixed.append(torch.bmm(v[..., :end], weights.mT))
    return torch.cat(mixed, -1).view(*shape[:2], size, positions).mT


def rotate(x_XHSP: Tensor) -> Tensor:
    """Applies rotary positions to queries or keys (RoFormer, eq. 34), pairing the halves of a head as Llama does."""
    positions, size = x_XHSP.shape[-2:]
    frequency_P = _ROTARY_BASE ** (-torch.arange(0, size, 2, device=x_XHSP.device) / size).repeat(2)
    angle_SP = torch.arange(positions, device=x_XHSP.device)[:, None] * frequency_P
    first, second = x_XHSP.chunk(2, dim=-1)
    cosine_SP, sine_SP = angle_SP.cos().to(x_XHSP.dtype), angle_SP.sin().to(x_XHSP.dtype)
    return x_XHSP * cosine_SP + torch.cat([-second, first], -1) * sine_SP


class Attention(nn.Module):
    """Causal multi-head attention without biases."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        tensors = attention_tensors(shape)
        self.heads = shape.heads
        self.rotary = settings.positions == "rotary"
        self.qkv, self.out = Weight(tensors["qkv"], replicas), Weight(tensors["out"], replicas)
        # The scale of the logits q.k, one per replica, set by `model.initialize`.
        self.register_buffer("logit_scale_R", torch.full((replicas,), float("nan")), persistent=False)
        self.logit_scale_R: Tensor

    def forward(self, x_RND: Tensor, sequence: int) -> Tensor:
        """Maps tokens [R, N, D] to tokens [R, N, D], attending within each run of `sequence` tokens."""
        replicas, tokens, width = x_RND.shape
        q, k, v = self.qkv.times(x_RND).chunk(3, dim=-1)
        q = (q * self.logit_scale_R[:, None, None]).to(q.dtype)
        heads = (replicas * tokens // sequence, sequence, self.heads, width // self.heads)
        q, k, v = (t.reshape(heads).transpose(1, 2) for t in (q, k, v))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        mixed_RND = causal_attention(q, k, v).transpose(1, 2).reshape(replicas, tokens, width)
        return self.out.times(mixed_RND)
