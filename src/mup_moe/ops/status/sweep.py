"""How a whole sweep stands, as a value."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from mup_moe.config.cell import Cell
from mup_moe.files import is_held
from mup_moe.ops.status.survey import CellStatus, State, corpus_state, survey
from mup_moe.ops.status.time_left import time_left
from mup_moe.sweep import Sweep


class SweepStatus:
    """Figures, and what they need.

    snakemake: whether one works in the folder `results`. corpora: name -> its state in words. probes: name -> how
    many widths are measured, and of how many.
    """

    def __init__(
        self,
        sweep: Sweep,
        figures: Mapping[str, Sequence[Cell]],
        probes: Collection[str],
        benchmark: Path,
        now: float,
    ) -> None:
        """Reads the results. benchmark: of the training step. now: seconds since the epoch."""
        self.results, self.figures, every = sweep.results, figures, list(chain.from_iterable(figures.values()))
        self.snakemake = is_held(sweep.results)
        corpora = dict.fromkeys([*map(sweep.corpus, every), *map(sweep.probe_corpus, probes)])
        self.corpora = {corpus: corpus_state(corpus, sweep.results) for corpus in corpora}
        self.probes = {name: _measured(sweep.probe_values(name).values()) for name in probes}
        self.cells = {status.cell: status for status in survey(sweep, every, now)}
        self.time_left = time_left(sweep, list(self.cells.values()), benchmark)

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
            "corpora": self.corpora,
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
