"""Trains one cell: python -m mup_moe train."""

import argparse
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mup_moe import provenance
from mup_moe.data.tokens import SPLITS, Tokens
from mup_moe.files import UserError, claim_folder, remove_leftovers
from mup_moe.training import checkpoint
from mup_moe.training.checkpoint import Checkpoint, DamagedCheckpointError
from mup_moe.training.code import code_digest
from mup_moe.training.device import claim_device
from mup_moe.training.request import TrainingRequest
from mup_moe.training.result import Result
from mup_moe.training.trainer import METRICS, Outcome, Trainer, learning_rate, precision_on

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
    parser.add_argument("--request", required=True, help="a training request as JSON")
    parser.add_argument("--tokens", required=True, type=Path, help="folder of a tokenized corpus")
    parser.add_argument("--out", required=True, type=Path, help="the cell's folder")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--checkpoint-seconds", default=60.0, type=float)


def run(arguments: argparse.Namespace) -> int:
    """Trains to the end, from the folder's checkpoint or result if it belongs to this very run."""
    torch.set_num_threads(arguments.threads)
    request = TrainingRequest.from_json(arguments.request)
    tokens = Tokens.open(arguments.tokens, verify=True)
    tokens_digest = "-".join(tokens.digests[split][:16] for split in SPLITS)
    digests = {"request": request.digest, "tokens_digest": tokens_digest, "code": code_digest()}
    digests["fingerprint"] = request.fingerprint(tokens_digest, digests["code"])
    result = Result(arguments.out)
    try:
        with claim_folder(arguments.out), claim_device(arguments.device) as device:
            remove_leftovers(arguments.out / CHECKPOINT, *result.files)
            # Rounding differs between devices and precisions: what one wrote serves that one alone.
            owner = f"{digests['fingerprint']}/{device.type}/{precision_on(device, request.training)}"
            if not result.is_of(owner):
                trainer = Trainer([request], tokens.train, tokens.valid, tokens.vocabulary, device)
                _train(trainer, arguments, owner, result, digests)
            result.publish()
    except torch.OutOfMemoryError as error:
        raise UserError(f"{request.cell.id} does not fit in the GPU's memory: lower `batch_size` ({error})") from None
    return 0


def _train(
    trainer: Trainer, arguments: argparse.Namespace, owner: str, result: Result, digests: dict[str, str]
) -> None:
    path = arguments.out / CHECKPOINT
    watch = _resume(trainer, path, owner)
    _Interruptible(path, owner, watch, arguments.checkpoint_seconds).train(trainer)
    (outcome,) = trainer.outcomes()
    result.keep(owner, *_tables(trainer, outcome, watch.elapsed, digests))
    path.unlink(missing_ok=True)


def _resume(trainer: Trainer, path: Path, owner: str) -> Stopwatch:
    if not path.exists():
        return Stopwatch()
    try:
        saved = checkpoint.load(path)
    except DamagedCheckpointError as error:
        print(f"{path} is damaged ({error}): starting from step 0", file=sys.stderr)
        return Stopwatch()
    if saved.fingerprint != owner:
        print(f"{path} is of another config, corpus or version: starting from step 0", file=sys.stderr)
        return Stopwatch()
    trainer.load_state(saved.step, saved.tensors)
    print(f"continuing from step {saved.step} of {trainer.settings.steps}", file=sys.stderr)
    return Stopwatch(saved.elapsed)


class _Interruptible:
    """Trains with a checkpoint every so often, and one more when asked to stop."""

    def __init__(self, path: Path, owner: str, watch: Stopwatch, every_seconds: float) -> None:
        self._path = path
        self._owner = owner
        self._watch = watch
        self._every_seconds = every_seconds
        self._saved_at = watch.elapsed
        self._signal: int | None = None

    def train(self, trainer: Trainer) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)
        with tqdm(total=trainer.settings.steps, initial=trainer.step, unit="step", mininterval=5, ascii=True) as bar:

            def after_step(trainer: Trainer) -> None:
                bar.update()
                if trainer.step == trainer.settings.steps:
                    return  # what is left takes no longer than a checkpoint
                if self._signal or self._watch.elapsed - self._saved_at >= self._every_seconds:
                    self._save(trainer)
                if self._signal:
                    print(
                        f"stopped by {signal.Signals(self._signal).name} at step {trainer.step}: run it again to go on",
                        file=sys.stderr,
                    )
                    sys.exit(128 + self._signal)

            trainer.run(after_step=after_step)

    def _remember(self, number: int, _frame: Any) -> None:
        self._signal = number

    def _save(self, trainer: Trainer) -> None:
        checkpoint.save(self._path, Checkpoint(trainer.step, self._watch.elapsed, self._owner, trainer.state()))
        self._saved_at = self._watch.elapsed


def _tables(
    trainer: Trainer, outcome: Outcome, seconds: float, digests: dict[str, str]
) -> tuple[list[list[Any]], dict[str, Any]]:
    """The rows of history.csv, its header first, and the content of summary.json."""
    (request,) = trainer.requests
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
        **digests,
        "settings": {
            "model": asdict(request.model),
            "training": asdict(request.training),
            "parametrization": request.parametrization.as_row(),
        },
        "machine": provenance.machine() | {"gpu": gpu, "threads": torch.get_num_threads()},
        "versions": provenance.versions("numpy", "safetensors") | {"torch": str(torch.__version__)},
    }
