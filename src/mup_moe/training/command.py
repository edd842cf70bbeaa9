"""Trains cells of one shape: python -m mup_moe train."""

import argparse
import contextlib
import gc
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from mup_moe import provenance
from mup_moe.config.settings import STEPS
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError, claim_folder, remove_leftovers
from mup_moe.model.shape import ModelShape
from mup_moe.model.transformer import model_size
from mup_moe.training import checkpoint
from mup_moe.training.checkpoint import Checkpoint, DamagedCheckpointError
from mup_moe.training.code import code_digest
from mup_moe.training.device import claim_device, keep_freed_pages, precision_on, replicas_on, step_on
from mup_moe.training.request import TrainingRequest
from mup_moe.training.result import Result
from mup_moe.training.stack import METRICS
from mup_moe.training.trainer import Outcome, Trainer, learning_rate

T = TypeVar("T")

CHECKPOINT = "checkpoint.safetensors"


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
    help_request = "a training request as JSON; once for each cell, all of one shape"
    parser.add_argument("--request", required=True, action="append", dest="requests", help=help_request)
    parser.add_argument("--tokens", required=True, type=Path, help="folder of a tokenized corpus")
    parser.add_argument("--out", required=True, type=Path, help="the folder that has a folder for each cell")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--replicas", default="auto", help="cells trained at once, or auto")
    parser.add_argument("--step", default="auto", choices=["auto", *STEPS])
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--checkpoint-seconds", default=60.0, type=float)


def run(arguments: argparse.Namespace) -> int:
    """Trains to the end, each cell from its own checkpoint or result if that belongs to this very run."""
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()
    requests = [request for text in arguments.requests for request in TrainingRequest.read_all(text)]
    tokens = Tokens.open(arguments.tokens, verify=True)
    cells = [_Cell(request, tokens.digest, arguments.out) for request in requests]
    try:
        with contextlib.ExitStack() as held:
            # In one order for everybody: two processes must not wait for each other.
            for folder in sorted(cell.folder for cell in cells):
                held.enter_context(claim_folder(folder))
            pending = [cell for cell in cells if not cell.publish()]
            if pending:
                device = held.enter_context(claim_device(arguments.device))
                _Job(pending, tokens, device, arguments).run()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{requests[0].cell.id} does not fit in the GPU's memory: lower `batch_size`, or `execution.replicas`"
            f" if it is set ({error})"
        ) from None
    return 0


class _Cell:
    """A cell's folder: where its result and its checkpoint are, and whose they have to be."""

    def __init__(self, request: TrainingRequest, tokens_digest: str, out: Path) -> None:
        self.request = request
        self.folder = out / request.cell.id
        self.checkpoint = self.folder / CHECKPOINT
        self.digests = {"request": request.digest, "tokens_digest": tokens_digest, "code": code_digest()}
        self.digests["fingerprint"] = request.fingerprint(tokens_digest, self.digests["code"])
        self._result = Result(self.folder)

    @property
    def is_done(self) -> bool:
        """Whether there is a result of this very run."""
        return self._result.is_of(self.digests["fingerprint"])

    def publish(self) -> bool:
        """Shows the result to everybody, if there is one; clears away what a killed process left."""
        remove_leftovers(self.checkpoint, *self._result.files)
        if self.is_done:
            self._result.publish()
            return True
        return False

    def finish(self, trainer: Trainer, outcome: Outcome, seconds: float) -> None:
        """Writes the result, which makes the checkpoint needless; once is enough."""
        if not self.is_done:
            self._result.keep(*_tables(self.request, trainer, outcome, seconds, self.digests))
            self._result.publish()
            self.checkpoint.unlink(missing_ok=True)

    def save(self, trainer: Trainer, state: Mapping[str, Tensor], seconds: float) -> None:
        """Writes a checkpoint."""
        checkpoint.save(self.checkpoint, Checkpoint(trainer.step, seconds, self._owner(trainer.device), state))

    def saved_step(self) -> int:
        """The step of the checkpoint, by what its file says; 0 where there is none."""
        return checkpoint.step_of(self.checkpoint)

    def saved(self, device: torch.device) -> Checkpoint | None:
        """The checkpoint, if there is one of this very run on this kind of device."""
        if not self.checkpoint.exists():
            return None
        try:
            saved = checkpoint.load(self.checkpoint)
        except DamagedCheckpointError as error:
            print(f"{self.checkpoint} is damaged ({error}): starting from step 0", file=sys.stderr)
            return None
        if saved.fingerprint != self._owner(device):
            print(f"{self.checkpoint} is of another config, corpus or version: starting from step 0", file=sys.stderr)
            return None
        return saved

    def _owner(self, device: torch.device) -> str:
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
    """Cells that have no result yet, trained in stacks as large as the device likes."""

    def __init__(
        self, cells: Sequence[_Cell], tokens: Tokens, device: torch.device, arguments: argparse.Namespace
    ) -> None:
        self._cells = cells
        self._tokens = tokens
        self._device = device
        self._step = step_on(device, arguments.step)
        request = cells[0].request
        size = model_size(ModelShape.of(request.cell, request.model, tokens.vocabulary), request.model)
        self._replicas = replicas_on(device, arguments.replicas, size.parameters)
        self._may_split = arguments.replicas == "auto"
        self._checkpoint_seconds: float = arguments.checkpoint_seconds
        self._signal: int | None = None

    def run(self) -> None:
        """Trains them all. Exits, with checkpoints written, when a signal asks for it."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)
        self._train_cells(self._cells, self._replicas or len(self._cells))

    def _train_cells(self, cells: Sequence[_Cell], most: int) -> None:
        # Cells that were interrupted apart are not at the same step: each step is a stack of its own.
        for together in even_parts(sorted(cells, key=_Cell.saved_step), most):
            at_step: dict[int, list[tuple[_Cell, Checkpoint | None]]] = {}
            for cell in together:
                saved = cell.saved(self._device)
                at_step.setdefault(saved.step if saved else 0, []).append((cell, saved))
            for stack in at_step.values():
                if not self._fits(stack):
                    half = (len(stack) + 1) // 2
                    print(f"{len(stack)} cells do not fit in the GPU's memory at once: trying {half}", file=sys.stderr)
                    self._train_cells([cell for cell, _ in stack if not cell.is_done], half)

    def _fits(self, stack: _Together) -> bool:
        """Trains a stack, unless it has more cells than the GPU has memory for."""
        try:
            self._train(stack)
            return True
        except torch.OutOfMemoryError:
            if len(stack) == 1 or not self._may_split:
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
        with tqdm(total=steps, initial=trainer.step, desc=name, unit="step", mininterval=5, ascii=True) as bar:
            saved_at = watch.elapsed

            def after_step(trainer: Trainer) -> None:
                nonlocal saved_at
                bar.update()
                if trainer.step == steps:
                    return  # what is left takes no longer than a checkpoint
                if self._signal or watch.elapsed - saved_at >= self._checkpoint_seconds:
                    self._save(trainer, cells, watch)
                    saved_at = watch.elapsed
                if self._signal:
                    print(
                        f"stopped by {signal.Signals(self._signal).name} at step {trainer.step}: run it again to go on",
                        file=sys.stderr,
                    )
                    sys.exit(128 + self._signal)

            trainer.run(after_step=after_step)
        for cell, outcome in zip(cells, trainer.outcomes(), strict=True):
            cell.finish(trainer, outcome, watch.elapsed / len(cells))

    def _save(self, trainer: Trainer, cells: Sequence[_Cell], watch: "Stopwatch") -> None:
        share = watch.elapsed / len(cells)
        for replica, state in trainer.states().items():
            cells[replica].save(trainer, state, share)
        for replica, outcome in trainer.ended.items():
            cells[replica].finish(trainer, outcome, share)


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
