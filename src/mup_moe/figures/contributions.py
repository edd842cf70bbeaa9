"""Draws what the tensors of MoE layers do to their output: sizes over the axis, and their slopes by step."""

from pathlib import Path

from mup_moe.config.settings import Config
from mup_moe.figures.plotting import Figure
from mup_moe.figures.shown import predicted
from mup_moe.figures.sizes import Prediction, draw_sizes
from mup_moe.figures.widths import read_probe


def draw(config: Config, name: str, results: Path) -> Figure:
    """A probe of the config. Raises UserError for values or slopes that are missing or damaged."""
    predictions = [
        Prediction(test.quantity, (test.step,), test.slope, test.parametrization) for test in predicted(config, name)
    ]
    return draw_sizes(*read_probe(name, results), predictions, "predicted")
