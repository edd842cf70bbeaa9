"""A cell's folder: its result (history.csv, summary.json and a kept copy of both), and other files of its run.

The summary authenticates both: `history_sha256` covers the history's bytes, and `summary_sha256` covers everything
else in the summary. Only writing a run's result imports torch.
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
    """A result is missing or was altered after it was written; `reason` says how."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder} is damaged ({reason}): delete that folder and run the same command again")
        self.reason = reason


def read_result(folder: Path) -> dict[str, Any]:
    """Reads summary.json after checking that it and history.csv are unaltered.

    Raises DamagedResultError if they are not, and plain UserError if they cannot be read and so may be intact.
    """
    try:
        return _verified((folder / SUMMARY).read_bytes(), file_digest(folder / HISTORY))
    except FileNotFoundError as error:
        raise DamagedResultError(folder, f"{Path(error.filename).name}: {error.strerror}") from None
    except OSError as error:
        raise cannot_be_read(error.filename or folder, error) from None
    except ValueError as error:
        raise DamagedResultError(folder, str(error)) from None


def _sealed(summary: Mapping[str, Any], history_sha256: str) -> bytes:
    """Returns the summary as JSON, with the digests that authenticate it and its history."""
    # Round-trip through JSON, so that the digest is of the values that will be read back.
    plain = json.loads(json.dumps({**summary, "history_sha256": history_sha256}))
    return json_text(plain | {_DIGEST: _digest(plain)}).encode()


def _verified(sealed: bytes, history_sha256: str) -> dict[str, Any]:
    """Reads a summary that `_sealed` wrote. Raises ValueError, with a reason, for anything else."""
    try:
        summary = json.loads(sealed)
    except (ValueError, RecursionError):
        raise ValueError(f"{SUMMARY} is not JSON") from None
    if not isinstance(summary, dict) or _DIGEST not in summary:
        raise ValueError(f"{SUMMARY} has no digest, as in earlier versions")
    if summary[_DIGEST] != _digest(summary):
        raise ValueError(f"{SUMMARY} was altered after it was written")
    if summary.get("history_sha256") != history_sha256:
        raise ValueError(f"{HISTORY} was altered after it was written")
    if "version" not in summary and summary.get("code") in VERSION_OF_CODE:
        summary["version"] = VERSION_OF_CODE[summary["code"]]
        summary["fingerprint"] = fingerprint_of(summary["request"], summary["tokens_digest"], summary["version"])
    return summary


def _digest(summary: Mapping[str, Any]) -> str:
    canonical = json.dumps({key: value for key, value in summary.items() if key != _DIGEST}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Result:
    """The result files in a cell's folder.

    Snakemake deletes a job's outputs before it runs the job, even if another process, or a run that was killed
    before it could report, has finished the cell. The kept copy lets such a job finish in seconds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept = folder / _KEPT

    @property
    def kept_files(self) -> tuple[Path, Path]:
        """The copies of history.csv and summary.json that Snakemake does not delete."""
        return self._kept / HISTORY, self._kept / SUMMARY

    def is_of(self, fingerprint: str) -> bool:
        """Returns whether the kept copy is complete and is from the run with this fingerprint, on any machine."""
        return self._kept_summary().get("fingerprint") == fingerprint

    def _kept_summary(self) -> dict[str, Any]:
        """Returns the kept summary; empty if the kept copy is incomplete or damaged."""
        try:
            return read_result(self._kept)
        except DamagedResultError:
            return {}

    def restore(self, request: str) -> bool:
        """Publishes the kept copy again if it is complete and belongs to the request with this digest; False if not."""
        if self._kept_summary().get("request") != request:
            return False
        with claim_folder(self._folder):
            self.publish()
        return True

    def adopt(self, history: bytes, summary: bytes) -> bool:
        """Keeps and publishes a result from another machine; False if the same result is already here.

        Raises UserError and changes nothing if the result is damaged, is of another cell, or would replace
        a different result.
        """
        name = self._folder.name
        try:
            verified = _verified(summary, hashlib.sha256(history).hexdigest())
            if verified["id"] != name:
                raise ValueError(f"it is the result of {verified['id']}")
            fingerprint = verified["fingerprint"]
        except (ValueError, KeyError) as error:
            raise UserError(f"the result of {name} is damaged ({error}): pack and copy it again") from None
        present = self._kept_summary().get("fingerprint")
        if present is None:
            _write_all({self: (history, summary)})
        elif present != fingerprint:
            raise UserError(
                f"{self._folder} has a result of another config, corpus or version: delete that folder to import this"
                " result"
            )
        self.publish()
        return present is None

    def publish(self) -> None:
        """Copies the kept files to where they are read, unless the same files are already there."""
        for name in (HISTORY, SUMMARY):
            content, shown = (self._kept / name).read_bytes(), self._folder / name
            remove_leftovers(shown)
            with suppress(OSError):
                if shown.read_bytes() == content:
                    continue
            with atomic_write(shown) as file:
                file.write(content)


def keep_all(results: Mapping[Result, tuple[Sequence[Sequence[Any]], Mapping[str, Any]]]) -> None:
    """Writes kept copies, all or none of them, so that cells trained together are done together.

    results: each result's history rows, header first, and its summary.
    """
    contents = {}
    for result, (rows, summary) in results.items():
        history = csv_text(rows[0], rows[1:]).encode()
        contents[result] = history, _sealed(summary, hashlib.sha256(history).hexdigest())
    _write_all(contents)


def _write_all(contents: Mapping[Result, tuple[bytes, bytes]]) -> None:
    with atomic_writes() as write:
        for result, parts in contents.items():
            # The summary comes last, because it authenticates the history.
            for path, content in zip(result.kept_files, parts, strict=True):
                with write(path) as file:
                    file.write(content)


class CellFiles:
    """A cell's folder, for the run whose result and checkpoints it will hold. fingerprint: identifies that run."""

    def __init__(self, request: TrainingRequest, tokens_digest: str, out: Path) -> None:
        self.request, self._tokens_digest = request, tokens_digest
        self.folder = out / request.cell.id
        self.fingerprint = request.fingerprint(tokens_digest)
        self.result = Result(self.folder)

    def publish(self) -> bool:
        """Publishes the result if there is one, and returns whether; deletes what a killed process left behind."""
        heartbeat.clear(self.folder)
        shown = (self.folder / HISTORY, self.folder / SUMMARY)
        remove_leftovers(self.folder / CHECKPOINT, *shown, *self.result.kept_files)
        done = self.result.is_of(self.fingerprint)
        if done:
            self.result.publish()
            checkpoint.clear(self.folder)
        return done

    def owner(self, device: "torch.device") -> str:
        """Returns the fingerprint of the checkpoints that this run can resume from."""
        # Rounding differs between devices and precisions, so a run never resumes on another one.
        from mup_moe.training.device import precision_on

        return f"{self.fingerprint}/{device.type}/{precision_on(device, self.request.training)}"

    def tables(self, trainer: "Trainer", outcome: "Outcome", seconds: float) -> tuple[list[list[Any]], dict[str, Any]]:
        """Returns the rows of history.csv, header first, and the content of summary.json."""
        import torch

        from mup_moe.model.metrics import METRICS
        from mup_moe.training.trainer import learning_rate

        steps = len(outcome.history_TM)
        # Nine digits read back to the exact float32.
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
