"""What the cells of a run will cost, told to the Snakemake that runs it, which has no torch; when jobs will be done.

A request, one line of JSON, comes by standard input, and the answer goes to standard output.
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
    """step: that a cell goes on from, of `steps`. seconds_of_step: of one process, this cell's share."""

    step: int
    steps: int
    seconds_of_step: float


@dataclass(frozen=True)
class Forecast:
    """cells: by their ids. start_seconds: of a job. is_measured: whether seconds are a benchmark's, or only ratios."""

    cells: Mapping[str, CellForecast]
    start_seconds: float
    is_measured: bool


def makespan(running: Sequence[float], waiting: Iterable[float], processes: int) -> float:
    """Seconds until all jobs are done. running, waiting: the seconds that each still takes.

    Whenever a process is free, the longest job that waits begins, as the widest does under Snakemake. At
    least as many processes run as there are running jobs.
    """
    ends = [*running, *[0.0] * (processes - len(running))]
    heapq.heapify(ends)
    for seconds in sorted(waiting, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends, default=0.0)


def duration(seconds: float) -> str:
    """Seconds as people say them: about."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def ask_forecast(document: Any, cells: Collection[str], results: Path, benchmark: Path) -> Forecast | None:
    """The forecast of these cells, from a process of its own; None where none can be made.

    document: the whole config. benchmark: of the training step. The process ends with this one.
    """
    request = {"document": document, "cells": list(cells), "results": str(results), "benchmark": str(benchmark)}
    try:
        with subprocess.Popen(
            # -P: nothing of the working folder is imported.
            [sys.executable, "-P", "-m", "mup_moe.ops.progress.forecast"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps(request), file=process.stdin, flush=True)
            told = json.loads(process.stdout.read())
    except (OSError, ValueError):
        return None
    return Forecast(**told | {"cells": {name: CellForecast(**of_cell) for name, of_cell in told["cells"].items()}})


def _answer(request: dict[str, Any]) -> Forecast:
    # Here, as the process that asks is to have none of it.
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


def _end_with_who_asks() -> None:
    # The pipe is closed when that process ends, however it does.
    sys.stdin.read()
    os._exit(_ABANDONED)


if __name__ == "__main__":
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_who_asks, daemon=True).start()
    print(json.dumps(asdict(_answer(request))), flush=True)
    os._exit(0)  # the thread that reads would hold up the interpreter's end
