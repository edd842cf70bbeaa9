"""What training steps cost, by the benchmark of a machine."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mup_moe.config.cell import Cell
from mup_moe.config.settings import Config
from mup_moe.data.corpus import vocabulary_of
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError
from mup_moe.model.inventory import size_of
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
    def of(cls, config: Config, cells: Iterable[Cell], data: Path, benchmark: Path) -> Self:
        """Counts the FLOPs of these cells. Raises UserError where a tokenizer's files cannot be read.

        data: the folder with a folder for each corpus. benchmark: of the training step, a CSV.
        """
        vocabularies: dict[str, int] = {}
        flops = {}
        for cell in cells:
            setup = config.setups[cell.setup]
            if setup.corpus not in vocabularies:
                vocabularies[setup.corpus] = _vocabulary(config, setup.corpus, data)
            size = size_of(cell, setup.model, vocabularies[setup.corpus])
            flops[cell] = setup.tokens_per_step * size.flops_per_token
        try:
            return cls(flops, Machine.read(benchmark))
        except UserError as error:
            return cls(flops, error)

    def seconds(self, flops: float, width: int) -> float:
        """How long one process takes for so much training of models of a width."""
        if isinstance(self.machine, UserError):
            return flops / _FLAT_RATE
        return self.machine.seconds(flops, width)

    def seconds_of_step(self, cell: Cell) -> float:
        """How long a step of a cell takes, where others share the process with it: its share."""
        return self.seconds(self.flops_of_step[cell], cell.width)


def _vocabulary(config: Config, corpus: str, data: Path) -> int:
    try:
        return Tokens.open(data / corpus).vocabulary
    except (UserError, OSError):
        return vocabulary_of(config.corpora[corpus])
