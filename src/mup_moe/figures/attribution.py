"""Draws what each group of roles contributes to transfer: drift and excess, a line per row of the table."""

from collections.abc import Sequence
from pathlib import Path

from mup_moe.analysis.attribution import AttributionRow
from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.runs import read_rows
from mup_moe.config.settings import Config
from mup_moe.figures.dots import Column, draw_dots, excess_column
from mup_moe.figures.plotting import Figure
from mup_moe.figures.style import INK, group_colors


def draw(config: Config, name: str, results: Path) -> Figure:
    """Draws a figure of the config. Raises UserError for a missing or damaged attribution.csv."""
    rows = read_rows(results / name / "attribution.csv", AttributionRow)
    return draw_rows(rows, config.claims.drift_margin, config.claims.excess_margin)


def draw_rows(rows: Sequence[AttributionRow], drift_margin: float, excess_margin: float) -> Figure:
    """Draws the rows from top to bottom in the given order; gray bands show what passes the test of a claim.

    The dot of a row of the table is black; that of a control has the color of its group of roles.
    """
    colors = {"": INK, **group_colors()}
    drifts = Column(
        "best learning rate",
        "drift (octaves per octave)",
        [(row.drift, row.drift_low, row.drift_high) for row in rows],
        band=(-drift_margin, drift_margin),
    )
    excesses = excess_column(
        "loss at the base's best rate",
        "excess at the far end (nats)",
        [(row.excess, row.excess_low, row.excess_high) for row in rows],
        excess_margin,
    )
    names = [parametrization_title(row.panel) for row in rows]
    return draw_dots(names, [drifts, excesses], [colors[row.group] for row in rows], [not row.group for row in rows])
