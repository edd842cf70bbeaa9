"""Draws what each group of roles contributes to transfer: drift and excess, a line per row of the table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mup_moe.analysis.attribution import AttributionRow
from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.runs import read_rows
from mup_moe.config.settings import Config
from mup_moe.figures.plotting import Figure, sns
from mup_moe.figures.style import BAND, FAINT, INK, RC, WIDTH, group_colours, new_figure

LINE_HEIGHT = 0.2  # inches
REACH = 6.0  # margins: an excess beyond is drawn at the end of the axis


def draw(config: Config, name: str, results: Path) -> Figure:
    """A figure of the config. Raises UserError for an attribution.csv that is missing or damaged."""
    rows = read_rows(results / name / "attribution.csv", AttributionRow)
    return draw_rows(rows, config.claims.drift_margin, config.claims.excess_margin)


def draw_rows(rows: Sequence[AttributionRow], drift_margin: float, excess_margin: float) -> Figure:
    """The rows from top to bottom as given; grey bands are what passes the test of a claim.

    A dot is black for a row of the table, and has the colour of its group of roles for a control.
    """
    figure = new_figure(WIDTH, 0.75 + LINE_HEIGHT * len(rows))
    drifts, excesses = figure.subplots(1, 2, sharey=True)
    colours = {"": INK, **group_colours()}
    end = REACH * excess_margin
    drifts.axvspan(-drift_margin, drift_margin, color=BAND, lw=0)
    excesses.axvspan(0, excess_margin, color=BAND, lw=0)
    for place, row in enumerate(rows):
        look = {"color": colours[row.group], "ms": 4.5, "mew": 0.9, "lw": 1.0}
        drifts.plot([row.drift_low, row.drift_high], [place] * 2, marker="|", **look)
        drifts.plot(row.drift, place, marker="o", **look)
        beyond = row.excess > end
        at = min(row.excess, end)
        # The upper bound of what was not measured is infinite: its line ends at the axis's end.
        excesses.plot(np.clip([row.excess_low, row.excess_high], 0, end), [place] * 2, marker="|", **look)
        excesses.plot(at, place, marker=">" if beyond or np.isinf(row.excess_high) else "o", **look)
        if beyond:
            # Above the line, which an interval may reach along.
            where: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 7}
            excesses.annotate(f"{row.excess:.2f}", (at, place), (-3, 1.5), **where)
    drifts.axvline(0, color=FAINT, lw=0.7)
    drifts.set_yticks(range(len(rows)), [parametrization_title(row.panel) for row in rows])
    for label, row in zip(drifts.get_yticklabels(), rows, strict=True):
        label.set(color=colours[row.group], fontweight="normal" if row.group else "bold")
    drifts.set_ylim(len(rows) - 0.4, -0.6)
    drifts.set_xlabel("drift (octaves per octave)")
    excesses.set(xlabel="excess at the far end (nats)", xlim=(-0.02 * end, 1.04 * end))
    for axes, title in ((drifts, "best learning rate"), (excesses, "loss at the base's best rate")):
        axes.set_title(title, loc="left", fontsize=RC["axes.titlesize"], fontweight="bold")
        axes.grid(axis="y", color=BAND, lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    sns.despine(fig=figure, left=True)
    return figure
