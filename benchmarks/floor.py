"""Where the time of a training step goes, and how much of it no library on this machine could save.

python benchmarks/floor.py [--widths 32 64 128] [--seconds 3] [--instructions native avx2] [--request request.json]

For each width, as the pipeline trains it. Times are milliseconds per step of the whole stack:

`step_ms`: the step.
`products_ms`: its matrix products, except for those of attention that are part of torch's kernel (`attention_ms`).
`softmax_ms`, `optimizer_ms`, `other_ms`: the other operators, as measured in the step.
`products_alone_ms`: the same products, run one after the other without anything else, on operands of the same shapes.
`products_at_peak_ms`: the time for their FLOPs at the machine's rate for square matrices (`matmul_gflops`).
`overhead_ms`: a step of the same model with hardly any numbers in it, which is what calling the operators costs.
`other_mb`: megabytes that the other operators read and write.
`fastest_ms`: products alone, attention, softmax and overhead: a step whose other operators take no time.
"""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import INSTRUCTIONS, PROVENANCE, instructions_of, machine_row, out_path, parser, rows_with
from timing import WARM_UP_STEPS, matmul_gflops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from variants import read_request, stacked_variant, trainer_of

from mup_moe.files import write_csv
from mup_moe.model import products
from mup_moe.ops.device import keep_freed_pages
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import Trainer

KINDS = ("products", "attention", "softmax", "optimizer", "other")
COLUMNS = (
    *("width", "replicas", "precision", "instructions", "step_ms", *(f"{kind}_ms" for kind in KINDS)),
    *("products_alone_ms", "products_at_peak_ms", "matmul_gflops", "overhead_ms", "other_mb", "fastest_ms"),
    *PROVENANCE,
)
_KIND_OF = dict.fromkeys(("mm", "bmm", "baddbmm", "addmm", "_grouped_mm"), "products")
_KIND_OF |= dict.fromkeys(("_softmax", "_softmax_backward_data", "amax", "log", "gather"), "softmax")
# Views, which do not touch memory.
_VIEWS = (
    "view",
    "transpose",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "split",
    "unbind",
    "alias",
)
# Hardly any numbers: two sequences of two tokens each.
_TINY = {"width": 8, "sequence": 2, "batch_size": 2}


class _Seen(TorchDispatchMode):
    """Times every operator of torch and every product of numpy, and keeps the products for later if asked to."""

    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: list[Callable[[], Any]] = []
        self.flops = self.other_bytes = 0
        self._keep = keep

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().partition("::")[2].partition(".")[0]
        if "scaled_dot_product" in name:
            kind = "attention"
        elif name.startswith(("_foreach", "_fused_adamw")):
            kind = "optimizer"
        else:
            kind = _KIND_OF.get(name, "other")
        made = self._timed(kind, functools.partial(operator, *args, **(kwargs or {})))
        if kind == "products":
            self._count(*[a for a in args if isinstance(a, Tensor) and a.dim() > 1][-2:])
        elif name.strip("_").removeprefix("unsafe_") not in _VIEWS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
            self.other_bytes += sum(tensor.nbytes for tensor in tensors)
        return made

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> Any:
        """Times and counts numpy's product."""
        self._count(a, b)
        return self._timed("products", functools.partial(np.matmul, a, b, out=out))

    def _count(self, a: Any, b: Any) -> None:
        size = a.size if isinstance(a, np.ndarray) else a.numel()
        self.flops += 2 * size * b.shape[-1]

    def _timed(self, kind: str, call: Callable[[], Any]) -> Any:
        if self._keep and kind == "products":
            self.calls.append(call)
        start = time.perf_counter()
        made = call()
        self.seconds[kind] += time.perf_counter() - start
        return made


@contextmanager
def seen(keep: bool = False) -> Iterator[_Seen]:
    """Times the operators that run inside the block."""
    mode = _Seen(keep)
    with mode, patch.object(products, "np", SimpleNamespace(matmul=mode.matmul, errstate=np.errstate)):
        yield mode


def milliseconds(work: Callable[[], Any], seconds: float) -> float:
    """Returns the median time of a piece of work, repeated for this many seconds."""
    for _ in range(WARM_UP_STEPS):
        work()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < WARM_UP_STEPS:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def tiny(base: TrainingRequest) -> TrainingRequest:
    """Returns a request for the same operators on hardly any numbers."""
    return replace(base, model=replace(base.model, sequence=_TINY["sequence"]))


def step_of(trainer: Trainer) -> Callable[[], None]:
    """Returns a function that takes one step."""
    return lambda: trainer.run(trainer.step + 1)


def measure(base: TrainingRequest, width: int, seconds: float) -> list[Any]:
    """Measures a width. Returns its row without the provenance."""
    variant = stacked_variant(base, "cpu", width=width)
    trainer = trainer_of(variant, base)
    step = step_of(trainer)
    step_ms = milliseconds(step, seconds)
    count = max(WARM_UP_STEPS, round(1e3 * seconds / step_ms / 2))
    with seen() as operators:
        for _ in range(count):
            step()
    with seen(keep=True) as kept:
        step()
    alone_ms = milliseconds(lambda: [call() for call in kept.calls], seconds)
    tiny_variant = replace(variant, width=_TINY["width"], batch_size=_TINY["batch_size"])
    overhead_ms = milliseconds(step_of(trainer_of(tiny_variant, tiny(base))), seconds / 2)
    peak = statistics.median(matmul_gflops("cpu", variant.precision) for _ in range(9))
    part_ms = {kind: 1e3 * operators.seconds[kind] / count for kind in KINDS}
    fastest_ms = alone_ms + part_ms["attention"] + part_ms["softmax"] + overhead_ms
    return [
        *(width, variant.replicas, variant.precision, torch.backends.cpu.get_cpu_capability(), round(step_ms, 2)),
        *(round(ms, 2) for ms in part_ms.values()),
        *(round(alone_ms, 2), round(kept.flops / peak / 1e6, 2), round(peak, 1), round(overhead_ms, 2)),
        *(round(operators.other_bytes / count / 1e6, 1), round(fastest_ms, 2)),
    ]


def main() -> None:
    """Measures each width and writes a row for it."""
    options = parser(__doc__, "floor")
    options.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128])
    options.add_argument("--seconds", type=float, default=3.0, help="measuring time for each part of a row")
    options.add_argument("--instructions", nargs="+", choices=list(INSTRUCTIONS), help="instruction sets of the CPU")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()
    rows: list[list[Any]] = []
    for instructions in arguments.instructions or instructions_of("cpu"):
        if instructions != "native":
            rows += rows_with(instructions, __file__)
            continue
        base = read_request(arguments.request)
        for width in arguments.widths:
            row = measure(base, width, arguments.seconds) + machine_row("cpu", arguments.threads)
            rows.append(row)
            print(", ".join(f"{name} {value}" for name, value in zip(COLUMNS[:-6], row[:-6], strict=True)), flush=True)
    write_csv(out_path(arguments, "floor"), COLUMNS, rows)


if __name__ == "__main__":
    main()
