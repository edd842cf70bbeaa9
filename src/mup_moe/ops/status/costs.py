"""What training steps cost, by the benchmark of a machine."""

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
    """What steps cost one process.

    flops_of_step: of each cell. machine: whose benchmark tells how long they take, or why none does. Without
    one, seconds mean something in proportion to each other only.
    """

    flops_of_step: Mapping[Cell, int]
    machine: Machine | UserError

    @classmethod
    def of(cls, sweep: Sweep, cells: Iterable[Cell], benchmark: Path) -> Self:
        """Counts the FLOPs of these cells. Raises UserError where a tokenizer's files cannot be read.

        benchmark: of the training step, a CSV.
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
        """How long one process takes for so much training of models such as a cell's."""
        if isinstance(self.machine, UserError):
            return flops / _FLAT_RATE
        return self.machine.seconds(flops, cell.width, cell.architecture)

    def seconds_of_step(self, cell: Cell) -> float:
        """How long a step of a cell takes, where others share the process with it: its share."""
        return self.seconds(self.flops_of_step[cell], cell)


def _vocabulary(sweep: Sweep, corpus: str) -> int:
    try:
        return Tokens.open(sweep.tokens(corpus)).vocabulary
    except (UserError, OSError):
        return sweep.vocabulary(corpus)
