"""Draws how the tensors of MoE layers change their output: sizes over the axis, and their slopes by step."""

from pathlib import Path

from mup_moe.config.settings import Config
from mup_moe.figures.plotting import Figure
from mup_moe.figures.shown import predicted
from mup_moe.figures.sizes import Prediction, draw_sizes
from mup_moe.figures.widths import read_probe


def draw(config: Config, name: str, results: Path) -> Figure:
    """Draws a probe of the config. Raises UserError for missing or damaged values or slopes."""
    predictions = [
        Prediction(test.quantity, (test.step,), test.slope, test.parametrization) for test in predicted(config, name)
    ]
    return draw_sizes(*read_probe(name, results), predictions, "predicted")
