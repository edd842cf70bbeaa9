"""A job: the cells that one process trains, with cells of one shape in lockstep.

`Job` decides which cells are trained together, and `_Run` trains them from their checkpoints to their results.
"""

import gc
import math
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from mup_moe.config.jobs import even_parts
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError
from mup_moe.ops import checkpoint, heartbeat
from mup_moe.ops.cell_folder import CellFiles, keep_all
from mup_moe.ops.checkpoint import CHECKPOINT, Checkpoint, Checkpoints, load_together
from mup_moe.ops.device import explain_out_of_memory, step_on
from mup_moe.ops.heartbeat import Pulse, SignsOfLife
from mup_moe.training.memory import by_shape, replicas_of
from mup_moe.training.trainer import Outcome, Trainer


def stacks_of_shapes(
    cells: Sequence[CellFiles], tokens: Tokens, device_type: str, replicas: str
) -> Iterator[list[Sequence[CellFiles]]]:
    """Yields the stacks of cells of each shape, as large as suits the device or as `replicas` says."""
    cell_of = {cell.request.cell: cell for cell in cells}
    for shape, requests in by_shape([cell.request for cell in cells], tokens.vocabulary).items():
        most = replicas_of(shape, requests[0].model, device_type, replicas) or len(requests)
        # Partition all cells, finished or not, so that a restarted job forms the same stacks.
        yield even_parts([cell_of[request.cell] for request in requests], most)


# Cells that are trained at once, with their checkpoints, which are all of the same step.
_Together: TypeAlias = Sequence[tuple[CellFiles, Checkpoint | None]]


@dataclass(kw_only=True, eq=False)
class Job:
    """Trains the cells that have no result yet, in stacks as large as suits the device.

    unfinished: the folders of those cells; a cell is removed when it gets a result. step, replicas,
    checkpoint_seconds, hang_seconds: as in `execution` of the config.
    """

    cells: Sequence[CellFiles]
    unfinished: list[Path]
    tokens: Tokens
    device: torch.device
    step: str
    replicas: str
    checkpoint_seconds: float
    hang_seconds: float

    def __post_init__(self) -> None:
        self._step_mode = step_on(self.device, self.step)
        self.pulse = Pulse(self.hang_seconds, self._record_hang)

    def compile(self) -> None:
        """Fills the compiler's disk cache with the steps of these cells, without training them."""
        if self._step_mode != "eager":
            for stack in chain.from_iterable(self._stacks_of_shapes()):
                self._trainer(stack, "compiled").run(1)

    def run(self, claimed: Collection[CellFiles]) -> None:
        """Trains the claimed cells. On a signal to stop, writes checkpoints and exits.

        Raises UserError, after training the other cells, if models do not fit in memory.
        """
        self.stop = _Stop()
        too_large = ""
        with self.pulse.watched():
            for stacks in self._stacks_of_shapes():
                try:
                    for stack in stacks:
                        self._train([cell for cell in stack if cell in claimed])
                except (MemoryError, RuntimeError) as error:
                    reason = explain_out_of_memory(error)
                    if reason is None:
                        raise
                    too_large = too_large or f"{stacks[0][0].request.cell.id}: {reason}"
                    print(too_large, file=sys.stderr)
        if too_large:
            raise UserError(too_large)
        if self.unfinished:
            # Another part of the job's cells comes next. Until it trains, a signal should end the process at once.
            self.stop.release()

    def _stacks_of_shapes(self) -> Iterator[list[Sequence[CellFiles]]]:
        return stacks_of_shapes(self.cells, self.tokens, self.device.type, self.replicas)

    def _train(self, cells: Sequence[CellFiles]) -> None:
        """Trains cells of one shape, as many together as their checkpoints and the GPU's memory allow."""
        waiting = [cells] if cells else []
        while waiting:
            self.stop.exit_if_asked()
            for together in self._at_the_same_step(waiting.pop()):
                if not self._fits(together):
                    count, half = len(together), (len(together) + 1) // 2
                    print(f"{count} cells do not fit in the GPU's memory together: trying {half}", file=sys.stderr)
                    left = [cell for cell, _ in together if cell.folder in self.unfinished]
                    waiting += reversed(even_parts(left, half))

    def _at_the_same_step(self, cells: Sequence[CellFiles]) -> list[_Together]:
        """Loads the cells' checkpoints, and groups the cells into stacks by the step from which they resume."""
        loaded = load_together([Checkpoints(cell.folder, cell.owner(self.device)) for cell in cells])
        at_step: dict[int, list[tuple[CellFiles, Checkpoint | None]]] = {}
        for cell, saved in zip(cells, loaded, strict=True):
            at_step.setdefault(saved.step if saved else 0, []).append((cell, saved))
        return list(at_step.values())

    def _fits(self, together: _Together) -> bool:
        """Trains a stack; returns False if its cells do not fit in the GPU's memory together."""
        try:
            self._begin(together).train()
            return True
        except torch.OutOfMemoryError:
            if len(together) == 1 or self.replicas != "auto":
                raise
        # Outside of the handler, because the exception held the frames that hold the tensors.
        gc.collect()
        torch.cuda.empty_cache()
        return False

    def _begin(self, together: _Together) -> "_Run":
        cells = [cell for cell, _ in together]
        trainer = self._trainer(cells, self._step_mode)
        saved = [saved for _, saved in together if saved is not None]
        if saved:
            trainer.load_states(saved[0].step, [of_cell.tensors for of_cell in saved])
            print(f"continuing from step {trainer.step} of {trainer.settings.steps}", file=sys.stderr)
        return _Run(self, cells, trainer, sum(of_cell.elapsed for of_cell in saved))

    def _trainer(self, cells: Sequence[CellFiles], step_mode: str) -> Trainer:
        gc.collect()  # frees the previous stack, to which the compiler's functions refer
        tokens, requests = self.tokens, [cell.request for cell in cells]
        may_fall_back = self.step == "auto"
        return Trainer(
            requests, tokens.train, tokens.valid, tokens.vocabulary, self.device, step_mode, may_fall_back=may_fall_back
        )

    def _record_hang(self, reason: str) -> None:
        for folder in self.unfinished:
            heartbeat.clear(folder)
        heartbeat.keep_reason(self.unfinished, reason)


class _Stop:
    """Remembers a signal to stop, so that the process ends between two steps."""

    def __init__(self) -> None:
        self.number: int | None = None
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._handlers = {number: signal.signal(number, self._remember) for number in numbers}

    def _remember(self, number: int, _frame: Any) -> None:
        self.number = number

    def exit_if_asked(self) -> None:
        """Exits with the signal's status if there was one."""
        if self.number:
            sys.exit(128 + self.number)

    def release(self) -> None:
        """Restores the signal handlers, so that signals end the process at once."""
        self.exit_if_asked()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class _Run:
    """Trains a stack of a job's cells from the trainer's current step to their results.

    elapsed: the seconds of training so far, summed over the cells.
    """

    def __init__(self, job: Job, cells: Sequence[CellFiles], trainer: Trainer, elapsed: float) -> None:
        self._job, self._cells, self._trainer = job, cells, trainer
        self._signs = SignsOfLife([cell.folder for cell in cells], job.unfinished)
        self._start = time.perf_counter() - elapsed
        self._saved_at = elapsed

    @property
    def _elapsed(self) -> float:
        """Seconds of training so far, across interruptions."""
        return time.perf_counter() - self._start

    @property
    def _share(self) -> float:
        """One cell's share of the elapsed seconds; the shares add up to the device's time."""
        return self._elapsed / len(self._cells)

    def train(self) -> None:
        """Trains to the end, writing checkpoints along the way, and writes the results."""
        cells, trainer = self._cells, self._trainer
        name = cells[0].request.cell.id if len(cells) == 1 else f"{len(cells)} cells"
        steps = trainer.settings.steps
        bar = tqdm(total=steps, initial=trainer.step, desc=name, unit="step", mininterval=5, ascii=True)

        def after_step(_: Trainer) -> None:
            self._show()
            bar.update()
            if trainer.step < steps:  # after the last step, finishing takes no longer than a checkpoint
                self._save_and_stop_if_due()

        with self._signs.shown(trainer), bar:
            trainer.run(after_step=after_step)
            self._finish(dict(zip(cells, trainer.outcomes(), strict=True)))
        self._job.pulse.beat()

    def _show(self) -> None:
        self._job.pulse.beat()
        self._signs.show(self._trainer)

    def _save_and_stop_if_due(self) -> None:
        stop, between = self._job.stop, self._job.checkpoint_seconds
        asked = stop.number is not None and math.isfinite(between)
        if asked or self._elapsed - self._saved_at >= between:
            self._save()
            self._saved_at = self._elapsed
        if stop.number:
            stopped = f"stopped by {signal.Signals(stop.number).name}"
            print(f"{stopped} at step {self._trainer.step}: rerun the command to continue", file=sys.stderr)
            self._signs.note(stopped, self._trainer.step)
            stop.exit_if_asked()

    def _save(self) -> None:
        cells, trainer, share = self._cells, self._trainer, self._share
        self._finish({cells[replica]: outcome for replica, outcome in trainer.ended.items()})
        new = {
            cells[replica].folder: Checkpoint(trainer.step, share, cells[replica].owner(trainer.device), state)
            for replica, state in trainer.states().items()
        }
        first = [folder for folder in new if not (folder / CHECKPOINT).exists()]
        checkpoint.save(new, after_each=self._show)
        for folder in first:
            heartbeat.note_try(folder, "first checkpoint", trainer.step)

    def _finish(self, ended: Mapping[CellFiles, Outcome]) -> None:
        """Writes the results of the cells that have none yet, and deletes their checkpoints."""
        unfinished, trainer, share = self._job.unfinished, self._trainer, self._share
        new = {cell: outcome for cell, outcome in ended.items() if cell.folder in unfinished}
        keep_all({cell.result: cell.tables(trainer, outcome, share) for cell, outcome in new.items()})
        for cell, outcome in new.items():
            cell.result.publish()
            checkpoint.clear(cell.folder)
            heartbeat.clear(cell.folder)
            heartbeat.note_try(cell.folder, outcome.status, trainer.step)
            unfinished.remove(cell.folder)
