"""A cell's result: history.csv and summary.json, and a kept copy that outlives them."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mup_moe.files import UserError, atomic_write, file_digest, read_json, write_csv, write_json

HISTORY, SUMMARY = "history.csv", "summary.json"


class Result:
    """The result files of a cell's folder.

    Snakemake deletes a job's outputs before it runs the job, also where another process, or a run
    that was killed before it could say so, has finished the cell. The kept copy makes such a job a
    matter of seconds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept = folder / ".kept"

    @property
    def files(self) -> list[Path]:
        """Every file that a result writes."""
        return [folder / name for folder in (self._folder, self._kept) for name in (HISTORY, SUMMARY)]

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
            summary = read_json(self._kept / SUMMARY)
            whole = summary["history_sha256"] == file_digest(self._kept / HISTORY)
            return summary if whole else {}
        except (UserError, OSError, KeyError, TypeError):
            return {}

    def keep(self, history: Sequence[Sequence[Any]], summary: dict[str, Any]) -> None:
        """Writes the kept copy; the summary, which vouches for the history, comes last."""
        (self._kept / SUMMARY).unlink(missing_ok=True)
        write_csv(self._kept / HISTORY, history[0], history[1:])
        write_json(self._kept / SUMMARY, summary | {"history_sha256": file_digest(self._kept / HISTORY)})

    def adopt(self, history: bytes, summary: bytes) -> bool:
        """Keeps and publishes what another machine kept; False where the same is there already.

        Raises UserError, and changes nothing, for what is not whole, of another cell, or in the place of
        another result.
        """
        try:
            told = json.loads(summary)
            whole = told["history_sha256"] == hashlib.sha256(history).hexdigest()
            whole &= told["id"] == self._folder.name
            fingerprint = told["fingerprint"]
        except (ValueError, KeyError, TypeError):
            whole, fingerprint = False, None
        if not whole:
            raise UserError(f"the result of {self._folder.name} is not whole: pack and copy it again")
        there = self._kept_summary().get("fingerprint")
        if there not in (None, fingerprint):
            raise UserError(
                f"{self._folder} has a result of another config, corpus or version: delete that folder to have this"
            )
        if there is None:
            (self._kept / SUMMARY).unlink(missing_ok=True)
            for path, content in zip(self.kept_files, (history, summary), strict=True):
                with atomic_write(path) as file:
                    file.write(content)
        self.publish()
        return there is None

    def publish(self) -> None:
        """Copies what is kept to where everybody reads it."""
        for name in (HISTORY, SUMMARY):
            with (self._kept / name).open("rb") as source, atomic_write(self._folder / name) as target:
                shutil.copyfileobj(source, target)
