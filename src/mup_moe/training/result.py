"""A cell's result: history.csv and summary.json, and a kept copy that outlives them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mup_moe.files import UserError, atomic_write, file_digest, make_folder, read_json, write_csv, write_json

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

    def is_of(self, owner: str) -> bool:
        """Whether the kept copy is whole and of this very run."""
        return self._kept_summary().get("owner") == owner

    def answers(self, request: str, code: str) -> bool:
        """Whether the kept copy is whole and of the request and the code with these digests, on any machine."""
        summary = self._kept_summary()
        return (summary.get("request"), summary.get("code")) == (request, code)

    def _kept_summary(self) -> dict[str, Any]:
        """The kept summary; empty if the kept copy is not whole."""
        try:
            summary = read_json(self._kept / SUMMARY)
            whole = summary["history_sha256"] == file_digest(self._kept / HISTORY)
            return summary if whole else {}
        except (UserError, OSError, KeyError, TypeError):
            return {}

    def keep(self, owner: str, history: Sequence[Sequence[Any]], summary: dict[str, Any]) -> None:
        """Writes the kept copy; the summary, which vouches for the history, comes last."""
        (self._kept / SUMMARY).unlink(missing_ok=True)
        write_csv(self._kept / HISTORY, history[0], history[1:])
        digest = file_digest(self._kept / HISTORY)
        write_json(self._kept / SUMMARY, summary | {"owner": owner, "history_sha256": digest})

    def adopt(self, history: bytes, summary: bytes) -> bool:
        """Keeps and publishes what another machine kept; returns whether it is whole."""
        make_folder(self._kept)
        for path, content in zip(self.kept_files, (history, summary), strict=True):
            with atomic_write(path) as file:
                file.write(content)
        whole = bool(self._kept_summary())
        if whole:
            self.publish()
        return whole

    def publish(self) -> None:
        """Copies what is kept to where everybody reads it."""
        for name in (HISTORY, SUMMARY):
            with (self._kept / name).open("rb") as source, atomic_write(self._folder / name) as target:
                shutil.copyfileobj(source, target)
