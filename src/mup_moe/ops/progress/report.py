"""How much of a sweep is done and how long the rest will take, told while it runs."""

import atexit
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mup_moe.ops.cell_folder import SUMMARY
from mup_moe.ops.progress.forecast import Forecast, ask_forecast, duration
from mup_moe.ops.progress.watch import RunWatch, Standing

# Between two lines, and between two looks at the files, which are to cost no more than so much of the time.
_LINE_SECONDS, _LOOK_SECONDS, _LOOK_SHARE = 15.0, 5.0, 0.05
# A run that is over by then needs no forecast, which costs seconds of a processor.
_SHORT_SECONDS = 8.0
# Of a line, and of the figures' names in it.
_COLUMNS, _NAMES = 99, 32


def line(standing: Standing, elapsed: float, tokenizing: bool = False) -> str:
    """One line of progress: the figures being made, a bar of the work, cells done, time spent and left.

    tokenizing: whether tokens are made first; until a cell begins the line then says that. elapsed: seconds.
    """
    names = ", ".join(standing.figures)
    if len(names) > _NAMES:
        names = f"{names[: _NAMES - 3]}..."
    has_begun = bool(standing.cells or standing.figures or standing.failed)
    doing = names or ("training" if has_begun else "tokenizing" if tokenizing else "waiting")
    told = [f"{tqdm.format_interval(elapsed)} spent"]
    if standing.seconds_left and (has_begun or not tokenizing):
        told.append(f"about {duration(standing.seconds_left)} left")
    if standing.failed:
        told.append(f"{standing.failed} failed")
    text: str = tqdm.format_meter(
        int(100 * standing.share + 1e-9),  # all of it only when all is done
        100,
        elapsed,
        prefix=doing,
        ncols=_COLUMNS,
        ascii=True,
        bar_format=f"{{l_bar}}{{bar}}| {standing.cells}/{standing.total} cells [{', '.join(told)}]",
    )
    return text


def report_progress(
    document: Any,
    outputs: Sequence[Iterable[str]],
    figures: Mapping[str, Collection[str]],
    *,
    benchmark: Path,
    processes: int | None,
    tokenizing: bool,
    keep_going: bool,
    results: Path = Path("results"),
) -> None:
    """Prints a line to stderr now and then, while there is news, until the caller's process ends.

    Runs beside the caller, in a thread that dies with it. document: the whole config. outputs: the files of
    each job, of which the summaries of cells count. figures: cells by figure; the first that has a cell names
    it. benchmark: of the training step. processes: how many jobs run at once; None: only that shows.
    tokenizing: whether tokens are made first. keep_going: whether others begin once a job has failed.
    """
    jobs = [[path.parent.name for path in map(Path, job) if path.name == SUMMARY] for job in outputs]
    if any(jobs):
        watch = RunWatch(list(filter(None, jobs)), results / "cells", figures, processes, keep_going)
        reporter = _Reporter(watch, tokenizing)
        ask = partial(ask_forecast, document, list(chain.from_iterable(jobs)), results, benchmark)
        threading.Thread(target=reporter.run, args=[ask], name="progress", daemon=True).start()
        atexit.register(reporter.end)


class _Reporter:
    """Prints what a watch sees."""

    def __init__(self, watch: RunWatch, tokenizing: bool) -> None:
        self._watch, self._tokenizing = watch, tokenizing
        self._start = self._printed = time.monotonic()
        self._said = ""
        self._turn = threading.Lock()

    def run(self, ask: Callable[[], Forecast | None]) -> None:
        """Never ends. ask: for the forecast."""
        time.sleep(_SHORT_SECONDS)
        if (forecast := ask()) is not None:
            with self._turn:
                self._watch.learn(forecast)
        while True:
            began = time.monotonic()
            with self._turn:
                standing = self._watch.look()
                if began - self._printed >= _LINE_SECONDS:
                    self._print(standing)
            time.sleep(max(_LOOK_SECONDS, (time.monotonic() - began) / _LOOK_SHARE))

    def end(self) -> None:
        """Prints the last line."""
        # The other thread may be at a file system that hangs.
        if self._turn.acquire(timeout=_LOOK_SECONDS):
            self._print(replace(self._watch.look(), seconds_left=None))

    def _print(self, standing: Standing) -> None:
        now = time.monotonic()
        news = line(standing, 0.0, self._tokenizing)
        if news != self._said:
            sys.stderr.write(line(standing, now - self._start, self._tokenizing) + "\n")
            sys.stderr.flush()
            self._said, self._printed = news, now
