"""Prints how much of a sweep is done and how long the rest will take, while it runs."""

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

# Seconds between lines and between reads of the files, and the share of the time that reading may take.
_LINE_SECONDS, _LOOK_SECONDS, _LOOK_SHARE = 15.0, 5.0, 0.05
# A run that ends before this needs no forecast, which costs seconds of CPU time.
_SHORT_SECONDS = 8.0
# The width of a line, and of the figure names in it.
_COLUMNS, _NAMES = 99, 32


def line(standing: Standing, elapsed: float, tokenizing: bool = False) -> str:
    """Returns one line of progress: current figures, a bar of the work, cells done, time spent and left.

    tokenizing: whether the run makes tokens first; then the line says so until a cell starts. elapsed: seconds.
    """
    names = ", ".join(standing.figures)
    if len(names) > _NAMES:
        names = f"{names[: _NAMES - 3]}..."
    has_begun = bool(standing.cells or standing.figures or standing.failed)
    doing = names or ("training" if has_begun else "tokenizing" if tokenizing else "waiting")
    details = [f"{tqdm.format_interval(elapsed)} spent"]
    if standing.seconds_left and (has_begun or not tokenizing):
        details.append(f"about {duration(standing.seconds_left)} left")
    if standing.failed:
        details.append(f"{standing.failed} failed")
    text: str = tqdm.format_meter(
        int(100 * standing.share + 1e-9),  # 100% only when everything is done
        100,
        elapsed,
        prefix=doing,
        ncols=_COLUMNS,
        ascii=True,
        bar_format=f"{{l_bar}}{{bar}}| {standing.cells}/{standing.total} cells [{', '.join(details)}]",
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
    """Prints a line to stderr from time to time, if there is news, until the caller's process ends.

    Runs in a daemon thread. document: the whole config. outputs: the files of each job; only cells' summaries
    count. figures: cells by figure; the first figure that has a cell names it. benchmark: of the training step.
    processes: how many jobs run at once; None: inferred from the jobs seen running. tokenizing: whether the run
    makes tokens first. keep_going: whether other jobs start after one has failed.
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
        """Prints until the process ends. ask: returns the forecast."""
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
        # The other thread may be stuck at a hanging file system.
        if self._turn.acquire(timeout=_LOOK_SECONDS):
            self._print(replace(self._watch.look(), seconds_left=None))

    def _print(self, standing: Standing) -> None:
        now = time.monotonic()
        news = line(standing, 0.0, self._tokenizing)
        if news != self._said:
            sys.stderr.write(line(standing, now - self._start, self._tokenizing) + "\n")
            sys.stderr.flush()
            self._said, self._printed = news, now
