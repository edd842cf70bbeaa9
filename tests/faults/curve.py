"""The cells that faults strike while they are trained."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from conftest import config_of, results_of
from faults.commands import left_in, saved_steps
from mup_moe.analysis.aggregate import run_rows
from mup_moe.files import read_json
from mup_moe.training.request import TrainingRequest
from test_training import train_command

# What two runs of a cell may differ in.
VARYING = {"wall_seconds", "summary_sha256", "replicas"}


@dataclass(frozen=True)
class Curve:
    """Cells that share a job, in a folder of their own, and the same cells as trained without disturbance."""

    requests: Sequence[TrainingRequest]
    tokens: Path
    out: Path
    undisturbed: Path

    def within(self, out: Path) -> Self:
        """The same cells in another folder."""
        return replace(self, out=out)

    @property
    def cells(self) -> list[Path]:
        """Their folders."""
        return [self.out / request.cell.id for request in self.requests]

    def train(self, *options: str, also: Sequence[TrainingRequest] = ()) -> list[str]:
        """The command that trains them, and others in the same job."""
        return train_command([*self.requests, *also], self.tokens, self.out, *options)

    def aggregate(self, table: Path) -> list[str]:
        """The command that collects them into a table, which is called runs.csv."""
        first = self.requests[0]
        config = config_of([r.cell for r in self.requests], model=first.model, training=first.training)
        results = results_of(cells=self.out, figure1=table.parent)
        (results / "given.json").write_text(json.dumps(asdict(config)))
        given = ["--config", str(results / "given.json"), "--results", str(results)]
        return [sys.executable, "-m", "mup_moe", "aggregate", "figure1", *given]

    def next_step(self) -> int:
        """The step that they have to go on from, together."""
        unfinished = [cell for cell in self.cells if not (cell / ".kept" / "summary.json").exists()]
        return min((max(saved_steps(cell), default=0) for cell in unfinished), default=0)

    def assert_as_undisturbed(self) -> None:
        """Histories, summaries and rows of runs.csv are the same, seconds apart. No other files are left."""
        assert self._told() == self.within(self.undisturbed)._told()
        for cell in self.cells:
            assert left_in(cell) - {"tries.jsonl"} == {".lock", "history.csv", "summary.json"}

    def _told(self) -> list[dict[str, Any]]:
        rows = run_rows([(request.cell.id, request.digest) for request in self.requests], self.out)
        for cell in self.cells:
            rows.append(read_json(cell / "summary.json"))
            rows.append({"history": (cell / "history.csv").read_bytes()})
        return [{key: value for key, value in row.items() if key not in VARYING} for row in rows]
