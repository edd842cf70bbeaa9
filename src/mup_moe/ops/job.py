"""A job: the cells that one process trains, those of one shape in lockstep."""

import gc
import math
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from mup_moe.config.jobs import even_parts
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError
from mup_moe.model.inventory import model_size
from mup_moe.ops import checkpoint, heartbeat
from mup_moe.ops.cell_files import CellFiles
from mup_moe.ops.checkpoint import Checkpoint, Checkpoints, common_steps
from mup_moe.ops.checkpoint_header import CHECKPOINT
from mup_moe.ops.heartbeat import Pulse
from mup_moe.ops.memory import by_shape, replicas_on
from mup_moe.ops.result import keep_all
from mup_moe.ops.signs_of_life import SignsOfLife
from mup_moe.training.device import explain_out_of_memory, step_on
from mup_moe.training.trainer import Outcome, Trainer


class Stopwatch:
    """Seconds of training, across interruptions."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self._start = time.perf_counter() - elapsed

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


def stacks_of_shapes(
    cells: Sequence[CellFiles], tokens: Tokens, device_type: str, replicas: str
) -> Iterator[list[Sequence[CellFiles]]]:
    """The stacks of the cells of each shape, as large as the device likes, or as `replicas` says."""
    cell_of = {cell.request.cell: cell for cell in cells}
    for shape, requests in by_shape([cell.request for cell in cells], tokens.vocabulary).items():
        size = model_size(shape, requests[0].model)
        most = replicas_on(device_type, replicas, size.parameters) or len(requests)
        # By all cells, done or not: a stack is to be of the same cells however often it is begun.
        yield even_parts([cell_of[request.cell] for request in requests], most)


# Cells that are trained at once, all at the step of their checkpoints.
_Together: TypeAlias = Sequence[tuple[CellFiles, Checkpoint | None]]


class Job:
    """Trains the cells that have no result yet, in stacks as large as the device likes.

    unfinished: the folders of those cells; who gets a result leaves. step, replicas,
    checkpoint_seconds, hang_seconds: as `execution` of the config has them.
    """

    def __init__(
        self,
        cells: Sequence[CellFiles],
        unfinished: list[Path],
        tokens: Tokens,
        device: torch.device,
        *,
        step: str,
        replicas: str,
        checkpoint_seconds: float,
        hang_seconds: float,
    ) -> None:
        self._cells = cells
        self._unfinished = unfinished
        self._tokens = tokens
        self._device = device
        self._step_mode, self._may_fall_back = step_on(device, step), step == "auto"
        self._replicas = replicas
        self._checkpoint_seconds = checkpoint_seconds
        self._pulse = Pulse(hang_seconds, self._tell_hang)
        self._signal: int | None = None

    def run(self, claimed: Collection[CellFiles]) -> None:
        """Trains those cells that are claimed. Exits, with checkpoints written, when a signal asks for it.

        Raises UserError where models do not fit in memory, once the others are trained.
        """
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        handlers = [signal.signal(number, self._remember) for number in numbers]
        too_large = ""
        with self._pulse.watched():
            for stacks in self._stacks_of_shapes():
                try:
                    for stack in stacks:
                        self._train_cells([cell for cell in stack if cell in claimed])
                except (MemoryError, RuntimeError) as error:
                    reason = explain_out_of_memory(error)
                    if reason is None:
                        raise
                    too_large = too_large or f"{stacks[0][0].request.cell.id}: {reason}"
                    print(too_large, file=sys.stderr)
        if too_large:
            raise UserError(too_large)
        if self._unfinished:
            # Another part of the job's cells comes next: until it trains, a signal ends the process at once.
            self._exit_if_asked()
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)

    def _exit_if_asked(self) -> None:
        if self._signal:
            sys.exit(128 + self._signal)

    def compile(self) -> None:
        """Fills the compiler's cache on disk with the steps of these cells, and trains none."""
        if self._step_mode == "eager":
            return
        for stacks in self._stacks_of_shapes():
            for stack in stacks:
                self._trainer(stack, "compiled").run(1)

    def _stacks_of_shapes(self) -> Iterator[list[Sequence[CellFiles]]]:
        return stacks_of_shapes(self._cells, self._tokens, self._device.type, self._replicas)

    def _trainer(self, cells: Sequence[CellFiles], step_mode: str) -> Trainer:
        gc.collect()  # of the stack before, which the compiler's functions refer to
        return Trainer(
            [cell.request for cell in cells],
            self._tokens.train,
            self._tokens.valid,
            self._tokens.vocabulary,
            self._device,
            step_mode,
            may_fall_back=self._may_fall_back,
        )

    def _tell_hang(self, reason: str) -> None:
        for folder in self._unfinished:
            heartbeat.clear(folder)
        heartbeat.keep_reason(self._unfinished, reason)

    def _train_cells(self, cells: Sequence[CellFiles]) -> None:
        if not cells:
            return
        self._exit_if_asked()
        at_step: dict[int, list[tuple[CellFiles, Checkpoint | None]]] = {}
        for cell, saved in self._saved(cells):
            at_step.setdefault(saved.step if saved else 0, []).append((cell, saved))
        # Cells that were interrupted apart are not at the same step: each step is a stack of its own.
        for stack in at_step.values():
            if not self._fits(stack):
                half = (len(stack) + 1) // 2
                print(f"{len(stack)} cells do not fit in the GPU's memory at once: trying {half}", file=sys.stderr)
                left = [cell for cell, _ in stack if cell.folder in self._unfinished]
                for part in even_parts(left, half):
                    self._train_cells(part)

    def _saved(self, cells: Sequence[CellFiles]) -> list[tuple[CellFiles, Checkpoint | None]]:
        """The checkpoint that each cell goes on from, if it has one."""
        kept = [Checkpoints(cell.folder, cell.owner(self._device)) for cell in cells]
        while True:
            steps = common_steps([checkpoints.steps for checkpoints in kept])
            loaded = [of_cell.load(step) if step else None for of_cell, step in zip(kept, steps, strict=True)]
            # One that is damaged leaves another to go on from.
            if all(step == 0 or saved is not None for step, saved in zip(steps, loaded, strict=True)):
                break
        for of_cell, step in zip(kept, steps, strict=True):
            if step:
                of_cell.go_on_from(step)
        return list(zip(cells, loaded, strict=True))

    def _fits(self, stack: _Together) -> bool:
        """Trains a stack, unless it has more cells than the GPU has memory for."""
        try:
            self._train(stack)
            return True
        except torch.OutOfMemoryError:
            if len(stack) == 1 or self._replicas != "auto":
                raise
        # Only here, where the exception no longer holds the frames that hold the tensors.
        gc.collect()
        torch.cuda.empty_cache()
        return False

    def _remember(self, number: int, _frame: Any) -> None:
        self._signal = number

    def _train(self, stack: _Together) -> None:
        cells = [cell for cell, _ in stack]
        trainer = self._trainer(cells, self._step_mode)
        saved = [saved for _, saved in stack if saved is not None]
        if saved:
            trainer.load_states(saved[0].step, [of_cell.tensors for of_cell in saved])
            print(f"continuing from step {trainer.step} of {trainer.settings.steps}", file=sys.stderr)
        # A cell's share of the time that its stack took, so that the shares add up to the device's.
        watch = Stopwatch(sum(of_cell.elapsed for of_cell in saved))
        steps = trainer.settings.steps
        name = cells[0].request.cell.id if len(cells) == 1 else f"{len(cells)} cells"
        signs = SignsOfLife([cell.folder for cell in cells], self._unfinished)
        with (
            signs.shown(trainer),
            tqdm(total=steps, initial=trainer.step, desc=name, unit="step", mininterval=5, ascii=True) as bar,
        ):
            saved_at = watch.elapsed

            def after_step(trainer: Trainer) -> None:
                nonlocal saved_at
                self._pulse.beat()
                signs.show(trainer)
                bar.update()
                if trainer.step == steps:
                    return  # what is left takes no longer than a checkpoint
                due = self._signal is not None and math.isfinite(self._checkpoint_seconds)
                if due or watch.elapsed - saved_at >= self._checkpoint_seconds:
                    self._save(trainer, cells, watch, signs)
                    saved_at = watch.elapsed
                if self._signal:
                    stopped = f"stopped by {signal.Signals(self._signal).name}"
                    print(f"{stopped} at step {trainer.step}: run it again to continue", file=sys.stderr)
                    signs.note(stopped, trainer.step)
                    sys.exit(128 + self._signal)

            trainer.run(after_step=after_step)
            outcomes = trainer.outcomes()
            self._finish(dict(zip(cells, outcomes, strict=True)), trainer, watch.elapsed / len(cells))
        self._pulse.beat()

    def _save(self, trainer: Trainer, cells: Sequence[CellFiles], watch: "Stopwatch", signs: SignsOfLife) -> None:
        def show() -> None:
            self._pulse.beat()
            signs.show(trainer)

        share = watch.elapsed / len(cells)
        self._finish({cells[replica]: outcome for replica, outcome in trainer.ended.items()}, trainer, share)
        states = {cells[replica]: state for replica, state in trainer.states().items()}
        first = [cell.folder for cell in states if not (cell.folder / CHECKPOINT).exists()]
        checkpoint.save(
            {
                cell.folder: Checkpoint(trainer.step, share, cell.owner(self._device), state)
                for cell, state in states.items()
            },
            after_each=show,
        )
        for folder in first:
            heartbeat.note_try(folder, "first checkpoint", trainer.step)

    def _finish(self, ended: Mapping[CellFiles, Outcome], trainer: Trainer, seconds: float) -> None:
        """Writes the results of those cells that have none yet, which makes their checkpoints needless."""
        new = {cell: outcome for cell, outcome in ended.items() if cell.folder in self._unfinished}
        if not new:
            return
        keep_all({cell.result: cell.tables(trainer, outcome, seconds) for cell, outcome in new.items()})
        for cell, outcome in new.items():
            cell.result.publish()
            cell.clear()
            heartbeat.note_try(cell.folder, outcome.status, trainer.step)
            self._unfinished.remove(cell.folder)
