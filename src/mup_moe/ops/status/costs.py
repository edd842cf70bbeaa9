"""Estimates what training steps cost from the benchmark of a machine."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Self

from mup_moe.config.cell import Cell
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError
from mup_moe.model.inventory import size_of
from mup_moe.sweep import Sweep
from mup_moe.tables.machine import Machine

_FLAT_RATE = 1e9


@dataclass(frozen=True)
class Costs:
    """The cost of training steps for one process.

    flops_of_step: FLOPs of one step of each cell. machine: the benchmarked machine, or the error if there is no
    benchmark. Then seconds are meaningful only relative to each other.
    """

    flops_of_step: Mapping[Cell, int]
    machine: Machine | UserError

    @classmethod
    def of(cls, sweep: Sweep, cells: Iterable[Cell], benchmark: Path) -> Self:
        """Counts the FLOPs of these cells. Raises UserError if a tokenizer's files cannot be read.

        benchmark: the CSV of the training-step benchmark.
        """
        vocabulary = cache(partial(_vocabulary, sweep))
        flops = {}
        for cell in cells:
            setup = sweep.config.setups[cell.setup]
            size = size_of(cell, setup.model, vocabulary(setup.corpus), sweep.config.architecture(cell))
            flops[cell] = setup.tokens_per_step * size.flops_per_token
        try:
            return cls(flops, Machine.read(benchmark))
        except UserError as error:
            return cls(flops, error)

    def seconds(self, flops: float, cell: Cell) -> float:
        """Returns how long one process takes to train `flops` of models such as the cell's."""
        if isinstance(self.machine, UserError):
            return flops / _FLAT_RATE
        return self.machine.seconds(flops, cell.width, cell.architecture)

    def seconds_of_step(self, cell: Cell) -> float:
        """Returns the seconds of one step of a cell; if cells share a process, this cell's share of a step."""
        return self.seconds(self.flops_of_step[cell], cell)


def _vocabulary(sweep: Sweep, corpus: str) -> int:
    try:
        return Tokens.open(sweep.tokens(corpus)).vocabulary
    except (UserError, OSError):
        return sweep.vocabulary(corpus)
