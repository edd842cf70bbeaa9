"""Operators of our own, where another form than torch's is faster on some device (docs/decisions.md).

Axes: R replicas, N tokens, V vocabulary, D width, I and J rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# One-hot rows are as large as the logits, and their product a third of the unembedding's work.
_MOST_ONE_HOT = 8192


def prefers_dense(device: torch.device) -> bool:
    """Whether elementwise work on whole tensors beats sorting, scattering and slicing.

    True everywhere but on a CPU: a GPU pays for launches and for writes in no fixed order, and hardly
    for arithmetic.
    """
    return device.type != "cpu"


def rows(x_RID: Tensor, index_RJ: Tensor) -> Tensor:
    """The rows `index_RJ` of each replica, [R, J, D]."""
    replicas, count, width = x_RID.shape
    if replicas > 1:
        index_RJ = index_RJ + count * torch.arange(replicas, device=x_RID.device)[:, None]
    return F.embedding(index_RJ, x_RID.reshape(-1, width))


def lookup(table_RVD: Tensor, index_RN: Tensor) -> Tensor:
    """As `rows`, with a gradient that is a product with one-hot rows where that is the faster way."""
    if table_RVD.shape[1] <= _MOST_ONE_HOT and prefers_dense(table_RVD.device):
        x_RND: Tensor = _OneHotLookup.apply(table_RVD, index_RN)  # type: ignore[no-untyped-call]
        return x_RND
    return rows(table_RVD, index_RN)


class _OneHotLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_RVD: Tensor, index_RN: Tensor) -> Tensor:
        ctx.save_for_backward(index_RN)
        ctx.vocabulary = table_RVD.shape[1]
        # As the gradient of any other matrix: in the precision of the products, as autocast has it. torch asks for a
        # device that autocast knows, and its compiler cannot ask whether it does.
        kind = table_RVD.device.type
        autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
        ctx.dtype = torch.get_autocast_dtype(kind) if autocast else table_RVD.dtype
        return rows(table_RVD, index_RN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_RND: Tensor) -> tuple[Tensor, None]:
        (index_RN,) = ctx.saved_tensors
        number_V1 = torch.arange(ctx.vocabulary, device=index_RN.device)[:, None]
        one_hot_RVN = (index_RN[:, None] == number_V1).to(ctx.dtype)
        return torch.bmm(one_hot_RVN, dx_RND.to(ctx.dtype)).to(dx_RND.dtype), None


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats, [N], in float32 whatever the logits are.

    Its backward uses the probabilities of its forward; torch's own makes a dense gradient of the picked entries
    and exponentiates again. So its graph can be walked backward once: torch raises RuntimeError the second time.
    """
    losses_N: Tensor = _CrossEntropy.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return losses_N


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
        if prefers_dense(device):
            is_target_NV = torch.arange(vocabulary, device=device) == target_N1
            return ((probabilities_NV - is_target_NV.float()) * gradient_N1).to(ctx.dtype), None
        probabilities_NV.mul_(gradient_N1)
        first_N = torch.arange(0, probabilities_NV.numel(), vocabulary)
        probabilities_NV.view(-1).scatter_add_(0, first_N + target_N1.view(-1), -gradient_N1.reshape(-1))
        return probabilities_NV.to(ctx.dtype), None
