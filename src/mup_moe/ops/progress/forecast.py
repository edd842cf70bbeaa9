"""Forecasts what the cells of a run will cost, in a separate process, so that Snakemake's needs no torch.

The process reads a request, one line of JSON, from standard input and writes the answer to standard output.
"""

import heapq
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ABANDONED = 3  # exit status


@dataclass(frozen=True)
class CellForecast:
    """A cell's forecast.

    step: where the cell resumes, of `steps`. seconds_of_step: this cell's share of a step of one process.
    """

    step: int
    steps: int
    seconds_of_step: float


@dataclass(frozen=True)
class Forecast:
    """A run's forecast.

    cells: by their ids. start_seconds: the start-up time of a job. is_measured: whether seconds come from a benchmark;
    if not, they are meaningful only relative to each other.
    """

    cells: Mapping[str, CellForecast]
    start_seconds: float
    is_measured: bool


def makespan(running: Sequence[float], waiting: Iterable[float], processes: int) -> float:
    """Returns the seconds until all jobs are done. running, waiting: the seconds that each job still needs.

    Whenever a process is free, the longest waiting job starts, as the widest one does under Snakemake. There are at
    least as many processes as running jobs.
    """
    ends = [*running, *[0.0] * (processes - len(running))]
    heapq.heapify(ends)
    for seconds in sorted(waiting, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends, default=0.0)


def duration(seconds: float) -> str:
    """Formats seconds for people, rounded."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def ask_forecast(document: Any, cells: Collection[str], results: Path, benchmark: Path) -> Forecast | None:
    """Returns the forecast of these cells, made in a child process; None if it fails.

    document: the whole config. benchmark: of the training step. The child ends when this process does.
    """
    request = {"document": document, "cells": list(cells), "results": str(results), "benchmark": str(benchmark)}
    try:
        with subprocess.Popen(
            # -P: import nothing from the working folder.
            [sys.executable, "-P", "-m", "mup_moe.ops.progress.forecast"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps(request), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.read())
    except (OSError, ValueError):
        return None
    return Forecast(**answer | {"cells": {name: CellForecast(**of_cell) for name, of_cell in answer["cells"].items()}})


def _answer(request: dict[str, Any]) -> Forecast:
    # Imported here, so that the parent process does not load any of it.
    from mup_moe.config.cell import Cell
    from mup_moe.config.load import validate
    from mup_moe.files import UserError
    from mup_moe.ops.status.costs import Costs
    from mup_moe.ops.status.survey import survey
    from mup_moe.sweep import Sweep
    from mup_moe.tables.machine import START_SECONDS

    sweep = Sweep(validate(request["document"]), Path(request["results"]))
    cells = [Cell.parse(name) for name in request["cells"]]
    costs = Costs.of(sweep, cells, Path(request["benchmark"]))
    forecasts = {
        status.cell.id: CellForecast(status.step, status.steps, costs.seconds_of_step(status.cell))
        for status in survey(sweep, cells, time.time())
    }
    return Forecast(forecasts, START_SECONDS, not isinstance(costs.machine, UserError))


def _exit_with_parent() -> None:
    # The pipe closes when the parent process ends, however it ends.
    sys.stdin.read()
    os._exit(_ABANDONED)


if __name__ == "__main__":
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    print(json.dumps(asdict(_answer(request))), flush=True)
    os._exit(0)  # the reading thread would delay the interpreter's exit
