"""Draws the covariance of experts and gradients (Lemma B.1): sizes against width, and their slopes by step."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mup_moe.analysis.slopes import Slope
from mup_moe.config.settings import Config
from mup_moe.figures.plotting import Figure
from mup_moe.figures.sizes import Prediction, draw_sizes
from mup_moe.figures.widths import read_probe

_LATER = range(2, 1000)
# The predictions of Lemma B.1 and its neighborhood under muP.
PREDICTED = (
    *(Prediction(of, range(1), -0.5) for of in ("inner product", "cosine", "router logits")),
    *(Prediction(of, _LATER, 0.0) for of in ("inner product", "cosine", "router logits", "router-logit change")),
)


def draw(config: Config, name: str, results: Path) -> Figure:  # noqa: ARG001 (every kind has this signature)
    """Draws a probe of the config. Raises UserError for missing or damaged values or slopes."""
    return draw_covariance(*read_probe(name, results))


def draw_covariance(values: pd.DataFrame, slopes: Sequence[Slope]) -> Figure:
    """Draws what `draw_sizes` does, with the predictions of the lemma."""
    return draw_sizes(values, slopes, PREDICTED, "predicted under \N{GREEK SMALL LETTER MU}P")
