"""Shows the state of a sweep, during or after the run, without changing any file: python -m mup_moe status.

It shows the last sweep that was run here, or the sweep of the preset and config files that you name.
"""

import argparse
import json
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path

from mup_moe.files import UserError
from mup_moe.ops.progress.forecast import duration
from mup_moe.ops.status.survey import CellStatus, State
from mup_moe.ops.status.sweep import SweepStatus, TimeLeft
from mup_moe.options import add_sweep_arguments, read_layers
from mup_moe.sweep import Sweep

# Limits that fit a screen; --json has everything.
_LONGEST_LIST, _LONGEST_REASON = 20, 500
_AGAIN = "the same snakemake command"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `status`."""
    add_sweep_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print everything that is known about every cell, as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Prints the state of the sweep. Raises UserError only for an error in the config or the options."""
    layers = read_layers(arguments)
    # A fresh checkout does not have the default folder.
    if arguments.results != Path("results") and not arguments.results.is_dir():
        raise UserError(
            f"--results is {arguments.results}, which is not a folder: name the one that Snakemake writes to"
        )
    sweep = Sweep(layers.config, arguments.results)
    # Probes belong to no figure, so they are listed only when no figures are named.
    probes = layers.config.probes if arguments.figures is None else {}
    # A run keeps its config outside of the checkout.
    benchmark = sweep.benchmark(Path() / "benchmarks" if layers.of_run else layers.base.parent / "benchmarks")
    status = SweepStatus(sweep, sweep.chosen(arguments.figures), probes, benchmark, time.time())
    print(json.dumps(status.as_json(), indent=2) if arguments.json else "\n".join(lines(status)))


def lines(status: SweepStatus) -> Iterator[str]:
    """Yields a table of the figures, details of single jobs, and the time left."""
    processes = status.time_left.processes
    training = f"{processes or 'no'} {_plural(processes, 'process is', 'processes are')} training cells"
    yield f"{'a' if status.snakemake else 'no'} Snakemake is running in {status.results}; {training}"
    yield from (f"corpus {name}: {state}" for name, state in status.corpora.items())
    yield from (f"probe {name}: {'' if done else 'not '}measured" for name, done in status.probes.items())
    yield ""
    yield from _table(status)
    yield from _list("running", [_running(group) for group in _jobs(status, State.RUNNING)])
    title = f"silent: killed or hanging; {_AGAIN} resumes them"
    yield from _list(title, [_silent(group) for group in _jobs(status, State.SILENT)])
    yield from _list("failed, with the logs", list(_failures(status)))
    title = f"interrupted: {_AGAIN} resumes them"
    yield from _list(title, [f"{group[0].job}: {_from_step(group)}" for group in _jobs(status, State.INTERRUPTED)])
    yield ""
    yield _time_left(status.time_left, status.snakemake)


def _table(status: SweepStatus) -> Iterator[str]:
    counts = {name: status.count(cells) for name, cells in status.figures.items()}
    counts["total"] = status.count(status.cells)  # counts cells that figures share once
    margin = max(map(len, counts))
    columns = ["cells", *State]
    yield "  ".join([" " * margin, *(f"{column:>5}" for column in columns)])
    for name, count in counts.items():
        row = {"cells": sum(count.values())} | count
        # A dash is easier to skip than a zero.
        yield "  ".join([f"{name:<{margin}}", *(f"{row[c] or '-':>{max(len(c), 5)}}" for c in columns)])


def _list(title: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        yield from ("", f"{title}:", *(f"  {item}" for item in _first(items)))


def _first(items: Sequence[str]) -> list[str]:
    more = len(items) - _LONGEST_LIST
    return [*items[:_LONGEST_LIST], f"and {more} more (listed by --json)"] if more > 0 else list(items)


def _grouped(status: SweepStatus, state: State, key: Callable[[CellStatus], Hashable]) -> list[list[CellStatus]]:
    """Groups the cells in a state by a key."""
    groups: dict[Hashable, list[CellStatus]] = {}
    for cell in status.cells.values():
        if cell.state is state:
            groups.setdefault(key(cell), []).append(cell)
    return list(groups.values())


def _jobs(status: SweepStatus, state: State) -> list[list[CellStatus]]:
    """Groups the cells in a state by the process that trains or trained them."""
    return _grouped(status, state, lambda c: (c.job, (beat := c.heartbeat) and (beat.host, beat.pid, beat.step)))


def _running(group: Sequence[CellStatus]) -> str:
    beat = group[0].heartbeat
    assert beat is not None  # a running cell has one
    rate = "" if beat.steps_per_second is None else f", {beat.steps_per_second:.3g} steps/s"
    return f"{group[0].job}: {_cells(group)} at step {beat.step} of {beat.steps}{rate}, {_where(group[0])}"


def _silent(group: Sequence[CellStatus]) -> str:
    age = duration(min(cell.age or 0.0 for cell in group))
    return f"{group[0].job}: no sign of life for {age}, {_where(group[0])}: {_from_step(group)}"


def _failures(status: SweepStatus) -> Iterator[str]:
    for cells in _grouped(status, State.FAILED, lambda cell: cell.reason):
        reason = cells[0].reason or ""
        shown = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
        logs = list(dict.fromkeys(str(status.log_of(cell)) for cell in cells))
        yield "\n    ".join([f"{_cells(cells)}: {shown}", *_first(logs)])


def _where(cell: CellStatus) -> str:
    beat = cell.heartbeat
    assert beat is not None
    return f"on {beat.host}, " + (f"process {beat.pid}" if beat.job is None else f"SLURM job {beat.job}")


def _from_step(cells: Sequence[CellStatus]) -> str:
    first, last = min(cell.step for cell in cells), max(cell.step for cell in cells)
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"{_cells(cells)} from {steps} of {cells[0].steps}"


def _cells(cells: Sequence[CellStatus]) -> str:
    return f"{len(cells)} {_plural(len(cells), 'cell', 'cells')}"


def _plural(count: int, one: str, several: str) -> str:
    return one if count == 1 else several


def _time_left(left: TimeLeft, snakemake: bool) -> str:
    if left.device_seconds is None:
        return f"time left: unknown: {left.basis}"
    if left.device_seconds == 0.0:
        return f"time left: none: {left.basis}"
    work = f"{left.device_seconds / 3600:.3g} device-hours"
    if left.seconds is not None:
        by = f"{left.processes} {_plural(left.processes, 'process', 'processes')}"
        return f"time left: about {duration(left.seconds)}: {work} by {by}, {left.basis}"
    start = (
        "no cell is being trained at the moment"
        if snakemake
        else f"nothing is running: rerun {_AGAIN}, or ask for the figures that are missing"
    )
    return f"time left: {work}, {left.basis}; {start}"
