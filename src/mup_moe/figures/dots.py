"""Draws a table as dots with intervals: a line per row, a panel per quantity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mup_moe.figures.plotting import Figure, MaxNLocator, sns
from mup_moe.figures.style import BAND, FAINT, RC, WIDTH, new_figure

LINE_HEIGHT = 0.2  # inches
REACH = 6.0  # in margins: a larger excess is drawn at the end of its panel


@dataclass(frozen=True)
class Column:
    """One quantity of all rows. points: value, low and high of each row; missing ones are NaN.

    band: the range with a gray background. floor, ceiling: the limits of the panel. A value above the ceiling is drawn
    at the ceiling, with the number next to it. A value with an infinite upper bound is drawn as an arrow, and its
    interval ends at the ceiling, or at the value if there is no ceiling.
    """

    title: str
    label: str
    points: Sequence[tuple[float, float, float]]
    band: tuple[float, float] | None = None
    floor: float = -np.inf
    ceiling: float = np.inf


def excess_column(title: str, label: str, points: Sequence[tuple[float, float, float]], margin: float) -> Column:
    """Returns the column of an excess, in nats; the gray band is what passes the test of a claim."""
    return Column(title, label, points, band=(0, margin), floor=0, ceiling=REACH * margin)


def draw_dots(
    names: Sequence[str],
    columns: Sequence[Column],
    colors: Sequence[Any],
    bold: Sequence[bool],
    places: Sequence[float] | None = None,
    inks: Sequence[Any] | None = None,
) -> Figure:
    """Draws the rows from top to bottom as given.

    colors: of the points. places: the row of each point; by default there is one point per row. inks: the colors of the
    names; by default those of the points.
    """
    figure = new_figure(WIDTH, 0.75 + LINE_HEIGHT * len(names))
    places = range(len(names)) if places is None else places
    grid = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(grid, columns, strict=True):
        if column.band:
            axes.axvspan(*column.band, color=BAND, lw=0)
        for place, (value, low, high), color in zip(places, column.points, colors, strict=True):
            look = {"color": color, "ms": 4.5, "mew": 0.9, "lw": 1.0}
            beyond = value > column.ceiling
            at = min(value, column.ceiling)
            ends = np.nan_to_num(np.clip([low, high], column.floor, column.ceiling), nan=at, posinf=at, neginf=at)
            axes.plot(ends, [place] * 2, marker="|" if low < high else "", **look)
            axes.plot(at, place, marker=">" if beyond or np.isinf(high) else "o", **look)
            if beyond:
                # Above the line, which may show an interval.
                where: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 7}
                axes.annotate(f"{value:.2f}", (at, place), (-3, 1.5), **where)
        axes.set_title(column.title, loc="left", fontsize=RC["axes.titlesize"], fontweight="bold")
        axes.set_xlabel(column.label)
        if len(columns) > 2:
            # Panels are narrow here, and labels such as -0.005 must not overlap.
            axes.xaxis.set_major_locator(MaxNLocator(2, symmetric=True))
        axes.grid(axis="y", color=BAND, lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        if np.isfinite(column.ceiling):
            axes.set_xlim(column.floor - 0.02 * column.ceiling, 1.04 * column.ceiling)
        else:
            axes.axvline(0, color=FAINT, lw=0.7)
    grid[0].set_yticks(range(len(names)), list(names))
    for label, ink, heavy in zip(grid[0].get_yticklabels(), inks or colors, bold, strict=True):
        label.set(color=ink, fontweight="bold" if heavy else "normal", parse_math=False)
    grid[0].set_ylim(len(names) - 0.4, -0.6)
    sns.despine(fig=figure, left=True)
    return figure
