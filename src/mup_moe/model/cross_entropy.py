"""Cross-entropy whose backward uses the probabilities of its forward.

torch's own makes a dense gradient of the picked entries and exponentiates again: over a vocabulary
of 1,024 that was a quarter of a step at width 32 (docs/decisions.md).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mup_moe.model import hardware


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        probabilities_NV = torch.softmax(logits_NV, -1, dtype=torch.float32)
        target_N1 = targets_N[..., None]
        ctx.save_for_backward(probabilities_NV, target_N1)
        ctx.dtype = logits_NV.dtype
        # The largest probability is at least 1/V: its logarithm is exact where that of the target's underflows.
        log_sum_N = logits_NV.amax(-1).float() - probabilities_NV.amax(-1).log()
        return log_sum_N - logits_NV.gather(-1, target_N1).squeeze(-1).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        probabilities_NV, target_N1 = ctx.saved_tensors
        gradient_N1 = gradient_N[..., None]
        vocabulary, device = probabilities_NV.shape[-1], target_N1.device
        if hardware.prefers_dense(device):
            is_target_NV = torch.arange(vocabulary, device=device) == target_N1
            return ((probabilities_NV - is_target_NV.float()) * gradient_N1).to(ctx.dtype), None
        probabilities_NV.mul_(gradient_N1)
        rows = torch.arange(0, probabilities_NV.numel(), vocabulary)
        probabilities_NV.view(-1).scatter_add_(0, rows + target_N1.view(-1), -gradient_N1.reshape(-1))
        return probabilities_NV.to(ctx.dtype), None


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats, [N], in float32 whatever the logits are.

    Its graph can be walked backward once: torch raises RuntimeError the second time.
    """
    losses_N: Tensor = _CrossEntropy.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return losses_N
