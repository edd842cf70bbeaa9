"""How a running cell is, told while it runs, what its tries came to, and why one failed: files in its folder.

Needs no torch, so that whoever looks after a sweep reads them in a moment.
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

# A sign of life costs a file; a step of the largest models takes about as long.
SECONDS = 10.0
_LAST_WORDS_SECONDS = 60.0
_FILE, FAILURE, TRIES = "heartbeat.json", "failure.json", "tries.jsonl"
# How old a sign of life may be: so much, and some steps where steps take long.
_PATIENCE_SECONDS, _PATIENCE_STEPS = 60.0, 5
# Before there is a rate, the first step has everything compiled.
_PATIENCE_AT_START_SECONDS = 600.0


@dataclass(frozen=True)
class Heartbeat:
    """A running cell's last sign of life.

    step: done of `steps`. together: how many cells its process trains at once. steps_per_second: of the process
    lately, None before two signs. time: seconds since the epoch, by its host's clock. job: the cluster's name of it.
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
        """A sign of life of this process."""
        return cls(step, steps, together, steps_per_second, **_now_and_here())

    def write(self, folder: Path) -> None:
        """Puts the sign of life into the folder of a cell."""
        # Not synced to disk: it matters while the machine lives.
        write_text(folder / _FILE, json.dumps(asdict(self)) + "\n", durable=False)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The last sign of life in a cell's folder; None where there is none that can be reckoned with."""
        try:
            told = json.loads((folder / _FILE).read_bytes())
            beat = cls(**told)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        # By hand: a machine that only trains has no pydantic.
        if not all(_is_of(told[name], kind) for name, kind in get_type_hints(cls).items()):
            return None
        rate = beat.steps_per_second
        sound = math.isfinite(beat.time) and beat.together > 0 and (rate is None or 0 < rate < math.inf)
        return beat if sound else None

    def is_alive(self, age: float) -> bool:
        """Whether its process goes on, as far as can be told from here. age: of the sign, in seconds.

        A negative age (the clocks of two hosts differ, or one was set back) is a recent one.
        """
        if self.host == socket.gethostname() and not _has_process(self.pid):
            return False
        rate = self.steps_per_second
        return age <= (_PATIENCE_AT_START_SECONDS if rate is None else _PATIENCE_SECONDS + _PATIENCE_STEPS / rate)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether JSON's value is of an annotated type: an integer is a float, but no truth, and nothing beyond 64 bits."""
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() > 63):
        return False
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def _has_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _now_and_here() -> dict[str, Any]:
    """Who speaks, and when: fields of a `Heartbeat` and of a line of `note_try`."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "job": job}


@dataclass(frozen=True)
class Failure:
    """Why a cell's last try ended without a result, in a sentence; time as in `Heartbeat`."""

    reason: str
    time: float

    def write(self, folder: Path) -> None:
        """Puts the reason into the folder of a cell."""
        write_text(folder / FAILURE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Why a cell failed; None where it did not."""
        try:
            return cls(**read_json(folder / FAILURE))
        except (UserError, TypeError):
            return None


def keep_reason(folders: Iterable[Path], reason: str) -> None:
    """Puts the reason, a sentence, into the folders of cells that one failure has left without a result."""
    failure = Failure(reason, time.time())
    for folder in folders:
        # Where nothing can be written, the log alone has it.
        with suppress(UserError):
            failure.write(folder)


def note_try(folder: Path, event: str, step: int) -> None:
    """Adds a line to the story of a cell's tries: Snakemake keeps the log of the last one only.

    event: what became of the try at that step. Nothing is told where nothing can be written.
    """
    line = {"event": event, "step": step} | _now_and_here()
    with suppress(OSError), (folder / TRIES).open("a+b") as file:
        # A line that a full disk has cut short ends here.
        begun = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
        file.write(b"\n" * begun + json.dumps(line).encode() + b"\n")


def clear(folder: Path) -> None:
    """Takes heartbeat and failure away: the cell is done, or a new try begins."""
    # A folder that cannot be written is told by what has to be written there.
    with suppress(OSError):
        for path in (folder / _FILE, folder / FAILURE):
            remove_leftovers(path)
            path.unlink(missing_ok=True)


class SignsOfLife:
    """The heartbeats of the cells of a stack, by their folders; those that are not `unfinished` have none."""

    def __init__(self, folders: Sequence[Path], unfinished: Sequence[Path]) -> None:
        self._folders, self._unfinished = folders, unfinished
        self._shown: tuple[float, int, float | None] | None = None

    @contextmanager
    def shown(self, trainer: "Trainer") -> Iterator[None]:
        """Shows them from the beginning of the block to its end, however that comes."""
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
        """Notes what becomes of the try, for the cells that are not done."""
        for folder in self._left():
            note_try(folder, event, step)

    def _left(self) -> list[Path]:
        return [folder for folder in self._folders if folder in self._unfinished]

    def show(self, trainer: "Trainer") -> None:
        """Shows how far the stack is, if it is time to."""
        now, rate = time.monotonic(), None
        if self._shown is not None:
            before, step, rate = self._shown
            if now - before < SECONDS:
                return
            # While checkpoints are written no step is taken, and the rate is that of before.
            if trainer.step > step:
                rate = (trainer.step - step) / (now - before)
        self._shown = now, trainer.step, rate
        sign = Heartbeat.now(trainer.step, trainer.settings.steps, len(self._folders), rate)
        for folder in self._left():
            # A disk that is full is told by what has to be written.
            with suppress(UserError):
                sign.write(folder)


class Pulse:
    """Ends a process that hangs.

    seconds: without `beat`, after which it ends, with exit status 1 and a traceback of where it hung.
    before_end: is called with the reason, and has some seconds for what it does.
    """

    def __init__(self, seconds: float, before_end: Callable[[str], None]) -> None:
        self._seconds, self._before_end = seconds, before_end
        self._tick = min(1.0, seconds / 10)
        self.beat()

    def beat(self) -> None:
        """To be called with every step."""
        self._quiet = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watches over the block."""
        over = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, args=[over], name="pulse", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        # In ticks: while the process is suspended, as SLURM may do, no clock of ours goes on.
        while not over.wait(self._tick):
            self._quiet += 1
            if self._quiet * self._tick >= self._seconds:
                self._end()

    def _end(self) -> None:
        reason = (
            f"no step for {self._seconds:.0f} s: the job hangs and is ended. Run it again to go on from its"
            " checkpoint; raise `execution.hang_seconds` if its steps may take so long"
        )
        try:
            # It may be the disk that everything hangs at.
            last_words = threading.Thread(target=self._before_end, args=[reason], daemon=True)
            last_words.start()
            # On a line of its own, where a bar was; nobody may be left to read it.
            with suppress(OSError, ValueError, RuntimeError):
                print(f"\nmup-moe: {reason}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
            last_words.join(_LAST_WORDS_SECONDS)
        finally:
            # A thread that hangs does not see exceptions.
            os._exit(1)
