"""The state of a whole sweep as a value, and an estimate of the time left from the rate of its cells."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from mup_moe.config.cell import Cell
from mup_moe.files import UserError, is_held
from mup_moe.ops.cell_folder import Result
from mup_moe.ops.progress.forecast import makespan
from mup_moe.ops.status.survey import CellStatus, State, corpus_state, survey
from mup_moe.sweep import Sweep

if TYPE_CHECKING:
    from mup_moe.ops.status.costs import Costs


@dataclass(frozen=True)
class TimeLeft:
    """The time that a sweep still needs.

    device_seconds: seconds of one process (on a CPU or a GPU), summed over the unfinished cells; None if unknown.
    processes: how many are training now. seconds: the time that they need; None if there are none. basis: what the
    estimate is based on, or why there is none.
    """

    device_seconds: float | None
    processes: int
    seconds: float | None
    basis: str


class SweepStatus:
    """The state of figures and of what they need.

    snakemake: whether a Snakemake is running in the folder `results`. corpora: name -> its state in words. probes:
    name -> whether it is measured.
    """

    def __init__(
        self,
        sweep: Sweep,
        figures: Mapping[str, Sequence[Cell]],
        probes: Collection[str],
        benchmark: Path,
        now: float,
    ) -> None:
        """Reads the results. benchmark: the training-step benchmark. now: seconds since the epoch."""
        self.results, self.figures, every = sweep.results, figures, list(chain.from_iterable(figures.values()))
        self.snakemake = is_held(sweep.results)
        corpora = dict.fromkeys([*map(sweep.corpus, every), *map(sweep.probe_corpus, probes)])
        self.corpora = {corpus: corpus_state(corpus, sweep.results) for corpus in corpora}
        self.probes = {name: sweep.probe_values(name).exists() for name in probes}
        self.cells = {status.cell: status for status in survey(sweep, every, now)}
        self.time_left = time_left(sweep, list(self.cells.values()), benchmark)

    def count(self, cells: Iterable[Cell]) -> dict[str, int]:
        """Counts these cells by state; every state has an entry."""
        counts = Counter(self.cells[cell].state for cell in cells)
        return {state.value: counts[state] for state in State}

    def log_of(self, cell: CellStatus) -> Path:
        """Returns the log file of a cell's job."""
        return self.results / "logs" / "train" / f"{cell.job}.log"

    def as_json(self) -> dict[str, Any]:
        """Returns everything as plain data for JSON."""
        shown_in: dict[Cell, list[str]] = {cell: [] for cell in self.cells}
        for name, shown in self.figures.items():
            for cell in shown:
                shown_in[cell].append(name)
        return {
            "snakemake": self.snakemake,
            "corpora": self.corpora,
            "probes": self.probes,
            "figures": {name: self.count(cells) for name, cells in self.figures.items()},
            "total": self.count(self.cells),
            "time_left": asdict(self.time_left),
            "cells": {
                cell.id: {
                    **{name: getattr(status, name) for name in ("state", "job", "step", "steps", "reason", "age")},
                    "figures": shown_in[cell],
                    "log": str(self.log_of(status)),
                    "heartbeat": status.heartbeat and asdict(status.heartbeat),
                }
                for cell, status in self.cells.items()
            },
        }


def time_left(sweep: Sweep, cells: Sequence[CellStatus], benchmark: Path) -> TimeLeft:
    """Estimates the time that these cells still need. benchmark: of the training step, to compare widths."""
    running = [cell for cell in cells if cell.state is State.RUNNING]
    processes = len({(beat.host, beat.pid) for cell in running if (beat := cell.heartbeat)})
    left = [cell for cell in cells if cell.result is None]
    if not left:
        return TimeLeft(0.0, processes, None, "every cell has a result")
    # Import late: this import is slow, and not needed once everything is done.
    from mup_moe.ops.status.costs import Costs

    try:
        costs = Costs.of(sweep, [status.cell for status in left], benchmark)
        pace, basis = _pace(cells, costs, sweep.cells)
    except UserError as error:
        return TimeLeft(None, processes, None, str(error))
    work = [
        (status, (status.steps - status.step) * costs.seconds_of_step(status.cell) * pace(status.cell.width))
        for status in left
    ]
    seconds = _seconds(work, processes) if processes else None
    return TimeLeft(sum(seconds for _, seconds in work), processes, seconds, basis)


def _seconds(work: Iterable[tuple[CellStatus, float]], processes: int) -> float:
    """Returns the seconds until these processes finish all jobs. work: unfinished cells and the seconds of each."""
    jobs: dict[str, list[tuple[CellStatus, float]]] = {}
    for cell, seconds in work:
        jobs.setdefault(cell.job, []).append((cell, seconds))
    running: list[float] = []
    waiting: list[float] = []
    for together in jobs.values():
        # Cells that are trained together end together; the other cells of their job come afterwards.
        at_once = {
            (beat.host, beat.pid): (cell.steps - cell.step) / rate
            for cell, _ in together
            if (rate := _rate(cell)) and (beat := cell.heartbeat)
        }
        after = sum(seconds for cell, seconds in together if _rate(cell) is None)
        is_running = any(cell.state is State.RUNNING for cell, _ in together)
        (running if is_running else waiting).append(sum(at_once.values()) + after)
    return makespan(running, waiting, processes)


def _rate(cell: CellStatus) -> float | None:
    """Returns the steps per second of a running cell, if its heartbeat has a rate."""
    return cell.heartbeat.steps_per_second if cell.state is State.RUNNING and cell.heartbeat else None


def _pace(cells: Sequence[CellStatus], costs: "Costs", folder: Path) -> tuple[Callable[[int], float], str]:
    """Returns, by width, actual seconds per estimated second, and the basis of that ratio. Raises UserError."""
    done = _by_width((of.width, costs.seconds(flops, of), took) for of, flops, took in _results(cells, folder))
    running = _by_width(
        (cell.cell.width, costs.seconds_of_step(cell.cell) * cell.heartbeat.together * rate, 1.0)
        for cell in cells
        if cell.heartbeat and (rate := _rate(cell))
    )
    paces = running | done
    if paces:
        nearest = cache(lambda width: min(paces, key=lambda known: abs(math.log2(known / width))))
        return lambda width: paces[nearest(width)], "from the rate of this sweep so far"
    if isinstance(costs.machine, UserError):
        raise UserError(f"no cell of this sweep has been timed yet, and {costs.machine}")
    name = costs.machine.name
    return lambda _: 1.0, f"from a benchmark of {name}, because no cell of this sweep has been timed yet"


def _results(cells: Iterable[CellStatus], folder: Path) -> list[tuple[Cell, float, float]]:
    """Returns the cell, FLOPs and seconds of every result from the same device as the newest result."""
    measured: list[tuple[float, Any, tuple[Cell, float, float]]] = []
    for status in cells:
        summary = status.result or {}
        flops, seconds = summary.get("flops"), summary.get("wall_seconds")
        if _is_positive(flops) and _is_positive(seconds):
            with suppress(FileNotFoundError):  # the user has just deleted it
                made = Result(folder / status.cell.id).kept_files[1].stat().st_mtime
                measured.append((made, summary.get("device"), (status.cell, float(flops), float(seconds))))
    _, device, _ = max(measured, key=lambda one: one[0], default=(0.0, None, None))
    return [one for _, on, one in measured if on == device]


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < math.inf


def _by_width(measured: Iterable[tuple[int, float, float]]) -> dict[int, float]:
    """Returns the pace at each width, given the width, estimated seconds and actual seconds of each measurement."""
    totals: dict[int, tuple[float, float]] = {}
    for width, expected, seconds in measured:
        before = totals.get(width, (0.0, 0.0))
        totals[width] = before[0] + expected, before[1] + seconds
    return {width: seconds / expected for width, (expected, seconds) in totals.items()}
