"""The cells that faults strike during training."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from conftest import config_of, results_of
from faults.commands import file_names_in, saved_steps
from mup_moe.analysis.aggregate import run_rows
from mup_moe.files import read_json
from mup_moe.training.request import TrainingRequest
from test_training import train_command

# The values in which two runs of a cell may differ.
VARYING = {"wall_seconds", "summary_sha256", "replicas"}


@dataclass(frozen=True)
class Curve:
    """Cells that share a job, in their own folder, and the folder of the same cells trained without a fault."""

    requests: Sequence[TrainingRequest]
    tokens: Path
    out: Path
    undisturbed: Path

    def within(self, out: Path) -> Self:
        """Returns the same cells in another folder."""
        return replace(self, out=out)

    @property
    def cells(self) -> list[Path]:
        """The folders of the cells."""
        return [self.out / request.cell.id for request in self.requests]

    def train(self, *options: str, also: Sequence[TrainingRequest] = ()) -> list[str]:
        """Returns the command that trains these cells and, in the same job, those of `also`."""
        return train_command([*self.requests, *also], self.tokens, self.out, *options)

    def aggregate(self, table: Path) -> list[str]:
        """Returns the command that aggregates the cells into a table, which must be named runs.csv."""
        first = self.requests[0]
        config = config_of([r.cell for r in self.requests], model=first.model, training=first.training)
        results = results_of(cells=self.out, figure1=table.parent)
        (results / "given.json").write_text(json.dumps(asdict(config)))
        given = ["--config", str(results / "given.json"), "--results", str(results)]
        return [sys.executable, "-m", "mup_moe", "aggregate", "figure1", *given]

    def next_step(self) -> int:
        """Returns the step from which the unfinished cells must resume together."""
        unfinished = [cell for cell in self.cells if not (cell / ".kept" / "summary.json").exists()]
        return min((max(saved_steps(cell), default=0) for cell in unfinished), default=0)

    def assert_as_undisturbed(self) -> None:
        """Asserts that results are those of the undisturbed run, except for `VARYING`, and no other files are left."""
        assert self._results() == self.within(self.undisturbed)._results()
        for cell in self.cells:
            assert file_names_in(cell) - {"tries.jsonl"} == {".lock", "history.csv", "summary.json"}

    def _results(self) -> list[dict[str, Any]]:
        """Returns the rows of runs.csv, the summaries and the histories, without `VARYING`."""
        rows = run_rows([(request.cell.id, request.digest) for request in self.requests], self.out)
        for cell in self.cells:
            rows.append(read_json(cell / "summary.json"))
            rows.append({"history": (cell / "history.csv").read_bytes()})
        return [{key: value for key, value in row.items() if key not in VARYING} for row in rows]
