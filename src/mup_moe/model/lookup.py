"""The embedding's lookup, whose gradient is a product with one-hot rows where that is the faster way.

Axes: R replicas, N tokens, V vocabulary, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mup_moe.model import hardware

# One-hot rows are as large as the logits, and their product a third of the unembedding's work.
_MOST_ONE_HOT = 8192


class _OneHotLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_RVD: Tensor, index_RN: Tensor) -> Tensor:
        ctx.save_for_backward(index_RN)
        ctx.vocabulary = table_RVD.shape[1]
        # As the gradient of any other matrix: in the precision of the products.
        ctx.dtype = _product_dtype(table_RVD)
        return _rows(table_RVD, index_RN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_RND: Tensor) -> tuple[Tensor, None]:
        (index_RN,) = ctx.saved_tensors
        number_V1 = torch.arange(ctx.vocabulary, device=index_RN.device)[:, None]
        one_hot_RVN = (index_RN[:, None] == number_V1).to(ctx.dtype)
        return torch.bmm(one_hot_RVN, dx_RND.to(ctx.dtype)).to(dx_RND.dtype), None


def lookup(table_RVD: Tensor, index_RN: Tensor) -> Tensor:
    """Row `index_RN` of each replica's table, [R, N, D]."""
    if table_RVD.shape[1] <= _MOST_ONE_HOT and hardware.prefers_dense(table_RVD.device):
        x_RND: Tensor = _OneHotLookup.apply(table_RVD, index_RN)  # type: ignore[no-untyped-call]
        return x_RND
    return _rows(table_RVD, index_RN)


def _product_dtype(like: Tensor) -> torch.dtype:
    """The precision of matrix products with a tensor, as autocast has it."""
    device = like.device.type
    # torch asks for a device that autocast knows, and its compiler cannot ask whether it does.
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype


def _rows(table_RVD: Tensor, index_RN: Tensor) -> Tensor:
    replicas, vocabulary, width = table_RVD.shape
    if replicas > 1:
        index_RN = index_RN + vocabulary * torch.arange(replicas, device=index_RN.device)[:, None]
    return F.embedding(index_RN, table_RVD.reshape(-1, width))
