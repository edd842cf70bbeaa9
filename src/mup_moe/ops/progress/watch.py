"""Measures the progress of a Snakemake run and the time left from the files of its cells. Needs no torch."""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mup_moe.ops import heartbeat
from mup_moe.ops.cell_folder import SUMMARY
from mup_moe.ops.heartbeat import Heartbeat
from mup_moe.ops.progress.forecast import Forecast, makespan

# Measurements decay with this time constant, in seconds; a prior counts as much as this many measured seconds.
_MEMORY_SECONDS, _TRUST_SECONDS = 300.0, 10.0
# A job may be quiet for this long between two stacks; if it is quiet for longer, it counts as waiting for a retry.
_QUIET_SECONDS = 60.0
# The number of processes is the most over this many looks, since it drops briefly between two jobs.
_LOOKS = 12


class _Cell:
    """A cell, as seen in its files.

    done: the share of its steps that are done; first: that share when this run begins. step_seconds: the cell's share
    of a stack's step, from the forecast, or 1.
    """

    def __init__(self, folder: Path, is_there: bool) -> None:
        self.id, self._folder = folder.name, folder
        self.first = self.done = 0.0
        self.steps, self.step_seconds = 1, 1.0
        self._summary = _stamp(folder / SUMMARY) if is_there else None
        self.old_failure = self.failure if is_there else None  # from another run, or followed by another attempt
        # The last heartbeat; when it was first seen, by this host's clock; the first heartbeat of its process.
        self.beat = Heartbeat.read(folder) if is_there else None
        self._seen, self._began = -math.inf, self.beat
        self.is_alive = self.is_silent = False

    def look(self, now: float, pace: float | None) -> bool:
        """Reads the files and returns whether the cell has a new result. pace: as in `_Job.left`."""
        # Read the heartbeat first: a cell publishes its result before it deletes its heartbeat.
        beat = Heartbeat.read(self._folder)
        if _stamp(self._folder / SUMMARY) not in (None, self._summary):
            self.done, self.is_alive = 1.0, False
            return True
        if beat is not None and beat != self.beat:
            if self.beat is None or (beat.host, beat.pid) != (self.beat.host, self.beat.pid) or not self.is_alive:
                self._began = beat
            self.beat, self._seen = beat, now
        # Use this host's clock, since others may differ. A heartbeat from before this run counts for nothing.
        age = now - self._seen
        self.is_alive = beat is not None and age < math.inf and beat.is_alive(age)
        self.is_silent = beat is not None and age < math.inf and not self.is_alive
        if self.is_alive and beat is not None:
            # Extrapolate the steps since the last heartbeat.
            rate = beat.steps_per_second
            if rate is None and pace:
                rate = 1 / (self.step_seconds * beat.together * pace)
            since = min(age, 2 * heartbeat.SECONDS) * (rate or 0.0)
            self.done = min((beat.step + since) / max(beat.steps, 1), 1.0)
        return False

    @property
    def seconds(self) -> float:
        """The seconds of all its steps, from the forecast."""
        return self.steps * self.step_seconds

    @property
    def failure(self) -> int | None:
        """When its last attempt failed; None if it did not."""
        return _stamp(self._folder / heartbeat.FAILURE)

    def pace(self, expected: float) -> float:
        """Returns the seconds per step of the cell's stack, with `expected` as the prior."""
        if self.beat is None or self._began is None:
            return expected
        # Both times are from one host's clock, which may be set back.
        seconds = max(self.beat.time - self._began.time, 0.0)
        steps = max(self.beat.step - self._began.step, 0)
        return (_TRUST_SECONDS + seconds) / (_TRUST_SECONDS / expected + steps)


class _Job:
    """The cells that one process trains."""

    def __init__(self, cells: list[_Cell]) -> None:
        self.cells = cells
        self.unfinished = list(cells)
        self.has_begun = self.has_stopped = False
        self._alive = -math.inf
        self._start_seconds = 0.0

    def learn(self, forecast: Forecast) -> None:
        """Stores the forecast of its cells."""
        self._start_seconds = forecast.start_seconds
        for cell in self.cells:
            known = forecast.cells[cell.id]
            cell.steps, cell.step_seconds = known.steps, known.seconds_of_step
            cell.first = known.step / known.steps
            cell.done = max(cell.done, cell.first)

    def look(self, here: Collection[str], now: float, pace: float | None) -> list[_Cell]:
        """Reads the files and returns the newly finished cells. here: the existing folders. pace: as in `left`."""
        seen = [cell for cell in self.unfinished if cell.id in here]
        finished = [cell for cell in seen if cell.look(now, pace)]
        for cell in finished:
            self.unfinished.remove(cell)
        if any(cell.is_alive for cell in seen):
            self._alive, self.has_stopped = now, False
            for cell in seen:
                cell.old_failure = cell.failure
        else:
            left = [cell for cell in seen if cell not in finished]
            self.has_stopped = any(cell.is_silent or cell.failure not in (None, cell.old_failure) for cell in left)
        self.has_begun = self.has_begun or self._alive == now or bool(finished)
        return finished

    def is_running(self, now: float) -> bool:
        """Returns whether a process trains it or is between two of its stacks."""
        return bool(self.unfinished) and not self.has_stopped and now - self._alive <= _QUIET_SECONDS

    @property
    def made(self) -> float:
        """The forecast seconds of the work that this run has done."""
        start = self._start_seconds if self.has_begun else 0.0
        return start + sum(max(cell.done - cell.first, 0.0) * cell.seconds for cell in self.cells)

    @property
    def whole(self) -> float:
        """The forecast seconds of all work that this run has to do."""
        return self._start_seconds + sum((1.0 - cell.first) * cell.seconds for cell in self.cells)

    def left(self, pace: float, now: float) -> float:
        """Returns the seconds that it still needs. pace: actual seconds per forecast second."""
        stacks: dict[tuple[str, int], list[_Cell]] = {}
        seconds = 0.0 if self.is_running(now) else self._start_seconds * pace
        for cell in self.unfinished:
            if cell.is_alive and cell.beat is not None:
                stacks.setdefault((cell.beat.host, cell.beat.pid), []).append(cell)
            else:
                seconds += (1.0 - cell.done) * cell.seconds * pace
        for cells in stacks.values():
            # Cells of a stack end together; if one ended earlier, the others run faster.
            expected = sum(cell.step_seconds for cell in cells) * pace
            seconds += max((1.0 - cell.done) * cell.steps * cell.pace(expected) for cell in cells)
        return seconds


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


@dataclass(frozen=True)
class Standing:
    """The progress of a run.

    share: the share of the work that is done, which never decreases. cells: how many are done, of `total`. failed:
    cells whose last attempt failed or fell silent. figures: those whose cells are, or were last, in training.
    seconds_left: None if still unknown.
    """

    share: float
    cells: int
    total: int
    failed: int
    figures: tuple[str, ...]
    seconds_left: float | None


class RunWatch:
    """Watches the cells that a Snakemake run has to train.

    jobs: the cell ids of each job. cells: the folder with a folder per cell, whose initial files are from other
    runs. figures: cells by figure; the first figure that has a cell names it. processes: how many jobs run at once;
    None: inferred from the jobs seen running. keep_going: whether other jobs start after one has failed. clock: returns
    seconds.
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
        self._folder, self._keep_going, self._clock = cells, keep_going, clock
        self._figure_of = {cell: name for name in reversed(list(figures)) for cell in figures[name]}
        here = self._folders()
        self._jobs = [_Job([_Cell(cells / name, name in here) for name in job]) for job in jobs]
        self._total = sum(len(job) for job in jobs)
        self._forecast: Forecast | None = None
        self._at_once = deque([] if processes is None else [processes] * _LOOKS, maxlen=_LOOKS)
        # Process seconds spent, and the forecast seconds of the work done in them.
        self._spent = self._made = 0.0
        self._before: tuple[float, float, int] | None = None
        self._share = 0.0
        self._figures: tuple[str, ...] = ()

    def learn(self, forecast: Forecast) -> None:
        """Stores the forecast."""
        self._forecast = forecast
        if forecast.is_measured:
            self._spent = self._made = _TRUST_SECONDS
        for job in self._jobs:
            job.learn(forecast)

    def look(self) -> Standing:
        """Reads the files and returns the progress."""
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
        return Standing(
            share=self._share,
            cells=self._total - sum(len(job.unfinished) for job in self._jobs),
            total=self._total,
            failed=sum(len(job.unfinished) for job in stopped),
            figures=self._figures,
            seconds_left=self._seconds_left(running, waiting, processes, now),
        )

    def _folders(self) -> set[str]:
        # One listing is cheaper than a check per cell; most cells have no folder before their job starts.
        try:
            return {path.name for path in self._folder.iterdir()}
        except OSError:
            return set()

    def _measure(self, now: float, processes: int) -> None:
        """Adds the work done since the last look."""
        if self._forecast is None:
            self._share = 1 - sum(len(job.unfinished) for job in self._jobs) / self._total
            return
        made, whole = sum(job.made for job in self._jobs), sum(job.whole for job in self._jobs)
        self._share = max(self._share, made / whole if whole else 1.0)
        if self._before is not None:
            then, before, at_work = self._before
            fade = math.exp((then - now) / _MEMORY_SECONDS)
            self._spent = self._spent * fade + at_work * (now - then)
            # Work lost when a job was killed does not mean that the run is slow.
            self._made = self._made * fade + max(made - before, 0.0)
        if any(job.has_begun for job in self._jobs):
            self._before = now, made, processes

    @property
    def _pace(self) -> float | None:
        """Actual seconds per forecast second; None if still unknown."""
        return self._spent / self._made if self._made else None

    def _seconds_left(
        self, running: Sequence[_Job], waiting: Sequence[_Job], processes: int, now: float
    ) -> float | None:
        if not (running or waiting):
            return 0.0
        pace = self._pace
        if pace is None or not processes:
            return None
        return makespan([job.left(pace, now) for job in running], [job.left(pace, now) for job in waiting], processes)
