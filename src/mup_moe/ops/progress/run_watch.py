"""How far a run of Snakemake is, and how long the rest will take, by the files of its cells. Needs no torch."""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mup_moe.ops.progress.forecast import Forecast, makespan
from mup_moe.ops.progress.watched import TRUST_SECONDS, WatchedCell, WatchedJob

# What was seen fades in so many seconds.
_MEMORY_SECONDS = 300.0
# How many looks tell how many processes there are at once: between two jobs there are fewer for a moment.
_LOOKS = 12


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    share: done of the work, never less than before. cells: done, of `total`. failed: cells whose last try
    failed or fell silent. figures: whose cells are trained now, or were last. seconds_left: None where nothing
    tells yet.
    """

    share: float
    cells: int
    total: int
    failed: int
    figures: tuple[str, ...]
    seconds_left: float | None


class RunWatch:
    """Watches the cells that a run of Snakemake is to train.

    jobs: the ids of the cells of each. cells: the folder with a folder for each; what these hold at first is of
    other runs. figures: cells by figure; the first that has a cell names it. processes: how many jobs run at
    once, or None where only that shows. keep_going: whether others begin once one has failed. clock: seconds.
    """

    def __init__(
        self,
        jobs: Sequence[Collection[str]],
        cells: Path,
        figures: Mapping[str, Collection[str]],
        processes: int | None,
        keep_going: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._folder = cells
        self._figure_of = {cell: name for name in reversed(list(figures)) for cell in figures[name]}
        here = self._folders()
        self._jobs = [WatchedJob([WatchedCell(name, cells / name, name in here) for name in job]) for job in jobs]
        self._total = sum(len(job) for job in jobs)
        self._keep_going = keep_going
        self._forecast: Forecast | None = None
        self._at_once = deque([] if processes is None else [processes] * _LOOKS, maxlen=_LOOKS)
        # Seconds of processes that were spent, and what the forecast says for what they have made.
        self._spent = self._made = 0.0
        self._before: tuple[float, float, int] | None = None
        self._share = 0.0
        self._figures: tuple[str, ...] = ()

    def learn(self, forecast: Forecast) -> None:
        """Takes in what the cells cost."""
        self._forecast = forecast
        if forecast.is_measured:
            self._spent = self._made = TRUST_SECONDS
        for job in self._jobs:
            job.learn(forecast)

    def look(self) -> Standing:
        """Reads the files."""
        now, here = self._clock(), self._folders()
        finished = [cell for job in self._jobs for cell in job.look(here, now, self._pace)]
        running = [job for job in self._jobs if job.is_running(now)]
        stopped = [job for job in self._jobs if job.has_stopped]
        waiting = [job for job in self._jobs if job.unfinished and not job.has_stopped and not job.is_running(now)]
        if stopped and not self._keep_going:
            waiting = []
        if any(job.has_begun for job in self._jobs):
            self._at_once.append(len(running))
        processes = min(max(self._at_once, default=0), len(running) + len(waiting))
        self._measure(now, processes)
        alive = [cell for job in running for cell in job.unfinished if cell.is_alive]
        figures = {self._figure_of[cell.id] for cell in alive or finished if cell.id in self._figure_of}
        self._figures = tuple(sorted(figures)) or self._figures
        left = sum(len(job.unfinished) for job in self._jobs)
        return Standing(
            share=self._share,
            cells=self._total - left,
            total=self._total,
            failed=sum(len(job.unfinished) for job in stopped),
            figures=self._figures,
            seconds_left=self._seconds_left(running, waiting, processes, now),
        )

    def _folders(self) -> set[str]:
        # One listing is cheaper than to ask for each; most have none before their job begins.
        try:
            return {path.name for path in self._folder.iterdir()}
        except OSError:
            return set()

    def _measure(self, now: float, processes: int) -> None:
        """Takes in what was made since the last look."""
        if self._forecast is None:
            self._share = sum(len(job.cells) - len(job.unfinished) for job in self._jobs) / self._total
            return
        made, whole = sum(job.made for job in self._jobs), sum(job.whole for job in self._jobs)
        self._share = max(self._share, made / whole if whole else 1.0)
        if self._before is not None:
            then, before, at_work = self._before
            fade = math.exp((then - now) / _MEMORY_SECONDS)
            self._spent = self._spent * fade + at_work * (now - then)
            # What a killed job loses is no sign of slowness.
            self._made = self._made * fade + max(made - before, 0.0)
        if any(job.has_begun for job in self._jobs):
            self._before = now, made, processes

    @property
    def _pace(self) -> float | None:
        """Seconds to each that the forecast says; None where nothing tells yet."""
        return self._spent / self._made if self._made else None

    def _seconds_left(
        self, running: Sequence[WatchedJob], waiting: Sequence[WatchedJob], processes: int, now: float
    ) -> float | None:
        if not (running or waiting):
            return 0.0
        pace = self._pace
        if pace is None or not processes:
            return None
        return makespan([job.left(pace, now) for job in running], [job.left(pace, now) for job in waiting], processes)
