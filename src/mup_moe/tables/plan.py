"""Estimates the cost of the sweep before any of it runs: python -m mup_moe plan.

Counts come from the inventory of tensors, hours from a benchmark of the training step, and sizes on disk from
measurements of finished runs. Needs neither tokens nor cells.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from mup_moe.analysis.markup import markdown_table, markdown_text
from mup_moe.analysis.pages import write_page
from mup_moe.analysis.sensitivity import measured, seen
from mup_moe.config.cell import Cell
from mup_moe.config.optimizers import OPTIMIZERS
from mup_moe.config.settings import CorpusSettings, FigureSettings, SetupSettings
from mup_moe.data.corpus import vocabulary_of
from mup_moe.data.documents import source_files
from mup_moe.data.tokens import dtype_for
from mup_moe.figures.plotting import EngFormatter
from mup_moe.files import write_csv
from mup_moe.model.inventory import ModelSize, size_of
from mup_moe.options import add_config_arguments, read_sweep
from mup_moe.sweep import Sweep
from mup_moe.tables.machine import START_SECONDS, Machine

HISTORY_BYTES = 92  # a row of history.csv, as runs of 300 and 25,000 steps write it
SUMMARY_BYTES = 3_000
COPIES = 2  # a cell's result and its kept copy
# Bytes of text per token: for a tokenizer trained on its own corpus, by vocabulary (measured on Python
# source); for GPT-2's on English web text (assumed: The Pile's share of Common Crawl has about 4.4).
_BPE_VOCABULARY = (300, 512, 1024, 2048, 8192, 32768)
_BPE_BYTES = (1.45, 2.03, 2.55, 3.01, 3.72, 4.03)
_GPT2_BYTES = 4.4
_PACKED = {".gz": 2.5, ".parquet": 2.0}  # approximate bytes of text per byte of file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `plan`."""
    add_config_arguments(parser)
    help_benchmark = (
        "the table that benchmarks/step.py wrote on the machine that will train; default: the one in the checkout"
    )
    parser.add_argument("--benchmark", type=Path, metavar="CSV", help=help_benchmark)


def run(arguments: argparse.Namespace) -> None:
    """Writes plan.csv, .md and .html, and prints the table. Raises UserError."""
    sweep = read_sweep(arguments)
    machine = Machine.read(arguments.benchmark or sweep.benchmark())
    rows, out = plan(sweep, machine), sweep.results / "plan"
    write_csv(out.with_suffix(".csv"), [*PlanRow._fields, "machine"], ([*row, machine.name] for row in rows))
    shown = [_shown(row) for row in rows]
    notes = [f"The config: {sweep.layers}.", *_notes(rows, machine), *_sights(sweep)]
    table = markdown_table(HEADINGS, ([markdown_text(cell) for cell in line] for line in shown))
    write_page(out, "\n".join([table, *(f"- {markdown_text(note)}" for note in notes), ""]))
    print(pd.DataFrame(shown, columns=list(HEADINGS)).to_string(index=False), *notes, sep="\n")


class PlanRow(NamedTuple):
    """The bill of one corpus, figure or probe, or the total. Sizes are those of its largest model.

    None marks fields that do not apply to the row. new_cells: cells that no row above has; the total counts each cell
    once. device_hours: of one CPU thread or GPU. disk_bytes: what remains after the sweep. checkpoint_bytes: for each
    running cell of the largest model. flops_at_base, flops_at_target: the cost of one panel's learning rates and seeds
    at the base width and at the largest width. saving: their ratio, the factor that tuning at the base width saves.
    """

    kind: str
    sweep: str
    setup: str | None = None
    cells: int | None = None
    new_cells: int | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    tokens_per_cell: int | None = None
    tokens: int | None = None
    flops: int | None = None
    device_hours: float | None = None
    disk_bytes: int | None = None
    checkpoint_bytes: int | None = None
    flops_at_base: int | None = None
    flops_at_target: int | None = None
    saving: float | None = None


HEADINGS = (
    *("Sweep", "Set-up", "Cells", "New", "Parameters", "Active", "Tokens a cell", "Tokens"),
    *("FLOPs", "Hours", "Disk", "Checkpoint", "Saving"),
)


@dataclass(frozen=True)
class _Bill:
    """The cost of one cell."""

    size: ModelSize
    tokens: int
    flops: int
    seconds: float
    disk_bytes: int


def plan(sweep: Sweep, machine: Machine) -> list[PlanRow]:
    """Returns a row per corpus in use, per figure and per probe, and the total. Raises UserError."""
    config = sweep.config
    rows = [_corpus_row(name, config.corpora[name]) for name in sweep.corpora]
    known: dict[str, _Bill] = {}
    # The cells of a job share the cost of starting its process.
    starts = {cell: START_SECONDS / len(cells) for cells in sweep.jobs.values() for cell in cells}
    for name, figure in config.figures.items():
        setup = config.setups[figure.setup]
        disk_bytes = COPIES * (HISTORY_BYTES * setup.training.steps + SUMMARY_BYTES)
        bills = {
            cell.id: _bill(sweep, machine, cell, setup.tokens_per_run, starts[cell], disk_bytes)
            for cell in sweep.figures[name]
        }
        rows.append(_of_figure(_row("figure", name, figure.setup, bills, known), figure, setup, bills))
        known |= bills
    for name, probe in config.probes.items():
        # In addition to the steps, each measurement runs forward and backward once; one job has all models.
        tokens = (probe.steps[-1] + len(probe.steps)) * config.setups[probe.setup].tokens_per_step
        start = START_SECONDS / len(probe.cells())
        updates = probe.steps[-1]
        bills = {f"{name}/{cell.id}": _bill(sweep, machine, cell, tokens, start, 0, updates) for cell in probe.cells()}
        rows.append(_row("probe", name, probe.setup, bills, known))
        known |= bills
    total = _row("total", "total", None, known, {})
    of_corpora = sum(row.disk_bytes or 0 for row in rows if row.kind == "corpus")
    return [
        *rows,
        total._replace(
            tokens_per_cell=None,
            disk_bytes=of_corpora + (total.disk_bytes or 0),
            checkpoint_bytes=max(row.checkpoint_bytes or 0 for row in rows),
        ),
    ]


def _corpus_row(name: str, corpus: CorpusSettings) -> PlanRow:
    bytes_per_token = _GPT2_BYTES
    if corpus.vocabulary is not None:
        bytes_per_token = float(np.interp(np.log2(corpus.vocabulary), np.log2(_BPE_VOCABULARY), _BPE_BYTES))
    tokens = round(_text_bytes(corpus) / bytes_per_token)
    item = dtype_for(vocabulary_of(corpus)).itemsize
    return PlanRow(kind="corpus", sweep=name, tokens=tokens, disk_bytes=tokens * item)


def _text_bytes(corpus: CorpusSettings) -> float:
    """Estimates the bytes of text of a corpus: the smaller of its bound and its files."""
    bound = float("inf") if corpus.max_bytes is None else corpus.max_bytes
    if corpus.source == "c4" and not corpus.files:
        return bound
    return min(bound, sum(path.stat().st_size * _PACKED.get(path.suffix, 1.0) for path in source_files(corpus)))


def _bill(
    sweep: Sweep, machine: Machine, cell: Cell, tokens: int, start: float, disk_bytes: int, updates: int = 0
) -> _Bill:
    """Returns the bill of a cell. updates: the number of steps with fewer tokens than in the benchmark."""
    setup = sweep.config.setups[cell.setup]
    size = size_of(cell, setup.model, sweep.vocabulary(setup.corpus), sweep.config.architecture(cell))
    flops = tokens * size.flops_per_token
    seconds = (
        start + machine.seconds(flops, cell.width, cell.architecture) + machine.update_seconds(size.parameters, updates)
    )
    return _Bill(size, tokens, flops, seconds, disk_bytes)


def _row(kind: str, name: str, setup: str | None, bills: Mapping[str, _Bill], known: Mapping[str, _Bill]) -> PlanRow:
    every = bills.values()
    largest = max(every, key=lambda bill: bill.size.parameters)
    return PlanRow(
        kind=kind,
        sweep=name,
        setup=setup,
        cells=len(every),
        new_cells=len(bills.keys() - known.keys()),
        parameters=largest.size.parameters,
        active_parameters=max(bill.size.active_parameters for bill in every),
        tokens_per_cell=largest.tokens,
        tokens=sum(bill.tokens for bill in every),
        flops=sum(bill.flops for bill in every),
        device_hours=sum(bill.seconds for bill in every) / 3600,
        disk_bytes=sum(bill.disk_bytes for bill in every),
    )


def _of_figure(row: PlanRow, figure: FigureSettings, setup: SetupSettings, bills: Mapping[str, _Bill]) -> PlanRow:
    """Adds the checkpoint size, and the FLOPs of one panel at the base width and at the largest width, to a row."""
    row = row._replace(
        checkpoint_bytes=OPTIMIZERS[setup.training.optimizer].bytes_per_parameter * (row.parameters or 0)
    )
    if figure.curve != "width":
        return row
    panel = getattr(figure.axes, figure.panel)[0]
    base, target = (
        sum(
            bills[cell.id].flops
            for cell in figure.cells()
            if cell.width == width and getattr(cell, figure.panel) == panel
        )
        for width in (setup.model.base_width, max(figure.axes.width))
    )
    return row._replace(flops_at_base=base, flops_at_target=target, saving=target / base if base and target else None)


def _shown(row: PlanRow) -> list[str]:
    """Formats a row for readers (HEADINGS)."""

    def with_prefix(value: int | None, unit: str = "") -> str:
        return "" if value is None else EngFormatter(unit, places=1)(value)

    return [
        f"corpus {row.sweep}" if row.kind == "corpus" else row.sweep,
        row.setup or "",
        "" if row.cells is None else f"{row.cells:,}",
        "" if row.new_cells is None else f"{row.new_cells:,}",
        *map(with_prefix, (row.parameters, row.active_parameters, row.tokens_per_cell, row.tokens, row.flops)),
        "" if row.device_hours is None else f"{row.device_hours:,.2f}",
        with_prefix(row.disk_bytes, "B"),
        with_prefix(row.checkpoint_bytes, "B"),
        "" if row.saving is None else f"{row.saving:.1f}x",
    ]


def _sights(sweep: Sweep) -> Iterator[str]:
    """Says which groups of roles each figure over widths can see, if that has been measured."""
    known, margin = measured(sweep.sensitivities()), sweep.config.claims.excess_margin
    for name, figure in sweep.config.figures.items():
        if figure.curve != "width" or figure.kind == "sensitivity" or figure.axes.architecture != ("moe",):
            continue
        base = sweep.config.setups[figure.setup].model.base_width
        octaves = math.log2(max(figure.axes.width) / base)
        rows = [row for row in known.get(sweep.setup_digest(figure.setup), []) if row.width == base]
        if rows:
            yield f"{name}, {octaves:g} octaves of width, {seen(rows, octaves, margin)} ({margin:g} nats or more)."
        else:
            yield (
                f"{name}: which roles it can see is not measured for the set-up {figure.setup}: a figure of kind"
                " sensitivity measures it."
            )


def _notes(rows: Iterable[PlanRow], machine: Machine) -> list[str]:
    """Explains the numbers of the table in sentences."""
    low, high = machine.width[[0, -1]].astype(int)
    notes = [
        f"Hours: on one {machine.name}, the device that benchmarks/ has measured, at widths {low} to {high} (beyond"
        f" them at the rate of the nearest width), plus {START_SECONDS} s to start each job. Divide by the number of"
        " jobs that run at once. On another device, divide the FLOPs by its rate instead.",
        "Disk: tokens and results, which are kept. Checkpoint: of the largest cell. Each running cell has two, and"
        " three while one is written.",
        "New: cells that are not trained yet. Total: every cell once, also if figures share it; its parameters are"
        " those of the largest model.",
    ]
    return notes + [
        f"muTransfer in {row.sweep}: tuning the learning rate of one parametrization costs"
        f" {row.flops_at_base:.2g} FLOPs at the base width and {row.flops_at_target:.2g} at the largest,"
        f" {row.saving:.1f} times as many."
        for row in rows
        if row.saving is not None
    ]
