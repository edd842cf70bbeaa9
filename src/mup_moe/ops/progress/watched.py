"""The cells and jobs of a run, each by the files in its cells' folders. Needs no torch."""

import math
from collections.abc import Collection
from pathlib import Path

from mup_moe.ops import heartbeat
from mup_moe.ops.cell_folder import SUMMARY
from mup_moe.ops.heartbeat import Heartbeat
from mup_moe.ops.progress.forecast import Forecast

# An expectation counts as so many seconds of a process that were seen.
TRUST_SECONDS = 10.0
# A job is quiet for so long between two stacks; for longer, it waits to be tried again.
_QUIET_SECONDS = 60.0


class WatchedCell:
    """A cell, by its files.

    done: the share of its steps; first: that at which this run begins. step_seconds: its share of a step of a
    stack, by the forecast, or 1.
    """

    def __init__(self, name: str, folder: Path, is_there: bool) -> None:
        self.id = name
        self._folder = folder
        self.first = self.done = 0.0
        self.steps, self.step_seconds = 1, 1.0
        self._summary = _stamp(folder / SUMMARY) if is_there else None
        self._failure = self._failed() if is_there else None
        # The last sign of life; when it was seen first, by our clock; the first one of its process.
        self.beat = Heartbeat.read(folder) if is_there else None
        self._seen, self._began = -math.inf, self.beat
        self.is_alive = self.is_silent = False

    def look(self, now: float, pace: float | None) -> bool:
        """Reads the files; whether the cell has a new result. pace: as `WatchedJob.left` has it."""
        # First: who is done shows a result before the sign of life goes.
        beat = Heartbeat.read(self._folder)
        if _stamp(self._folder / SUMMARY) not in (None, self._summary):
            self.done, self.is_alive = 1.0, False
            return True
        if beat is not None and beat != self.beat:
            if self.beat is None or (beat.host, beat.pid) != (self.beat.host, self.beat.pid) or not self.is_alive:
                self._began = beat
            self.beat, self._seen = beat, now
        # By our clock: those of other hosts may differ. What was there at first is nobody's.
        age = now - self._seen
        self.is_alive = beat is not None and age < math.inf and beat.is_alive(age)
        self.is_silent = beat is not None and age < math.inf and not self.is_alive
        if self.is_alive and beat is not None:
            # A sign comes now and then; what is made meanwhile counts as it is made.
            rate = beat.steps_per_second
            if rate is None and pace:
                rate = 1 / (self.step_seconds * beat.together * pace)
            since = min(age, 2 * heartbeat.SECONDS) * (rate or 0.0)
            self.done = min((beat.step + since) / max(beat.steps, 1), 1.0)
        return False

    @property
    def seconds(self) -> float:
        """Of all its steps, by the forecast."""
        return self.steps * self.step_seconds

    def has_failed(self) -> bool:
        """Whether a try has failed since this was last forgotten, or at first."""
        return self._failed() not in (None, self._failure)

    def forget_failure(self) -> None:
        """To be called when it is tried again."""
        self._failure = self._failed()

    def _failed(self) -> int | None:
        return _stamp(self._folder / heartbeat.FAILURE)

    def pace(self, expected: float) -> float:
        """Seconds of a step of the stack that the cell is in, of which `expected` are expected."""
        if self.beat is None or self._began is None:
            return expected
        # Both by the clock of one host, which may be set back.
        seconds = max(self.beat.time - self._began.time, 0.0)
        steps = max(self.beat.step - self._began.step, 0)
        return (TRUST_SECONDS + seconds) / (TRUST_SECONDS / expected + steps)


class WatchedJob:
    """The cells that one process trains."""

    def __init__(self, cells: list[WatchedCell]) -> None:
        self.cells = cells
        self.unfinished = list(cells)
        self.has_begun = self.has_stopped = False
        self._alive = -math.inf
        self._start_seconds = 0.0

    def learn(self, forecast: Forecast) -> None:
        """Takes in what its cells cost."""
        self._start_seconds = forecast.start_seconds
        for cell in self.cells:
            known = forecast.cells[cell.id]
            cell.steps, cell.step_seconds = known.steps, known.seconds_of_step
            cell.first = known.step / known.steps
            cell.done = max(cell.done, cell.first)

    def look(self, here: Collection[str], now: float, pace: float | None) -> list[WatchedCell]:
        """Reads the files; the cells that are finished since.

        here: the folders that there are. pace: as `left` has it.
        """
        seen = [cell for cell in self.unfinished if cell.id in here]
        finished = [cell for cell in seen if cell.look(now, pace)]
        if finished:
            self.unfinished = [cell for cell in self.unfinished if cell not in finished]
        if any(cell.is_alive for cell in seen):
            self._alive, self.has_stopped = now, False
            for cell in seen:
                cell.forget_failure()
        else:
            self.has_stopped = any(cell.is_silent or cell.has_failed() for cell in seen if cell not in finished)
        self.has_begun = self.has_begun or self._alive == now or bool(finished)
        return finished

    def is_running(self, now: float) -> bool:
        """Whether a process trains it, or is between two of its stacks."""
        return bool(self.unfinished) and not self.has_stopped and now - self._alive <= _QUIET_SECONDS

    @property
    def made(self) -> float:
        """What the forecast says for what this run has made."""
        start = self._start_seconds if self.has_begun else 0.0
        return start + sum(max(cell.done - cell.first, 0.0) * cell.seconds for cell in self.cells)

    @property
    def whole(self) -> float:
        """What the forecast says for all that this run is to make."""
        return self._start_seconds + sum((1.0 - cell.first) * cell.seconds for cell in self.cells)

    def left(self, pace: float, now: float) -> float:
        """The seconds that it still takes. pace: seconds to each that the forecast says."""
        stacks: dict[tuple[str, int], list[WatchedCell]] = {}
        seconds = 0.0 if self.is_running(now) else self._start_seconds * pace
        for cell in self.unfinished:
            if cell.is_alive and cell.beat is not None:
                stacks.setdefault((cell.beat.host, cell.beat.pid), []).append(cell)
            else:
                seconds += (1.0 - cell.done) * cell.seconds * pace
        for cells in stacks.values():
            # They end at once; a cell that has ended before the others left the time to them.
            expected = sum(cell.step_seconds for cell in cells) * pace
            seconds += max((1.0 - cell.done) * cell.steps * cell.pace(expected) for cell in cells)
        return seconds


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
