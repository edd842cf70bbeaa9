"""The heartbeats of cells that are trained together."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mup_moe.files import UserError
from mup_moe.ops import heartbeat
from mup_moe.ops.heartbeat import Heartbeat
from mup_moe.training.trainer import Trainer


class SignsOfLife:
    """The heartbeats of the cells of a stack.

    folders: of those cells. unfinished: of cells that have no result yet; the others have no heartbeat.
    """

    def __init__(self, folders: Sequence[Path], unfinished: Sequence[Path]) -> None:
        self._folders = folders
        self._unfinished = unfinished
        self._shown: tuple[float, int, float | None] | None = None

    @contextlib.contextmanager
    def shown(self, trainer: Trainer) -> Iterator[None]:
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
                heartbeat.clear(folder)

    def note(self, event: str, step: int) -> None:
        """Notes what becomes of the try, for the cells that are not done."""
        for folder in self._folders:
            if folder in self._unfinished:
                heartbeat.note_try(folder, event, step)

    def show(self, trainer: Trainer) -> None:
        """Shows how far the stack is, if it is time to."""
        now, rate = time.monotonic(), None
        if self._shown is not None:
            before, step, rate = self._shown
            if now - before < heartbeat.SECONDS:
                return
            # While checkpoints are written no step is taken, and the rate is that of before.
            if trainer.step > step:
                rate = (trainer.step - step) / (now - before)
        self._shown = now, trainer.step, rate
        sign = Heartbeat.now(trainer.step, trainer.settings.steps, len(self._folders), rate)
        for folder in self._folders:
            if folder in self._unfinished:
                # A disk that is full is told by what has to be written.
                with contextlib.suppress(UserError):
                    sign.write(folder)
