"""Speed of a training step against width, tokens, experts, granularity and replicas, compared with a FLOPs prediction.

python benchmarks/growth.py [--axes width batch_size experts granularity replicas] [--seconds 2]
                            [--device cuda] [--request request.json]

Each axis varies one number of the default shape (width 64, 16 sequences of 64 tokens, 8 experts, granularity 1, one
replica), trained as the pipeline trains it. All values of an axis take turns, each in its own process. `predicted` is
the tokens/s at the same FLOPs per second as the base. Replicas are stacked and trained in lockstep; tokens/s are the
total over all replicas. On a GPU their number doubles until that gains less than 5 % or memory is full. Memory is the
peak: of tensors on a GPU, of the whole process (including about 0.35 GB of imports) on a CPU.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from common import PROVENANCE, announced, machine_row, out_path, parser
from timing import Measured, measure
from variants import Variant, default_variant, read_request

from mup_moe.files import write_csv
from mup_moe.training.request import TrainingRequest

COLUMNS = (
    *("axis", "value", "architecture", "width", "experts", "granularity", "replicas", "precision", "step"),
    *("parameters", "flops_per_token", "tokens_per_second", "predicted_tokens_per_second", "ratio_to_base"),
    *("of_prediction", "gflops", "matmul_gflops", "fraction_of_matmul", "memory_mb"),
    *PROVENANCE,
)
VALUES = {
    "width": (64, 32, 128, 256, 512),
    "batch_size": (16, 4, 8, 32, 64),
    "experts": (8, 2, 4, 16, 32),
    "granularity": (1, 2, 4, 8, 16),
    "replicas": (1, 2, 4, 8, 16),
}
"""The values of each axis, with that of the base first."""
MOST_REPLICAS = 1024
LEAST_GAIN = 1.05


def rows_of(axis: str, results: list[Measured]) -> Iterator[list[Any]]:
    """Yields a row for each value, in ascending order and without the provenance."""
    base = results[0]
    for result in sorted(results, key=lambda r: getattr(r.variant, axis)):
        variant = result.variant
        ratio, less_work = result.ratio(base), base.sizes.flops_per_token / result.sizes.flops_per_token
        yield [
            *(axis, getattr(variant, axis), variant.architecture, variant.width, variant.experts),
            *(variant.granularity, variant.replicas, variant.precision, variant.step),
            *(result.sizes.parameters, result.sizes.flops_per_token, round(result.rate)),
            *(round(base.rate * less_work), round(ratio, 3), round(ratio / less_work, 3)),
            *(round(result.gflops, 1), round(result.matmul_gflops, 1)),
            round(result.fraction_of_matmul, 3),
            round(result.memory_bytes / 2**20),
        ]


def until_saturated(base: Variant, request: TrainingRequest, threads: int, seconds: float) -> list[Measured]:
    """Doubles the replicas until that gains little, always timing a number in turns with half of it."""
    kept: list[Measured] = []
    counts = [2**power for power in range(MOST_REPLICAS.bit_length())]
    for fewer, more in pairwise(counts):
        pair = measure(
            [replace(base, replicas=count) for count in (fewer, more)], request, threads=threads, seconds=seconds
        )
        if not kept:
            kept.append(pair[0])
        if len(pair) < 2:
            break  # already reported; most likely out of memory
        kept.append(pair[1])
        if pair[1].ratio(pair[0]) < LEAST_GAIN:
            break
    turns = min(len(result.rates) for result in kept)
    for result in kept:
        del result.rates[turns:]
    return kept


def main() -> None:
    """Measures each axis and writes a row for each value."""
    options = parser(__doc__, "growth")
    options.add_argument("--axes", nargs="+", choices=list(VALUES), default=list(VALUES))
    options.add_argument("--architectures", nargs="+", choices=["moe", "dense"], default=["moe", "dense"])
    options.add_argument("--width", type=int, default=VALUES["width"][0], help="width of the base")
    options.add_argument("--values", nargs="+", type=int, help="values of each axis, that of the base first")
    options.add_argument("--seconds", type=float, default=2.0, help="training time per value")
    arguments = options.parse_args()
    request, device = read_request(arguments.request), arguments.device
    rows: list[list[Any]] = []
    for axis in arguments.axes:
        for architecture in arguments.architectures:
            if architecture == "dense" and axis in ("experts", "granularity"):
                continue
            dense = {"architecture": "dense", "experts": 1} if architecture == "dense" else {}
            base = default_variant(request, device, **{"width": arguments.width} | dense)
            with announced(f"{architecture}, {axis}"):
                if axis == "replicas" and device == "cuda":
                    results = until_saturated(base, request, arguments.threads, arguments.seconds)
                else:
                    values = arguments.values or VALUES[axis]
                    variants = [replace(base, **{axis: value}) for value in values]
                    results = measure(variants, request, threads=arguments.threads, seconds=arguments.seconds)
            if not results or getattr(results[0].variant, axis) != getattr(base, axis):
                sys.exit(f"the base of axis {axis} could not be measured: see the reason above")
            for row in rows_of(axis, results):
                rows.append(row + machine_row(device, arguments.threads))
                _show(dict(zip(COLUMNS, rows[-1], strict=True)))
            write_csv(out_path(arguments, "growth"), COLUMNS, rows)


def _show(row: dict[str, Any]) -> None:
    print(
        f"{row['architecture']:5} {row['axis']:11} {row['value']:4}: {row['tokens_per_second']:9,} tokens/s,"
        f" {row['of_prediction']:.2f}x what FLOPs predict, {row['memory_mb']:,} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
