"""A cell's result: history.csv and summary.json, and a kept copy that outlives them."""

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

    def is_of(self, owner: str) -> bool:
        """Whether the kept copy is whole and of this very run."""
        try:
            summary = read_json(self._kept / SUMMARY)
            return bool(summary["owner"] == owner and summary["history_sha256"] == file_digest(self._kept / HISTORY))
        except (UserError, OSError, KeyError, TypeError):
            return False

    def keep(self, owner: str, history: Sequence[Sequence[Any]], summary: dict[str, Any]) -> None:
        """Writes the kept copy; the summary, which vouches for the history, comes last."""
        (self._kept / SUMMARY).unlink(missing_ok=True)
        write_csv(self._kept / HISTORY, history[0], history[1:])
        digest = file_digest(self._kept / HISTORY)
        write_json(self._kept / SUMMARY, summary | {"owner": owner, "history_sha256": digest})

    def publish(self) -> None:
        """Copies what is kept to where everybody reads it."""
        for name in (HISTORY, SUMMARY):
            with (self._kept / name).open("rb") as source, atomic_write(self._folder / name) as target:
                shutil.copyfileobj(source, target)
