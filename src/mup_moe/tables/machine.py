"""The training speed of a machine, from the benchmark of the training step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from mup_moe.analysis.curve import FloatArray
from mup_moe.analysis.runs import read_table
from mup_moe.config.cell import ARCHITECTURES
from mup_moe.files import UserError

START_SECONDS = 2.0  # before a job's first step: its process, imports and digests
# Per parameter and step on a CPU, in steps with few tokens, which memory limits, not arithmetic (lemma_b1_slopes).
_UPDATE_SECONDS = 4e-9


@dataclass(frozen=True, eq=False)
class Machine:
    """The training speed of one CPU thread or one GPU.

    width: (W,), ascending. gflops: (W,), the rate measured at each width. gpu: whether the device is a GPU. of_peers:
    (W,), the rate of transformers models, trained like cells of such an architecture; None if it was not measured.
    """

    name: str
    width: FloatArray
    gflops: FloatArray
    gpu: bool = False
    of_peers: FloatArray | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the MoE rows that benchmarks/step.py wrote, of our model and transformers', trained as in the pipeline.

        Raises UserError, also for rows from several machines.
        """
        columns = {"architecture": str, "default": str, "width": int, "gflops": float, "cpu": str, "threads": int}
        table = read_table(path, columns)
        table = table[table["architecture"] == "moe"]
        if "instructions" in table.columns:
            # The rows with all of the machine's instructions come first.
            table = table[table["instructions"].isin(table["instructions"].iloc[:1])]
        peers = _peers(table)
        table = table[table["default"] == "yes"]
        names = table["cpu"] + ", " + table["threads"].astype(str) + " thread"
        names += np.where(table["threads"] == 1, "", "s")
        gpu = "gpu" in table.columns and bool((table["gpu"] != "").all())
        if "gpu" in table.columns:
            names = table["gpu"].where(table["gpu"] != "", names)
        known = list(dict.fromkeys(names))
        if len(known) != 1:
            raise UserError(f"{path} must hold rows from one machine, not from {' and '.join(known) or 'none'}")
        rates = table.groupby("width")["gflops"].median()
        if not (rates > 0).all():
            raise UserError(f"{path} has a rate that is not positive: measure it again with `make benchmark`")
        of_peers = peers.groupby("width")["gflops"].median().reindex(rates.index)
        measured = None if of_peers.isna().any() else of_peers.to_numpy(dtype=float)
        return cls(known[0], rates.index.to_numpy(dtype=float), rates.to_numpy(dtype=float), gpu, measured)

    def seconds(self, flops: float, width: int, architecture: str) -> float:
        """Returns the duration of this much training; rates are interpolated between the measured widths."""
        rates = self.of_peers if self.of_peers is not None and architecture not in ARCHITECTURES else self.gflops
        rate = np.interp(np.log2(width), np.log2(self.width), rates)
        return float(flops / (1e9 * rate))

    def update_seconds(self, parameters: int, steps: int) -> float:
        """Returns the extra time for updating all parameters in steps with fewer tokens than measured; 0 for a GPU."""
        return 0.0 if self.gpu else _UPDATE_SECONDS * parameters * steps


# How cells of transformers models are trained: eagerly, in float32, with our allocator setting.
_AS_CELLS = {"system": "transformers", "precision": "float32", "step": "eager", "allocator": "kept"}


def _peers(table: pd.DataFrame) -> pd.DataFrame:
    for column, value in _AS_CELLS.items():
        table = table[table[column] == value] if column in table.columns else table[:0]
    return table
