"""Matrix products with gradients, computed by whichever BLAS is faster on the processor (docs/decisions.md).

That is torch's, except for float32 on an AMD processor with one thread: there numpy's OpenBLAS is faster than the
oneMKL that ships with torch.

Axes: R replicas, N tokens, I inputs and O outputs of a product, M rows in G runs.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mup_moe import provenance

# torch's grouped product requires row sizes that are multiples of this many bytes.
_GROUPED_BYTES = 16


@cache
def numpy_is_faster() -> bool:
    """Whether numpy's float32 products are faster than torch's on this machine's processor, in one thread.

    If so, this also limits numpy's BLAS to one thread from then on.
    """
    if not str(provenance.machine()["cpu"]).startswith("AMD"):
        return False
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # a machine with only torch
        return False
    blas = ThreadpoolController().select(internal_api="openblas")
    blas.limit(limits=1)
    return len(blas) > 0


def _by_numpy(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.get_num_threads() == 1
        and numpy_is_faster()
    )


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Returns the product of two stacks of matrices, without a gradient."""
    a, b = a.detach(), b.detach()
    if not _by_numpy(a):
        return a @ b
    with _quietly():
        return torch.from_numpy(np.matmul(_array(a), _array(b)))


def _quietly() -> np.errstate:
    # The trainer detects non-finite values.
    return np.errstate(all="ignore")


def _array(x: Tensor) -> np.ndarray:
    # numpy multiplies other layouts without BLAS.
    rows, columns = x.shape[-2:]
    if not ((x.stride(-1) == 1 and x.stride(-2) >= columns) or (x.stride(-2) == 1 and x.stride(-1) >= rows)):
        x = x.contiguous()
    array: np.ndarray = x.numpy()
    return array


def product(x_RNI: Tensor, weight_RIO: Tensor) -> Tensor:
    """Returns each row times its replica's matrix, [R, N, O]."""
    if not _by_numpy(x_RNI):
        return x_RNI @ weight_RIO
    y_RNO: Tensor = _Product.apply(x_RNI, weight_RIO)  # type: ignore[no-untyped-call]
    return y_RNO


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RNI: Tensor, weight_RIO: Tensor) -> Tensor:
        ctx.save_for_backward(x_RNI, weight_RIO)
        return multiply(x_RNI, weight_RIO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RNO: Tensor) -> tuple[Tensor | None, ...]:
        x_RNI, weight_RIO = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        return multiply(dy_RNO, weight_RIO.mT) if of_x else None, multiply(x_RNI.mT, dy_RNO) if of_weight else None


def prefers_runs(*weights: Tensor) -> bool:
    """Whether `grouped_product` accepts these stacks [R, E, I, O] and is faster than padding; not in bfloat16."""
    first = weights[0]
    if first.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    in_units = all(size * 4 % _GROUPED_BYTES == 0 for weight in weights for size in weight.shape[-2:])
    return in_units or _by_numpy(first)


def grouped_product(x_MI: Tensor, weight_GIO: Tensor, ends_G: Tensor) -> Tensor:
    """Multiplies each of the G runs of rows, which end at `ends_G`, by its own matrix; returns [M, O]."""
    if not _by_numpy(x_MI):
        return F.grouped_mm(x_MI, weight_GIO, offs=ends_G.to(torch.int32))
    y_MO: Tensor = _GroupedProduct.apply(x_MI, weight_GIO, ends_G.tolist())  # type: ignore[no-untyped-call]
    return y_MO


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_GIO: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x_MI, weight_GIO)
        ctx.ends = ends
        y_MO = x_MI.new_empty(len(x_MI), weight_GIO.shape[2])
        with _quietly():
            for x, weight, y in _runs(ends, x_MI, weight_GIO, y_MO):
                np.matmul(x, weight, out=y)
        return y_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_MI, weight_GIO = ctx.saved_tensors
        dx_MI, dweight_GIO = torch.empty_like(x_MI), torch.empty_like(weight_GIO)
        with _quietly():
            for x, weight, dy, dx, dweight in _runs(ctx.ends, x_MI, weight_GIO, dy_MO.contiguous(), dx_MI, dweight_GIO):
                np.matmul(dy, weight.T, out=dx)
                np.matmul(x.T, dy, out=dweight)
        return dx_MI, dweight_GIO, None


def _runs(ends: list[int], *tensors: Tensor) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields each run's part of the tensors: its rows (2-D tensors) or its matrix (3-D stacks)."""
    arrays = [tensor.detach().numpy() for tensor in tensors]
    start = 0
    for group, end in enumerate(ends):
        yield tuple(array[start:end] if array.ndim == 2 else array[group] for array in arrays)
        start = end
