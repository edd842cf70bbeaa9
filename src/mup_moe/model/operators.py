"""Our own operators, for cases where torch's are slower on some device (docs/decisions.md).

Axes: R replicas, N tokens, V vocabulary, D width, I and J rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mup_moe.model.products import multiply

# The largest vocabulary for one-hot rows: they are as large as the logits, and their product costs a third of the
# unembedding.
_MOST_ONE_HOT = 8192
# A piece holds 4 MiB of logits, which stay in a CPU's cache between two operators. Fewer rows would multiply slowly.
_CACHED, _LEAST_ROWS = 2**20, 128


def prefers_dense(device: torch.device) -> bool:
    """Whether elementwise work on whole tensors beats sorting, scattering and slicing.

    True everywhere except on a CPU: on a GPU, launches and unordered writes are expensive, and arithmetic is cheap.
    """
    return device.type != "cpu"


def prefers_static(device: torch.device) -> bool:
    """Whether a step should use whole operators with static shapes: on a GPU, or while compiling."""
    return prefers_dense(device) or torch.compiler.is_compiling()


def rows(x_RID: Tensor, index_RJ: Tensor) -> Tensor:
    """Returns the rows `index_RJ` of each replica, [R, J, D]."""
    replicas, count, width = x_RID.shape
    if replicas > 1:
        index_RJ = index_RJ + count * torch.arange(replicas, device=x_RID.device)[:, None]
    return F.embedding(index_RJ, x_RID.reshape(-1, width))


def lookup(table_RVD: Tensor, index_RN: Tensor) -> Tensor:
    """Returns the same as `rows`; where it is faster, the gradient is a product with one-hot rows."""
    if table_RVD.shape[1] <= _MOST_ONE_HOT and prefers_dense(table_RVD.device):
        x_RND: Tensor = _OneHotLookup.apply(table_RVD, index_RN)  # type: ignore[no-untyped-call]
        return x_RND
    return rows(table_RVD, index_RN)


class _OneHotLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_RVD: Tensor, index_RN: Tensor) -> Tensor:
        ctx.save_for_backward(index_RN)
        ctx.vocabulary = table_RVD.shape[1]
        # Like any other matrix gradient, this one uses the precision that autocast sets for products. torch accepts
        # only devices that autocast supports, and compiled code cannot query whether a device is one of them.
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
    """Returns -log softmax(logits)[target] in nats, [N], in float32 whatever the dtype of the logits.

    The backward pass reuses the probabilities of the forward pass, whereas torch's own makes a dense gradient of the
    picked entries and exponentiates again. The graph can therefore be traversed backward only once; torch raises
    RuntimeError the second time.
    """
    losses_N: Tensor = _CrossEntropy.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return losses_N


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        losses_N, probabilities_NV = _cross_entropy(logits_NV, targets_N)
        ctx.save_for_backward(probabilities_NV, targets_N)
        ctx.dtype = logits_NV.dtype
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        probabilities_NV, targets_N = ctx.saved_tensors
        return _logit_gradient(probabilities_NV, targets_N, gradient_N).to(ctx.dtype), None


def linear_cross_entropy(x_RND: Tensor, weight_RDV: Tensor, targets_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy of the logits x @ weight: the mean over tokens [R], and each token's loss [R, N].

    The losses per token have no gradient. The products are in the precision of autocast. The logits of all tokens never
    exist at once: pieces that fit a CPU's cache are turned into losses and gradients right away (Liger-Kernel, arXiv
    2410.10989, section 3.2).
    """
    if torch.is_autocast_enabled("cpu"):
        x_RND, weight_RDV = (t.to(torch.get_autocast_dtype("cpu")) for t in (x_RND, weight_RDV))
    if torch.is_grad_enabled():
        mean_R, losses_RN = _LinearCrossEntropy.apply(x_RND, weight_RDV, targets_RN)  # type: ignore[no-untyped-call]
        return mean_R, losses_RN
    losses_RN = torch.empty(targets_RN.shape)
    for piece, logits_RNV in _logits(x_RND, weight_RDV):
        losses_RN[piece], _ = _cross_entropy(logits_RNV, targets_RN[piece])
    return losses_RN.mean(1), losses_RN


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RND: Tensor, weight_RDV: Tensor, targets_RN: Tensor) -> tuple[Tensor, Tensor]:
        losses_RN = torch.empty(targets_RN.shape)
        dx_RND, dweight_RDV = torch.empty_like(x_RND), torch.empty_like(weight_RDV, dtype=torch.float32)
        of_mean_RN = torch.full_like(losses_RN, 1 / losses_RN.shape[1])
        for piece, logits_RNV in _logits(x_RND, weight_RDV):
            losses_RN[piece], probabilities_RNV = _cross_entropy(logits_RNV, targets_RN[piece])
            dlogits_RNV = _logit_gradient(probabilities_RNV, targets_RN[piece], of_mean_RN[piece]).to(x_RND.dtype)
            dx_RND[piece] = multiply(dlogits_RNV, weight_RDV[piece[0]].mT)
            dweight_piece_RDV = multiply(x_RND[piece].mT, dlogits_RNV)
            if piece[1].start == 0:
                dweight_RDV[piece[0]] = dweight_piece_RDV
            else:
                dweight_RDV[piece[0]] += dweight_piece_RDV
        ctx.save_for_backward(dx_RND, dweight_RDV.to(weight_RDV.dtype))
        ctx.mark_non_differentiable(losses_RN)
        return losses_RN.mean(1), losses_RN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_R: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        dx_RND, dweight_RDV = ((t * gradient_R[:, None, None]).to(t.dtype) for t in ctx.saved_tensors)
        return dx_RND, dweight_RDV, None


def _logits(x_RND: Tensor, weight_RDV: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yields the logits piece by piece, each with its slices of replicas and tokens."""
    (replicas, tokens, _), vocabulary = x_RND.shape, weight_RDV.shape[-1]
    rows = min(tokens, max(_LEAST_ROWS, _CACHED // vocabulary))
    stacked = max(1, _CACHED // (tokens * vocabulary))
    for replica in range(0, replicas, stacked):
        for token in range(0, tokens, rows):
            piece = slice(replica, replica + stacked), slice(token, token + rows)
            yield piece, multiply(x_RND[piece], weight_RDV[piece[0]])


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the losses [N] and the probabilities [N, V]."""
    probabilities_NV = torch.softmax(logits_NV, -1, dtype=torch.float32)
    # The largest probability is at least 1/V, so its logarithm is exact even where the target's probability underflows.
    log_sum_N = logits_NV.amax(-1).float() - probabilities_NV.amax(-1).log()
    return log_sum_N - logits_NV.gather(-1, targets_N[..., None]).squeeze(-1).float(), probabilities_NV


def _logit_gradient(probabilities_NV: Tensor, targets_N: Tensor, gradient_N: Tensor) -> Tensor:
    """Returns the gradient of the losses with respect to the logits [N, V]; may overwrite the probabilities."""
    target_N1, gradient_N1 = targets_N[..., None], gradient_N[..., None]
    vocabulary, device = probabilities_NV.shape[-1], targets_N.device
    if prefers_dense(device):
        is_target_NV = torch.arange(vocabulary, device=device) == target_N1
        return (probabilities_NV - is_target_NV.float()) * gradient_N1
    probabilities_NV.mul_(gradient_N1)
    first_N = torch.arange(0, probabilities_NV.numel(), vocabulary)
    probabilities_NV.view(-1).scatter_add_(0, first_N + targets_N.reshape(-1), -gradient_N.reshape(-1))
    return probabilities_NV
