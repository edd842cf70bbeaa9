"""What cells cost, counted on models without storage: nothing is trained and no token is read."""

from functools import cache

from mup_moe.config.cell import Cell
from mup_moe.config.settings import ModelSettings, SetupSettings
from mup_moe.model.shape import ModelShape
from mup_moe.model.transformer import ModelSize, model_size


def tokens_of_run(setup: SetupSettings) -> int:
    """The tokens that one cell of a set-up is trained on."""
    return setup.training.steps * tokens_of_step(setup)


def tokens_of_step(setup: SetupSettings) -> int:
    """The tokens of one step of one cell."""
    return setup.training.batch_size * setup.model.sequence


def size_of(cell: Cell, settings: ModelSettings, vocabulary: int) -> ModelSize:
    """The size of a cell's model; cells of one shape are counted once."""
    return _size(ModelShape.of(cell, settings, vocabulary), settings)


_size = cache(model_size)
