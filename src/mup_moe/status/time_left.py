"""How long the rest of a sweep will take, by what its own cells took."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from mup_moe.config.cell import Cell
from mup_moe.config.settings import Config
from mup_moe.data.tokens import Tokens
from mup_moe.data.vocabulary import vocabulary_of
from mup_moe.files import UserError
from mup_moe.status.survey import CellStatus, State
from mup_moe.training.result import Result

# FLOPs and the width of their model -> seconds of a process.
_Speed: TypeAlias = Callable[[int, int], float]


@dataclass(frozen=True)
class TimeLeft:
    """What a sweep still takes.

    device_seconds: of one process (a CPU's, or a GPU's), summed over the cells that are left; None where
    nothing tells. processes: that train now. seconds: by them; None if there are none. basis: what it
    rests on, or why it is not known.
    """

    device_seconds: float | None
    processes: int
    seconds: float | None
    basis: str


def time_left(config: Config, cells: Sequence[CellStatus], results: Path, benchmark: Path) -> TimeLeft:
    """What these cells still take. benchmark: of the training step, for where no cell has begun."""
    running = [cell for cell in cells if cell.state is State.RUNNING]
    processes = len({(beat.host, beat.pid) for cell in running if (beat := cell.heartbeat)})
    left = [cell for cell in cells if cell.is_left]
    if not left:
        return TimeLeft(0.0, processes, None, "every cell has a result")
    try:
        flops = _flops_of_step(config, left, results / "data")
        speed, basis = _speed(cells, flops, results, benchmark)
    except UserError as error:
        return TimeLeft(None, processes, None, str(error))
    total = sum(speed((status.steps - status.step) * flops[status.cell], status.cell.width) for status in left)
    # One goes on alone when the others are done.
    longest = max(((cell.steps - cell.step) / rate for cell in running if (rate := _rate(cell))), default=0.0)
    return TimeLeft(total, processes, max(total / processes, longest) if processes else None, basis)


def _rate(cell: CellStatus) -> float | None:
    """Steps per second of a cell that runs, if it has told."""
    return cell.heartbeat.steps_per_second if cell.state is State.RUNNING and cell.heartbeat else None


def _flops_of_step(config: Config, cells: Sequence[CellStatus], data: Path) -> dict[Cell, int]:
    """The FLOPs of one step of each cell. Raises UserError where a tokenizer's files cannot be read."""
    # Torch is slow to import, and needless once everything is done.
    from mup_moe.analysis.cost import size_of, tokens_of_step

    vocabulary = {name: _vocabulary(config, name, data) for name in {config.setups[c.cell.setup].corpus for c in cells}}
    flops = {}
    for cell in (status.cell for status in cells):
        setup = config.setups[cell.setup]
        flops[cell] = tokens_of_step(setup) * size_of(cell, setup.model, vocabulary[setup.corpus]).flops_per_token
    return flops


def _vocabulary(config: Config, corpus: str, data: Path) -> int:
    try:
        return Tokens.open(data / corpus).vocabulary
    except (UserError, OSError):
        return vocabulary_of(config.corpora[corpus])


def _speed(
    cells: Sequence[CellStatus], flops_of_step: dict[Cell, int], results: Path, benchmark: Path
) -> tuple[_Speed, str]:
    """How fast training is, and how that is known. Raises UserError where it is not."""
    done = _by_width(_measured_by_results(cells, results))
    running = _by_width(
        (cell.cell.width, flops_of_step[cell.cell] * cell.heartbeat.together * rate, 1.0)
        for cell in cells
        if cell.heartbeat and (rate := _rate(cell))
    )
    rates = running | done
    if not rates:
        from mup_moe.analysis.plan import Machine

        try:
            machine = Machine.read(benchmark)
        except UserError as error:
            raise UserError(f"no cell of this sweep tells yet, and {error}") from None
        return machine.seconds, f"by a benchmark of {machine.name}, as none of this sweep is measured yet"

    def seconds(flops: int, width: int) -> float:
        nearest = min(rates, key=lambda known: abs(math.log2(known / width)))
        return flops / rates[nearest]

    return seconds, "by the rate of this sweep so far"


def _measured_by_results(cells: Iterable[CellStatus], results: Path) -> list[tuple[int, float, float]]:
    """Width, FLOPs and seconds of every result from the device that the newest of them is from."""
    measured: list[tuple[float, Any, tuple[int, float, float]]] = []
    for status in cells:
        told = status.result or {}
        flops, seconds = told.get("flops"), told.get("wall_seconds")
        if _is_positive(flops) and _is_positive(seconds):
            with suppress(FileNotFoundError):  # somebody deletes it
                made = Result(results / "cells" / status.cell.id).kept_files[1].stat().st_mtime
                measured.append((made, told.get("device"), (status.cell.width, float(flops), float(seconds))))
    if not measured:
        return []
    _, device, _ = max(measured, key=lambda one: one[0])
    return [one for _, on, one in measured if on == device]


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and 0 < value < math.inf


def _by_width(measured: Iterable[tuple[int, float, float]]) -> dict[int, float]:
    """FLOPs per second of a process at each width, from width, FLOPs and seconds of each measurement."""
    totals: dict[int, tuple[float, float]] = {}
    for width, flops, seconds in measured:
        before = totals.get(width, (0.0, 0.0))
        totals[width] = before[0] + flops, before[1] + seconds
    return {width: flops / seconds for width, (flops, seconds) in totals.items()}
