"""Draws what a set-up can see: nats lost against a factor on one group's learning rate, a line per group of roles."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.runs import read_rows
from mup_moe.analysis.sensitivity import SensitivityRow
from mup_moe.config.settings import Config
from mup_moe.figures.plotting import Figure, Line2D, sns
from mup_moe.figures.style import DOTTED, FAINT, NARROW, RC, WIDTH, draw_legend, group_colors, new_figure
from mup_moe.figures.widths import label

HEIGHT = 2.6  # inches, of the panels
TOP = 4.0  # in margins: the scale ends here


def draw(config: Config, name: str, results: Path) -> Figure:
    """Draws a figure of the config. Raises UserError for a missing or damaged sensitivity.csv."""
    return draw_rows(read_rows(results / name / "sensitivity.csv", SensitivityRow), config.claims.excess_margin)


def draw_rows(rows: Sequence[SensitivityRow], margin: float) -> Figure:
    """Draws a panel per model; above the dotted line, the set-up can see a group of roles."""
    models = list(dict.fromkeys((row.parametrization, row.width) for row in rows))
    groups = list(dict.fromkeys(row.group for row in rows))
    colors = group_colors()
    octaves = sorted({row.log2_factor for row in rows})
    ticks = {octave: f"$2^{{{octave:g}}}$" if octave else "1" for octave in octaves}
    width = WIDTH if len(models) > 1 else NARROW
    figure = new_figure(width, HEIGHT + 0.6)
    grid = figure.subplots(1, len(models), sharey=True, squeeze=False)
    for axes, model in zip(grid.flat, models, strict=True):
        of_model = [row for row in rows if (row.parametrization, row.width) == model]
        for group in groups:
            line = [(row.log2_factor, row.lost) for row in of_model if row.group == group]
            x, y = np.array(line).T
            axes.plot(x, y, color=colors[group], lw=1.2, marker="o", ms=3.0, mew=0)
        axes.axhline(margin, color=FAINT, lw=0.8, ls=DOTTED)
        axes.axhline(0, color=FAINT, lw=0.6)
        title = f"{parametrization_title(model[0])}, width {model[1]}"
        axes.set_title(title, loc="left", fontsize=RC["axes.titlesize"], fontweight="bold")
        axes.set_xlabel("factor on the group's learning rate")
        label(axes, ticks, width / len(models) - 0.8)
    finite = [row.lost for row in rows if np.isfinite(row.lost)]
    grid.flat[0].set_ylim(min(-margin / 2, *finite) - margin / 10, min(max(*finite, 1.5 * margin), TOP * margin))
    grid.flat[0].set_ylabel("nats lost")
    sns.despine(fig=figure)
    handles = {group: Line2D([], [], color=colors[group], lw=1.6, marker="o", ms=3) for group in groups}
    handles["seen from here on"] = Line2D([], [], color=FAINT, ls=DOTTED, lw=0.8)
    handles = {"learning rate of": Line2D([], [], ls=""), **handles}
    draw_legend(figure, handles, loc="outside upper center", handlelength=1.4)
    return figure
