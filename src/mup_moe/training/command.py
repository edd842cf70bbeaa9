"""Trains cells, those of one shape in lockstep: python -m mup_moe train."""

import argparse
import contextlib
import gc
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from tqdm import tqdm

from mup_moe import provenance
from mup_moe.config.settings import STEPS
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError, claim_folder, explain_disk_error, remove_leftovers
from mup_moe.model.transformer import model_size
from mup_moe.training import checkpoint, heartbeat
from mup_moe.training.capacity import by_shape, replicas_on
from mup_moe.training.checkpoint import Checkpoint, Checkpoints, common_steps
from mup_moe.training.checkpoint_header import CHECKPOINT
from mup_moe.training.code import code_digest
from mup_moe.training.device import (
    claim_device,
    explain_lost_device,
    explain_out_of_memory,
    keep_freed_pages,
    precision_on,
    step_on,
)
from mup_moe.training.heartbeat import Failure, Heartbeat, Pulse
from mup_moe.training.request import TrainingRequest
from mup_moe.training.result import Result, keep_all
from mup_moe.training.stack import METRICS
from mup_moe.training.trainer import Outcome, Trainer, learning_rate

T = TypeVar("T")


class Stopwatch:
    """Seconds of training, across interruptions."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self._start = time.perf_counter() - elapsed

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    help_request = "a training request as JSON, whose `cell` may be a list; once for each set of settings"
    parser.add_argument("--request", required=True, action="append", dest="requests", help=help_request)
    parser.add_argument("--tokens", required=True, type=Path, help="folder of a tokenized corpus")
    parser.add_argument("--out", required=True, type=Path, help="the folder that has a folder for each cell")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--replicas", default="auto", help="cells trained at once, or auto")
    parser.add_argument("--step", default="auto", choices=["auto", *STEPS])
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--checkpoint-seconds", default=60.0, type=float)
    parser.add_argument("--hang-seconds", default=1800.0, type=float, help="without a step, after which it ends")


def run(arguments: argparse.Namespace) -> int:
    """Trains to the end, each cell from its own checkpoint or result if that belongs to this very run."""
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()
    requests = [request for text in arguments.requests for request in TrainingRequest.read_all(text)]
    with _keeping_reasons([arguments.out / request.cell.id for request in requests]) as unfinished:
        tokens = Tokens.open(arguments.tokens, verify=True)
        cells = [_Cell(request, tokens.digest, arguments.out) for request in requests]
        with contextlib.ExitStack() as held:
            # In one order for everybody: two processes must not wait for each other.
            for folder in sorted(cell.folder for cell in cells):
                held.enter_context(claim_folder(folder))
            for cell in cells:
                if cell.publish():
                    unfinished.remove(cell.folder)
            if unfinished:
                device = held.enter_context(claim_device(arguments.device))
                _Job(cells, unfinished, tokens, device, arguments).run()
    return 0


@contextlib.contextmanager
def _keeping_reasons(folders: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields the folders, for the block to remove from; those left have the error that ends it as their reason."""
    unfinished = list(folders)
    try:
        yield unfinished
    except Exception as error:
        known = str(error) if isinstance(error, UserError) else explain_out_of_memory(error)
        known = known or explain_lost_device(error) or explain_disk_error(error)
        _keep_reason(unfinished, known or f"{type(error).__name__}: {error}")
        if known is None or isinstance(error, UserError):
            raise
        raise UserError(known) from None


def _keep_reason(folders: Sequence[Path], reason: str) -> None:
    failure = Failure(reason, time.time())
    for folder in folders:
        # Where nothing can be written, the log alone has it.
        with contextlib.suppress(UserError):
            failure.write(folder)


class _Cell:
    """A cell's folder: where its result and its checkpoints are, and whose they have to be."""

    def __init__(self, request: TrainingRequest, tokens_digest: str, out: Path) -> None:
        self.request = request
        self.folder = out / request.cell.id
        self.digests = {"request": request.digest, "tokens_digest": tokens_digest, "code": code_digest()}
        self.digests["fingerprint"] = request.fingerprint(tokens_digest, self.digests["code"])
        self.result = Result(self.folder)

    def publish(self) -> bool:
        """Shows the result to everybody, if there is one; clears away what a killed process left."""
        heartbeat.clear(self.folder)
        remove_leftovers(self.folder / CHECKPOINT, *self.result.files)
        if self.result.is_of(self.digests["fingerprint"]):
            self.result.publish()
            checkpoint.clear(self.folder)
            return True
        return False

    def owner(self, device: torch.device) -> str:
        """Whose checkpoints this run can go on from."""
        # Rounding differs between devices and precisions: what one has begun no other goes on with.
        return f"{self.digests['fingerprint']}/{device.type}/{precision_on(device, self.request.training)}"


def even_parts(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """The items in as few parts as hold `most` each, of sizes that differ by one at most: 7 by 6 are 4 and 3."""
    count = math.ceil(len(items) / most) if items else 0
    bounds = [round(part * len(items) / count) for part in range(count + 1)] if count else []
    return [items[first:last] for first, last in pairwise(bounds)]


# Cells that are trained at once, all at the step of their checkpoints.
_Together: TypeAlias = Sequence[tuple[_Cell, Checkpoint | None]]


class _Job:
    """Trains the cells that have no result yet, in stacks as large as the device likes.

    unfinished: the folders of those cells; who gets a result leaves.
    """

    def __init__(
        self,
        cells: Sequence[_Cell],
        unfinished: list[Path],
        tokens: Tokens,
        device: torch.device,
        arguments: argparse.Namespace,
    ) -> None:
        self._cells = cells
        self._unfinished = unfinished
        self._tokens = tokens
        self._device = device
        self._step = step_on(device, arguments.step)
        self._replicas: str = arguments.replicas
        self._checkpoint_seconds: float = arguments.checkpoint_seconds
        self._pulse = Pulse(arguments.hang_seconds, self._tell_hang)
        self._signal: int | None = None

    def run(self) -> None:
        """Trains them all. Exits, with checkpoints written, when a signal asks for it.

        Raises UserError where models do not fit in memory, once the others are trained.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)
        cell_of = {cell.request.cell: cell for cell in self._cells}
        stacks = by_shape([cell.request for cell in self._cells], self._tokens.vocabulary)
        too_large = ""
        with self._pulse.watched():
            for shape, requests in stacks.items():
                cells = [cell_of[request.cell] for request in requests]
                size = model_size(shape, requests[0].model)
                most = replicas_on(self._device.type, self._replicas, size.parameters) or len(cells)
                try:
                    # By all cells, done or not: a stack is to be of the same cells however often it is begun.
                    for part in even_parts(cells, most):
                        self._train_cells([cell for cell in part if cell.folder in self._unfinished])
                except (MemoryError, RuntimeError) as error:
                    reason = explain_out_of_memory(error)
                    if reason is None:
                        raise
                    too_large = too_large or f"{cells[0].request.cell.id}: {reason}"
                    print(too_large, file=sys.stderr)
        if too_large:
            raise UserError(too_large)

    def _tell_hang(self, reason: str) -> None:
        for folder in self._unfinished:
            heartbeat.clear(folder)
        _keep_reason(self._unfinished, reason)

    def _train_cells(self, cells: Sequence[_Cell]) -> None:
        if not cells:
            return
        if self._signal:
            sys.exit(128 + self._signal)
        at_step: dict[int, list[tuple[_Cell, Checkpoint | None]]] = {}
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

    def _saved(self, cells: Sequence[_Cell]) -> list[tuple[_Cell, Checkpoint | None]]:
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
        requests = [cell.request for cell in cells]
        tokens = self._tokens
        trainer = Trainer(requests, tokens.train, tokens.valid, tokens.vocabulary, self._device, self._step)
        saved = [saved for _, saved in stack if saved is not None]
        if saved:
            trainer.load_states(saved[0].step, [of_cell.tensors for of_cell in saved])
            print(f"continuing from step {trainer.step} of {trainer.settings.steps}", file=sys.stderr)
        # A cell's share of the time that its stack took, so that the shares add up to the device's.
        watch = Stopwatch(sum(of_cell.elapsed for of_cell in saved))
        steps = trainer.settings.steps
        name = cells[0].request.cell.id if len(cells) == 1 else f"{len(cells)} cells"
        signs = _SignsOfLife(cells, self._unfinished)
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
                if self._signal or watch.elapsed - saved_at >= self._checkpoint_seconds:
                    self._save(trainer, cells, watch)
                    saved_at = watch.elapsed
                if self._signal:
                    stopped = f"stopped by {signal.Signals(self._signal).name}"
                    print(f"{stopped} at step {trainer.step}: run it again to go on", file=sys.stderr)
                    signs.note(stopped, trainer.step)
                    sys.exit(128 + self._signal)

            trainer.run(after_step=after_step)
            outcomes = trainer.outcomes()
            self._finish(dict(zip(cells, outcomes, strict=True)), trainer, watch.elapsed / len(cells))
        self._pulse.beat()

    def _save(self, trainer: Trainer, cells: Sequence[_Cell], watch: "Stopwatch") -> None:
        share = watch.elapsed / len(cells)
        self._finish({cells[replica]: outcome for replica, outcome in trainer.ended.items()}, trainer, share)
        states = {cells[replica]: state for replica, state in trainer.states().items()}
        first = [cell.folder for cell in states if not (cell.folder / CHECKPOINT).exists()]
        checkpoint.save(
            {
                cell.folder: Checkpoint(trainer.step, share, cell.owner(self._device), state)
                for cell, state in states.items()
            }
        )
        for folder in first:
            heartbeat.note_try(folder, "first checkpoint", trainer.step)

    def _finish(self, ended: Mapping[_Cell, Outcome], trainer: Trainer, seconds: float) -> None:
        """Writes the results of those cells that have none yet, which makes their checkpoints needless."""
        new = {cell: outcome for cell, outcome in ended.items() if cell.folder in self._unfinished}
        if not new:
            return
        keep_all(
            {
                cell.result: _tables(cell.request, trainer, outcome, seconds, cell.digests)
                for cell, outcome in new.items()
            }
        )
        for cell, outcome in new.items():
            cell.result.publish()
            checkpoint.clear(cell.folder)
            heartbeat.clear(cell.folder)
            heartbeat.note_try(cell.folder, outcome.status, trainer.step)
            self._unfinished.remove(cell.folder)


class _SignsOfLife:
    """The heartbeats of the cells of a stack."""

    def __init__(self, cells: Sequence[_Cell], unfinished: Sequence[Path]) -> None:
        self._folders = [cell.folder for cell in cells]
        self._unfinished = unfinished
        self._shown: tuple[float, int] | None = None

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
            before, step = self._shown
            if now - before < heartbeat.SECONDS:
                return
            rate = (trainer.step - step) / (now - before)
        self._shown = now, trainer.step
        sign = Heartbeat.now(trainer.step, trainer.settings.steps, len(self._folders), rate)
        for folder in self._folders:
            if folder in self._unfinished:
                # A disk that is full is told by what has to be written.
                with contextlib.suppress(UserError):
                    sign.write(folder)


def _tables(
    request: TrainingRequest, trainer: Trainer, outcome: Outcome, seconds: float, digests: dict[str, str]
) -> tuple[list[list[Any]], dict[str, Any]]:
    """The rows of history.csv, its header first, and the content of summary.json."""
    steps = len(outcome.history_TM)
    # float32 in nine digits reads back exactly.
    rows: list[list[Any]] = [["step", "learning_rate", *METRICS]]
    for step, metrics in enumerate(outcome.history_TM.tolist()):
        rows.append([step, learning_rate(request, step), *(f"{value:.9g}" for value in metrics)])
    tokens = steps * trainer.tokens_per_step
    gpu = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else None
    return rows, {
        "id": request.cell.id,
        "cell": asdict(request.cell),
        "status": outcome.status,
        "train_loss": outcome.train_loss,
        "valid_loss": outcome.valid_loss,
        "steps": steps,
        "tokens": tokens,
        "flops": tokens * trainer.size.flops_per_token,
        "parameters": trainer.size.parameters,
        "active_parameters": trainer.size.active_parameters,
        "wall_seconds": round(seconds, 3),
        "device": trainer.device.type,
        "precision": trainer.precision,
        "step": trainer.step_mode,
        "replicas": len(trainer.requests),
        **digests,
        "settings": {
            "model": asdict(request.model),
            "training": asdict(request.training),
            "parametrization": request.parametrization.as_row(),
        },
        "machine": provenance.machine() | {"gpu": gpu, "threads": torch.get_num_threads()},
        "versions": provenance.versions("numpy", "safetensors") | {"torch": str(torch.__version__)},
    }
