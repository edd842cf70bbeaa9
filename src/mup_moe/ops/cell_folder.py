"""A cell's folder: its result (history.csv, summary.json and a kept copy of both), and what a run leaves beside it.

The summary vouches for both: `history_sha256` is of the history's bytes, `summary_sha256` of all else
that the summary says. Only what a run writes imports torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mup_moe import provenance
from mup_moe.files import (
    UserError,
    atomic_write,
    atomic_writes,
    cannot_be_read,
    claim_folder,
    csv_text,
    file_digest,
    json_text,
    remove_leftovers,
)
from mup_moe.ops import checkpoint, heartbeat
from mup_moe.ops.checkpoint import CHECKPOINT
from mup_moe.training.request import TrainingRequest, fingerprint_of
from mup_moe.training.version import VERSION, VERSION_OF_CODE

if TYPE_CHECKING:
    import torch

    from mup_moe.training.trainer import Outcome, Trainer

HISTORY, SUMMARY = "history.csv", "summary.json"
_KEPT = ".kept"
_DIGEST = "summary_sha256"


class DamagedResultError(UserError):
    """A result that is missing, or not as it was written; `reason` says in which way."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder} is damaged ({reason}): delete that folder and run the same command again")
        self.reason = reason


def read_result(folder: Path) -> dict[str, Any]:
    """What summary.json says, where it and the history.csv beside it are as they were written.

    Raises DamagedResultError, and UserError where they cannot be read: then they may be right.
    """
    try:
        return _vouched((folder / SUMMARY).read_bytes(), file_digest(folder / HISTORY))
    except FileNotFoundError as error:
        raise DamagedResultError(folder, f"{Path(error.filename).name}: {error.strerror}") from None
    except OSError as error:
        raise cannot_be_read(error.filename or folder, error) from None
    except ValueError as error:
        raise DamagedResultError(folder, str(error)) from None


def _sealed(summary: Mapping[str, Any], history_sha256: str) -> bytes:
    """The summary as JSON, with the digests by which it vouches for itself and for its history."""
    # By way of JSON, as it will be read back.
    told = json.loads(json.dumps({**summary, "history_sha256": history_sha256}))
    return json_text(told | {_DIGEST: _digest(told)}).encode()


def _vouched(summary: bytes, history_sha256: str) -> dict[str, Any]:
    """Reads what `_sealed` made. Raises ValueError, with a reason, for anything else."""
    try:
        told = json.loads(summary)
    except (ValueError, RecursionError):
        raise ValueError(f"{SUMMARY} is not JSON") from None
    if not isinstance(told, dict) or _DIGEST not in told:
        raise ValueError(f"{SUMMARY} lacks its digest, as that of an earlier version does")
    if told[_DIGEST] != _digest(told):
        raise ValueError(f"{SUMMARY} is not as it was written")
    if told.get("history_sha256") != history_sha256:
        raise ValueError(f"{HISTORY} is not as it was written")
    if "version" not in told and told.get("code") in VERSION_OF_CODE:
        told["version"] = VERSION_OF_CODE[told["code"]]
        told["fingerprint"] = fingerprint_of(told["request"], told["tokens_digest"], told["version"])
    return told


def _digest(told: Mapping[str, Any]) -> str:
    canonical = json.dumps({key: value for key, value in told.items() if key != _DIGEST}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Result:
    """The result files of a cell's folder.

    Snakemake deletes a job's outputs before it runs the job, also where another process, or a run that was killed
    before it could say so, has finished the cell. The kept copy makes such a job a matter of seconds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept = folder / _KEPT

    @property
    def kept_files(self) -> tuple[Path, Path]:
        """The copies that outlive Snakemake's: history.csv and summary.json."""
        return self._kept / HISTORY, self._kept / SUMMARY

    def is_of(self, fingerprint: str) -> bool:
        """Whether the kept copy is whole and of the run with this fingerprint, on any machine."""
        return self._kept_summary().get("fingerprint") == fingerprint

    def _kept_summary(self) -> dict[str, Any]:
        """The kept summary; empty if the kept copy is not whole."""
        try:
            return read_result(self._kept)
        except DamagedResultError:
            return {}

    def mend(self, request: str) -> bool:
        """Publishes the kept copy again if it is whole and of the request with this digest; False if not."""
        if self._kept_summary().get("request") != request:
            return False
        with claim_folder(self._folder):
            self.publish()
        return True

    def adopt(self, history: bytes, summary: bytes) -> bool:
        """Keeps and publishes what another machine kept; False where the same is there already.

        Raises UserError, and changes nothing, for what is not whole, of another cell, or in the place of
        another result.
        """
        name = self._folder.name
        try:
            told = _vouched(summary, hashlib.sha256(history).hexdigest())
            if told["id"] != name:
                raise ValueError(f"it is that of {told['id']}")
            fingerprint = told["fingerprint"]
        except (ValueError, KeyError) as error:
            raise UserError(f"the result of {name} is not whole ({error}): pack and copy it again") from None
        there = self._kept_summary().get("fingerprint")
        if there is None:
            _write_all({self: (history, summary)})
        elif there != fingerprint:
            another = "has a result of another config, corpus or version"
            raise UserError(f"{self._folder} {another}: delete that folder to have this")
        self.publish()
        return there is None

    def publish(self) -> None:
        """Copies what is kept to where everybody reads it, and is not the same there already."""
        for name in (HISTORY, SUMMARY):
            content, shown = (self._kept / name).read_bytes(), self._folder / name
            remove_leftovers(shown)
            with suppress(OSError):
                if shown.read_bytes() == content:
                    continue
            with atomic_write(shown) as file:
                file.write(content)


def keep_all(results: Mapping[Result, tuple[Sequence[Sequence[Any]], Mapping[str, Any]]]) -> None:
    """Writes kept copies, all or none of them: cells that were trained together are done together.

    results: the rows of each history, its header first, and what the summary says.
    """
    contents = {}
    for result, (rows, summary) in results.items():
        history = csv_text(rows[0], rows[1:]).encode()
        contents[result] = history, _sealed(summary, hashlib.sha256(history).hexdigest())
    _write_all(contents)


def _write_all(contents: Mapping[Result, tuple[bytes, bytes]]) -> None:
    with atomic_writes() as write:
        for result, parts in contents.items():
            # The summary, which vouches for the history, comes after it.
            for path, content in zip(result.kept_files, parts, strict=True):
                with write(path) as file:
                    file.write(content)


class CellFiles:
    """A cell's folder, and the run whose result and checkpoints it is to have. fingerprint: of that run."""

    def __init__(self, request: TrainingRequest, tokens_digest: str, out: Path) -> None:
        self.request, self._tokens_digest = request, tokens_digest
        self.folder = out / request.cell.id
        self.fingerprint = request.fingerprint(tokens_digest)
        self.result = Result(self.folder)

    def publish(self) -> bool:
        """Shows the result to everybody, if there is one; clears away what a killed process left."""
        heartbeat.clear(self.folder)
        shown = (self.folder / HISTORY, self.folder / SUMMARY)
        remove_leftovers(self.folder / CHECKPOINT, *shown, *self.result.kept_files)
        done = self.result.is_of(self.fingerprint)
        if done:
            self.result.publish()
            checkpoint.clear(self.folder)
        return done

    def owner(self, device: "torch.device") -> str:
        """Whose checkpoints this run can go on from."""
        # Rounding differs between devices and precisions: what one has begun no other goes on with.
        from mup_moe.training.device import precision_on

        return f"{self.fingerprint}/{device.type}/{precision_on(device, self.request.training)}"

    def tables(self, trainer: "Trainer", outcome: "Outcome", seconds: float) -> tuple[list[list[Any]], dict[str, Any]]:
        """The rows of history.csv, its header first, and the content of summary.json."""
        import torch

        from mup_moe.model.metrics import METRICS
        from mup_moe.training.trainer import learning_rate

        steps = len(outcome.history_TM)
        # float32 in nine digits reads back exactly.
        rows: list[list[Any]] = [["step", "learning_rate", *METRICS]]
        for step, metrics in enumerate(outcome.history_TM.tolist()):
            rows.append([step, learning_rate(self.request, step), *(f"{value:.9g}" for value in metrics)])
        tokens = steps * trainer.tokens_per_step
        gpu = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else None
        return rows, {
            "id": self.request.cell.id,
            "cell": asdict(self.request.cell),
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
            "request": self.request.digest,
            "tokens_digest": self._tokens_digest,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "code": provenance.code_digest(),
            "settings": {
                "model": asdict(self.request.model),
                "training": asdict(self.request.training),
                "parametrization": self.request.parametrization.as_row(),
            }
            | ({"architecture": self.request.architecture.as_data()} if self.request.architecture else {}),
            "machine": provenance.machine() | {"gpu": gpu, "threads": torch.get_num_threads()},
            "versions": provenance.versions("numpy", "safetensors", *self.request.packages)
            | {"torch": str(torch.__version__)},
        }
