"""Draws rules side by side: drift, regret, and how the loss at the far end differs from that of the first rule."""

from collections.abc import Sequence
from pathlib import Path

from mup_moe.analysis.comparison import ComparisonRow
from mup_moe.analysis.names import axis_value
from mup_moe.analysis.runs import read_rows
from mup_moe.config.settings import Config
from mup_moe.figures.dots import Column, draw_dots
from mup_moe.figures.plotting import Figure
from mup_moe.figures.style import INK


def draw(config: Config, name: str, results: Path) -> Figure:
    """Draws a comparison of the config. Raises UserError for a missing or damaged comparison.csv."""
    return draw_rows(read_rows(results / name / "comparison.csv", ComparisonRow), config.claims.drift_margin)


def draw_rows(rows: Sequence[ComparisonRow], drift_margin: float) -> Figure:
    """Draws the rules from top to bottom in the given order; the gray band shows drifts within the margin."""
    first = rows[0]
    end, base = (axis_value(first.axis, value) for value in (first.end, first.base))
    drifts = [(row.drift, row.drift_low, row.drift_high) for row in rows]
    regrets = [(row.regret, row.regret_low, row.regret_high) for row in rows]
    changes = [(row.change, row.change_low, row.change_high) for row in rows]
    over_first = [(row.over_first, row.over_first_low, row.over_first_high) for row in rows]
    columns = [
        Column("drift", "octaves\nper octave", drifts, band=(-drift_margin, drift_margin)),
        Column("regret", f"nats at\n{end}", regrets),
        Column("loss", f"nats over\n{base}", changes),
        Column("loss", "nats over\nthe first rule", over_first),
    ]
    return draw_dots([row.title for row in rows], columns, [INK] * len(rows), [row is first for row in rows])
