"""Liveness files of a running cell: heartbeat, attempt log, and the reason for the last failure.

Needs no torch, so that commands that monitor a sweep read them quickly.
"""

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_type_hints

from mup_moe.files import UserError, read_json, remove_leftovers, write_text

if TYPE_CHECKING:
    from mup_moe.training.trainer import Trainer

# Between heartbeats, each of which writes a file; a step of the largest models takes about as long.
SECONDS = 10.0
_LAST_WORDS_SECONDS = 60.0
_FILE, FAILURE, TRIES = "heartbeat.json", "failure.json", "tries.jsonl"
# The age up to which a heartbeat counts as alive: this many seconds, plus the time of a few steps.
_PATIENCE_SECONDS, _PATIENCE_STEPS = 60.0, 5
# Until there is a rate, because the first step compiles everything.
_PATIENCE_AT_START_SECONDS = 600.0


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a running cell.

    step: steps done, of `steps`. together: how many cells its process trains at once. steps_per_second: the recent
    rate of the process, None until its second heartbeat. time: seconds since the epoch, by its host's clock. job: the
    cluster's job ID.
    """

    step: int
    steps: int
    together: int
    steps_per_second: float | None
    time: float
    host: str
    pid: int
    job: str | None

    @classmethod
    def now(cls, step: int, steps: int, together: int, steps_per_second: float | None) -> Self:
        """Returns a heartbeat of this process."""
        return cls(step, steps, together, steps_per_second, **_now_and_here())

    def write(self, folder: Path) -> None:
        """Writes the heartbeat into a cell's folder."""
        # Not synced to disk, since it only matters while the machine is up.
        write_text(folder / _FILE, json.dumps(asdict(self)) + "\n", durable=False)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Reads the last heartbeat in a cell's folder; None if there is no valid one."""
        try:
            values = json.loads((folder / _FILE).read_bytes())
            beat = cls(**values)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        # Validated by hand, because a machine that only trains has no pydantic.
        if not all(_is_of(values[name], kind) for name, kind in get_type_hints(cls).items()):
            return None
        rate = beat.steps_per_second
        sound = math.isfinite(beat.time) and beat.together > 0 and (rate is None or 0 < rate < math.inf)
        return beat if sound else None

    def is_alive(self, age: float) -> bool:
        """Returns whether its process seems to be alive. age: of the heartbeat, in seconds.

        A negative age (the clocks of two hosts differ, or one was set back) counts as recent.
        """
        if self.host == socket.gethostname() and not _has_process(self.pid):
            return False
        rate = self.steps_per_second
        return age <= (_PATIENCE_AT_START_SECONDS if rate is None else _PATIENCE_SECONDS + _PATIENCE_STEPS / rate)


def _is_of(value: Any, kind: Any) -> bool:
    """Returns whether a JSON value has an annotated type; integers pass as floats, booleans and over 64 bits fail."""
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() > 63):
        return False
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def _has_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's process
    return True


def _now_and_here() -> dict[str, Any]:
    """Returns the time and the process: fields of a `Heartbeat` and of a line of `note_try`."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "job": job}


@dataclass(frozen=True)
class Failure:
    """Why a cell's last attempt ended without a result, as a sentence; `time` is as in `Heartbeat`."""

    reason: str
    time: float

    def write(self, folder: Path) -> None:
        """Writes the reason into a cell's folder."""
        write_text(folder / FAILURE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Reads why a cell failed; None if it did not fail."""
        try:
            return cls(**read_json(folder / FAILURE))
        except (UserError, TypeError):
            return None


def keep_reason(folders: Iterable[Path], reason: str) -> None:
    """Writes the reason, a sentence, into the folders of the cells that a failure left without a result."""
    failure = Failure(reason, time.time())
    for folder in folders:
        # If the folder cannot be written, only the log has the reason.
        with suppress(UserError):
            failure.write(folder)


def note_try(folder: Path, event: str, step: int) -> None:
    """Appends a line to a cell's attempt log, because Snakemake keeps only the log of the last attempt.

    event: what happened to the attempt at that step. Does nothing if the folder cannot be written.
    """
    line = {"event": event, "step": step} | _now_and_here()
    with suppress(OSError), (folder / TRIES).open("a+b") as file:
        # End a line that a full disk cut short.
        begun = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
        file.write(b"\n" * begun + json.dumps(line).encode() + b"\n")


def clear(folder: Path) -> None:
    """Deletes the heartbeat and the failure, because the cell is done or a new attempt begins."""
    # If the folder cannot be written, the next required write there reports it.
    with suppress(OSError):
        for path in (folder / _FILE, folder / FAILURE):
            remove_leftovers(path)
            path.unlink(missing_ok=True)


class SignsOfLife:
    """Writes the heartbeats of a stack's cells, given by their folders; only `unfinished` cells have one."""

    def __init__(self, folders: Sequence[Path], unfinished: Sequence[Path]) -> None:
        self._folders, self._unfinished = folders, unfinished
        self._shown: tuple[float, int, float | None] | None = None

    @contextmanager
    def shown(self, trainer: "Trainer") -> Iterator[None]:
        """Shows heartbeats during the block, and clears them when it ends for whatever reason."""
        self.note("began", trainer.step)
        self.show(trainer)
        try:
            yield
        except Exception as error:
            self.note(f"failed: {type(error).__name__}", trainer.step)
            raise
        finally:
            for folder in self._folders:
                clear(folder)

    def note(self, event: str, step: int) -> None:
        """Logs an event of the attempt for the unfinished cells."""
        for folder in self._left():
            note_try(folder, event, step)

    def _left(self) -> list[Path]:
        return [folder for folder in self._folders if folder in self._unfinished]

    def show(self, trainer: "Trainer") -> None:
        """Writes the stack's progress if the last heartbeat is old enough."""
        now, rate = time.monotonic(), None
        if self._shown is not None:
            before, step, rate = self._shown
            if now - before < SECONDS:
                return
            # No steps are taken while checkpoints are written, so keep the previous rate.
            if trainer.step > step:
                rate = (trainer.step - step) / (now - before)
        self._shown = now, trainer.step, rate
        sign = Heartbeat.now(trainer.step, trainer.settings.steps, len(self._folders), rate)
        for folder in self._left():
            # If the disk is full, the next required write reports it.
            with suppress(UserError):
                sign.write(folder)


class Pulse:
    """Ends a process that hangs.

    seconds: the time without a `beat` after which the process exits with status 1, printing a traceback of where it
    hung. before_end: called with the reason; it has a limited time to run.
    """

    def __init__(self, seconds: float, before_end: Callable[[str], None]) -> None:
        self._seconds, self._before_end = seconds, before_end
        self._tick = min(1.0, seconds / 10)
        self.beat()

    def beat(self) -> None:
        """Must be called at every step."""
        self._quiet = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watches the block."""
        over = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, args=[over], name="pulse", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        # Count ticks, not clock time: while the process is suspended, as SLURM may do, no ticks pass.
        while not over.wait(self._tick):
            self._quiet += 1
            if self._quiet * self._tick >= self._seconds:
                self._end()

    def _end(self) -> None:
        reason = (
            f"no step for {self._seconds:.0f} s: the job hangs and is ended; rerun it to resume from its checkpoint,"
            " and raise `execution.hang_seconds` if its steps can take that long"
        )
        try:
            # The disk may be what hangs.
            last_words = threading.Thread(target=self._before_end, args=[reason], daemon=True)
            last_words.start()
            # Start on a new line, after a progress bar; stderr may be closed.
            with suppress(OSError, ValueError, RuntimeError):
                print(f"\nmup-moe: {reason}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
            last_words.join(_LAST_WORDS_SECONDS)
        finally:
            # A hung thread never sees an exception, so exit hard.
            os._exit(1)
