"""Estimates how long a job takes on the machine that runs it."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mup_moe.ops.offsite.job_list import ListedJob
from mup_moe.training.memory import by_shape, stack_bytes

# Seconds to start, build and compile, until a job has been timed; and the most by which an estimate is too short.
_START_SECONDS, _MARGIN = 60.0, 1.15


class JobTimes:
    """Estimates from measurements, since a step's time is about proportional to its stack's memory.

    vocabulary: of each corpus. measured: a file of `benchmarks/look.py`, used until a job has run, or None.
    """

    def __init__(self, vocabulary: dict[str, int], measured: Path | None) -> None:
        self._vocabulary, self._start_seconds = vocabulary, _START_SECONDS
        # Seconds per step, by the bytes of the stack.
        self._seconds_of = {} if measured is None else dict(_measured_in(measured))

    def estimate(self, job: ListedJob) -> float | None:
        """Returns the seconds for a job's cells, stacked by shape; None if nothing has been measured yet."""
        if not self._seconds_of:
            return None
        total = self._start_seconds
        for size, steps in self._stacks(job):
            nearest = min(self._seconds_of, key=lambda known: abs(math.log(known / size)))
            total += _MARGIN * steps * self._seconds_of[nearest] * size / nearest
        return total

    def learn(self, job: ListedJob, seconds: float, steps_per_second: float) -> None:
        """Records the total seconds of a job and its steps per second once it was running."""
        stacks = self._stacks(job)
        if len(stacks) == 1:
            ((size, steps),) = stacks
            self._seconds_of[size] = 1 / steps_per_second
            self._start_seconds = max(0.0, seconds - steps / steps_per_second)

    def _stacks(self, job: ListedJob) -> list[tuple[int, int]]:
        """Returns the bytes and the steps of each stack."""
        shapes = by_shape(job.requests, self._vocabulary[job.corpus])
        return [(stack_bytes(shape, alike[0], len(alike)), alike[0].training.steps) for shape, alike in shapes.items()]


def _measured_in(path: Path) -> Iterator[tuple[float, float]]:
    """Yields the stack's bytes and seconds per step of each complete row; a kill may have cut a row short."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        print(f"{path} cannot be read ({error}): the first job starts without an estimate", file=sys.stderr)
        return
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            yield float(row["bytes"]), float(row["step_ms"]) / 1e3
