"""Shared parts of the figures of probes: panels over width or another axis, and their labels."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mup_moe.analysis.names import axis_title
from mup_moe.analysis.runs import read_rows
from mup_moe.analysis.slopes import Slope, log2_of_positive, over, read_values
from mup_moe.figures.plotting import ConstrainedLayoutEngine, Figure, FuncFormatter, MaxNLocator, NullLocator, sns
from mup_moe.figures.style import WIDTH
from mup_moe.figures.ticks import excess, label_axis, thinned

ROW_HEIGHT = 1.45  # inches
Y_LABELS = 0.55  # inches, of the labels next to a panel


def read_probe(name: str, results: Path) -> tuple[pd.DataFrame, list[Slope]]:
    """Reads a probe's measurements and slopes. Raises UserError for missing or damaged files."""
    return read_values(results / name / "values.csv"), read_rows(results / f"{name}.csv", Slope)


def new_grid(rows: int, columns: int, sharey: Any) -> tuple[Figure, Any]:
    """Returns an empty figure of panels and their axes, rows by columns."""
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.03)
    figure = Figure(figsize=(WIDTH, 0.9 + rows * ROW_HEIGHT), layout=layout)
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    sns.despine(fig=figure)
    return figure, grid


def means(values: pd.DataFrame) -> "pd.Series[float]":
    """Returns log2 of the geometric mean of positive, finite values, by log2 of the axis."""
    found: pd.Series[float] = log2_of_positive(values).groupby(over(values))["value"].mean()
    return found


def label_sizes(grid: Any, values: pd.DataFrame, inches: float) -> None:
    """Labels horizontal axes of about this length."""
    axis = over(values)
    ticks = {math.log2(value): str(value) for value in sorted(values[axis].unique())}
    margin = 0.05 * (max(ticks) - min(ticks)) or 0.5
    for axes in grid.flat:
        # Show all values of the axis, even where a quantity has nothing to draw.
        axes.set_xlim(min(ticks) - margin, max(ticks) + margin)
        label(axes, ticks, inches, most=4)
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in grid[:-1].flat:
        axes.tick_params(labelbottom=False)
    for axes in grid[-1]:
        axes.set_xlabel(axis_title(axis))


def label(axes: Any, ticks: Mapping[float, str], inches: float, most: int | None = None) -> None:
    """Labels a horizontal axis of about this length with as many ticks as fit without overlap, at most `most`."""
    label_axis(axes, thinned(ticks, axes.get_xlim(), inches - excess(*ticks.values()), most), inches)


def widen(axes: Any, least: float) -> None:
    """Makes the vertical axis span at least `least`, so that small changes look small and labels are in view."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, (low + high - least) / 2), max(high, (low + high + least) / 2))


def label_powers(axes: Any) -> None:
    """Labels a vertical axis in log2 with powers of 2."""
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda at, _: f"$2^{{{at:g}}}$"))
