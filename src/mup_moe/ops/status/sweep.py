"""How a whole sweep stands, as a value."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from mup_moe.config.cell import Cell
from mup_moe.config.settings import ProbeSettings
from mup_moe.files import is_held
from mup_moe.ops.status.survey import CellStatus, State, corpus_state, survey
from mup_moe.ops.status.time_left import TimeLeft, time_left
from mup_moe.sweep import Sweep


@dataclass(frozen=True)
class SweepStatus:
    """Figures, and what they need.

    snakemake: whether one works in the folder `results`. corpora: name -> its state in words. probes:
    name -> how many widths are measured, and of how many.
    """

    results: Path
    snakemake: bool
    corpora: Mapping[str, str]
    probes: Mapping[str, tuple[int, int]]
    figures: Mapping[str, Sequence[Cell]]
    cells: Mapping[Cell, CellStatus]
    time_left: TimeLeft

    @classmethod
    def of(
        cls,
        sweep: Sweep,
        figures: Mapping[str, Sequence[Cell]],
        probes: Mapping[str, ProbeSettings],
        benchmark: Path,
        now: float,
    ) -> Self:
        """Reads the results. benchmark: of the training step. now: seconds since the epoch."""
        config, results = sweep.config, sweep.results
        every = [cell for cells in figures.values() for cell in cells]
        cells = {status.cell: status for status in survey(sweep, every, now)}
        setups = [*(config.figures[name].setup for name in figures), *(probe.setup for probe in probes.values())]
        corpora = dict.fromkeys(config.setups[setup].corpus for setup in setups)
        return cls(
            results=results,
            snakemake=is_held(results),
            corpora={corpus: corpus_state(corpus, results) for corpus in corpora},
            probes={name: _measured(sweep.probe_values(name).values()) for name in probes},
            figures=figures,
            cells=cells,
            time_left=time_left(sweep, list(cells.values()), benchmark),
        )

    def count(self, cells: Iterable[Cell]) -> dict[str, int]:
        """State -> how many of these cells are in it; every state is there."""
        counts = Counter(self.cells[cell].state for cell in cells)
        return {state.value: counts[state] for state in State}

    def log_of(self, cell: CellStatus) -> Path:
        """Where a cell's job writes what it says."""
        return self.results / "logs" / "train" / f"{cell.job}.log"

    def as_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        shown_in: dict[Cell, list[str]] = {cell: [] for cell in self.cells}
        for name, shown in self.figures.items():
            for cell in shown:
                shown_in[cell].append(name)
        return {
            "snakemake": self.snakemake,
            "corpora": dict(self.corpora),
            "probes": {name: {"measured": done, "widths": widths} for name, (done, widths) in self.probes.items()},
            "figures": {name: self.count(cells) for name, cells in self.figures.items()},
            "total": self.count(self.cells),
            "time_left": asdict(self.time_left),
            "cells": {
                cell.id: {
                    "state": status.state.value,
                    "figures": shown_in[cell],
                    "job": status.job,
                    "log": str(self.log_of(status)),
                    "step": status.step,
                    "steps": status.steps,
                    "reason": status.reason,
                    "heartbeat": status.heartbeat and asdict(status.heartbeat),
                    "age": status.age,
                }
                for cell, status in self.cells.items()
            },
        }


def _measured(values: Collection[Path]) -> tuple[int, int]:
    return sum(path.exists() for path in values), len(values)
