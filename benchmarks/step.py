"""Speed of a training step: ours, transformers' Mixtral and Llama, and nanoGPT-mup, against the machine's matmul rate.

python benchmarks/step.py [--widths 32 64 128 256 512] [--architectures moe dense] [--seconds 3]
                          [--steps 6300] [--compiled-widths 32 64] [--no-compile]
                          [--instructions native avx2] [--device cuda] [--request request.json]

A step is forward, backward, clipping and AdamW on 1,024 tokens per replica; tokens/s are the total over all replicas
of a stack. Each variant of a shape runs in its own process and all of them take turns, so that a noisy machine
disturbs all alike. `ratio` is the median over the turns of a variant's tokens/s divided by those of the fastest
transformers variant in its stock environment; `ratio_same_allocator` divides by the fastest one whose malloc keeps
freed pages, as ours does. Peers without float32 weights (bfloat16-weights) are shown but never compared with, because
ours keeps them. Where bfloat16 is emulated, no variant uses it. nanoGPT-mup is timed along with Llama; its training
loop compiles the model, so a compiled variant is timed at the compiled widths. `tokens_per_second_of_run` includes
compilation, in a run of --steps steps (default: what one shape of figure 1 trains, 21 cells of 300 steps);
`ratio_of_run` divides by the best such run of transformers. The fraction of the matmul rate compares training FLOPs
(6 per active matrix entry, plus attention) with one product of square matrices in the precision of the variant.
`default` marks how the pipeline trains.

On a CPU with AVX-512 everything is then measured again as on a CPU without it (`instructions`), which shows what a
laptop does, as far as that depends on its instructions.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import INSTRUCTIONS, PROVENANCE, announced, instructions_of, machine_row, out_path, parser, rows_with
from timing import Measured, measure
from variants import NANO, OURS, PEER, Variant, read_request, stacked_variant

from mup_moe.files import write_csv
from mup_moe.training.request import TrainingRequest

COLUMNS = (
    *("system", "architecture", "width", "experts", "granularity", "top_k", "replicas", "precision", "step"),
    *(
        "allocator",
        "instructions",
        "experts_implementation",
        "attention",
        "default",
        "parameters",
        "active_parameters",
        "flops_per_token",
    ),
    *("tokens_per_second", "gflops", "matmul_gflops", "fraction_of_matmul", "ratio", "ratio_same_allocator"),
    *("compile_seconds", "cached_compile_seconds", "run_steps", "tokens_per_second_of_run", "ratio_of_run"),
    "goal_ratio_of_run",
    *PROVENANCE,
)


GOALS = {32: 1.8, 64: 1.5, 128: 1.8}
"""Goals for `ratio_of_run` of our MoE, by width, on one CPU thread."""


def variants_of(
    base: TrainingRequest, device: str, shape: dict[str, Any], compiling: bool, nano_compiling: bool = False
) -> list[Variant]:
    """Returns our variants, the default first, and those of the peers, at one shape; each once."""
    # If the default is float32 or one replica, some of our variants coincide.
    return list(dict.fromkeys(_variants_of(base, device, shape, compiling, nano_compiling)))


def _variants_of(
    base: TrainingRequest, device: str, shape: dict[str, Any], compiling: bool, nano_compiling: bool
) -> Iterator[Variant]:
    default = stacked_variant(base, device, **shape)
    alone = replace(default, replicas=1)
    yield from (default, alone)
    steps = ["eager", *(["compiled", *(["graph"] if device == "cuda" else [])] if compiling else [])]
    for step in steps:
        yield replace(default, step=step)
    yield from (replace(variant, precision="float32") for variant in (alone, default))
    yield replace(default, allocator="stock")
    dense = shape["architecture"] == "dense"
    grouped = "" if dense else "grouped_mm"
    peer = replace(alone, system=PEER, allocator="stock", experts_implementation=grouped, attention="sdpa")
    # Emulated bfloat16 is several times slower than float32, and measuring its matmul rate takes seconds.
    native = alone.precision == "bfloat16"
    for step in ("eager", "compiled") if compiling else ("eager",):
        for precision in ("float32", "bfloat16") if native else ("float32",):
            for allocator in ("stock", "kept"):
                yield replace(peer, precision=precision, step=step, allocator=allocator)
    eager = replace(peer, precision="float32", step="eager")
    yield replace(eager, attention="eager")
    if dense:
        nano = replace(peer, system=NANO, attention="")
        for precision in ("float32", "bfloat16") if native else ("float32",):
            for step in ("eager", "compiled") if compiling or nano_compiling else ("eager",):
                yield replace(nano, precision=precision, step=step)
    if native:
        yield replace(eager, precision="bfloat16-weights")
    if not dense:
        yield replace(eager, experts_implementation="eager")


def best_peer(results: Sequence[Measured], allocator: str, steps: int | None = None) -> Measured | None:
    """Returns the fastest peer in an environment, among those that keep float32 weights.

    steps: of a run that includes compilation; None compares without compilation.
    """
    peers = [r for r in results if r.variant.system == PEER and r.variant.allocator == allocator]
    peers = [r for r in peers if not r.variant.precision.endswith("-weights")]
    return max(peers, key=lambda r: r.rate if steps is None else r.rate_over(steps), default=None)


def rows_of(base: TrainingRequest, default: Variant, results: Sequence[Measured], steps: int) -> Iterator[list[Any]]:
    """Yields a row for each variant of a shape, without the provenance."""
    stock, kept = best_peer(results, "stock"), best_peer(results, "kept")
    run = best_peer(results, "stock", steps)
    for result in results:
        variant = result.variant
        instructions = torch.backends.cpu.get_cpu_capability() if variant.device == "cpu" else None
        ours = variant.system == OURS and variant.architecture == "moe" and variant.device == "cpu"
        yield [
            *(variant.system, variant.architecture, variant.width, variant.experts, variant.granularity),
            1 if variant.architecture == "dense" else base.model.top_k * variant.granularity,
            *(variant.replicas, variant.precision, variant.step, variant.allocator, instructions),
            *(variant.experts_implementation, variant.attention, "yes" if variant == default else "no"),
            *(result.sizes.parameters, result.sizes.active_parameters, result.sizes.flops_per_token),
            *(round(result.rate), round(result.gflops, 1), round(result.matmul_gflops, 1)),
            round(result.fraction_of_matmul, 3),
            *(round(result.ratio(peer), 3) if peer is not None else None for peer in (stock, kept)),
            *(round(result.compile_seconds, 1), round(result.cached_compile_seconds, 1), steps),
            *(round(result.rate_over(steps)), round(result.ratio(run, steps), 3) if run is not None else None),
            GOALS.get(variant.width) if ours else None,
        ]


def main() -> None:
    """Measures each shape and writes a row for each variant."""
    options = parser(__doc__, "step")
    options.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    options.add_argument("--architectures", nargs="+", choices=["moe", "dense"], default=["moe", "dense"])
    options.add_argument("--seconds", type=float, default=3.0, help="training time per variant")
    options.add_argument("--steps", type=int, default=6300, help="length of the run that compilation is spread over")
    options.add_argument("--no-compile", action="store_true", help="leave compiled variants out")
    help_compiled = "widths of MoE at which compiled variants are measured too; on a GPU, all of them"
    options.add_argument("--compiled-widths", nargs="*", type=int, default=[32, 64], help=help_compiled)
    help_instructions = "instruction sets of the CPU (default: native, and avx2 if the CPU has more)"
    options.add_argument("--instructions", nargs="+", choices=list(INSTRUCTIONS), help=help_instructions)
    arguments = options.parse_args()
    out = out_path(arguments, "step")
    table: list[list[Any]] = []
    for instructions in arguments.instructions or instructions_of(arguments.device):
        if instructions == "native":
            table += _rows(arguments, out, table)
        else:
            table += rows_with(instructions, __file__)
    if not any(row[0] == OURS for row in table):
        sys.exit("none of our variants could be measured: see the reasons above")
    write_csv(out, COLUMNS, table)


def _rows(arguments: argparse.Namespace, out: Path, before: list[list[Any]]) -> list[list[Any]]:
    """Measures each shape in this process and its workers."""
    base, device = read_request(arguments.request), arguments.device
    rows: list[list[Any]] = []
    for architecture in arguments.architectures:
        for width in arguments.widths:
            shape = {"architecture": architecture, "width": width}
            shape["experts"] = base.cell.experts if architecture == "moe" else 1
            compiled = not arguments.no_compile and (device == "cuda" or width in arguments.compiled_widths)
            compiling = compiled and (device == "cuda" or architecture == "moe")
            variants = variants_of(base, device, shape, compiling, nano_compiling=compiled)
            with announced(f"{architecture}, width {width}"):
                results = measure(variants, base, threads=arguments.threads, seconds=arguments.seconds)
            for row in rows_of(base, variants[0], results, arguments.steps):
                rows.append(row + machine_row(device, arguments.threads))
                _show(dict(zip(COLUMNS, rows[-1], strict=True)))
            # Keep what has been measured so far, in case a later shape fails.
            write_csv(out, COLUMNS, [*before, *rows])
    return rows


def _show(row: dict[str, Any]) -> None:
    how = " ".join(
        str(row[name]) for name in ("replicas", "precision", "step", "experts_implementation", "attention") if row[name]
    )
    print(
        f"{row['architecture']:5} {row['width']:4} {row['system']:12} {how:36} {row['allocator']:5}"
        f" {row['tokens_per_second']:9,} tokens/s, {row['fraction_of_matmul']:4.0%} of matmul,"
        f" {row['ratio'] or 0:.2f}x the best peer, {row['ratio_of_run'] or 0:.2f}x with compilation"
        f" ({row['compile_seconds']:.0f} s)",
        flush=True,
    )


if __name__ == "__main__":
    main()
