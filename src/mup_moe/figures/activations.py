"""Draws the coordinate check: the size of every activation against width, over the first steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mup_moe.analysis.names import parametrization_title, signed
from mup_moe.analysis.slopes import Slope
from mup_moe.config.settings import Config
from mup_moe.figures.plotting import Figure, Line2D
from mup_moe.figures.style import WIDTH, draw_legend, shades, wrap
from mup_moe.figures.widths import ROW_HEIGHT, Y_LABELS, label_powers, label_sizes, means, new_grid, read_probe, widen

TITLES = {"feed-forward": "feed-forward (MoE)"}


def draw(config: Config, name: str, results: Path) -> Figure:  # noqa: ARG001 (every kind has this signature)
    """Draws a probe of the config. Raises UserError for missing or damaged values or slopes."""
    return draw_activations(*read_probe(name, results))


def draw_activations(values: pd.DataFrame, slopes: Sequence[Slope]) -> Figure:
    """Draws a row per parametrization and a column per quantity, with a line per step over the widths.

    Lines are geometric means over seeds and blocks. muP promises flat lines after a step.
    """
    rules, quantities = values["parametrization"].unique(), values["quantity"].unique()
    steps = sorted(values["step"].unique())
    shade = shades(steps)
    figure, grid = new_grid(len(rules), len(quantities), sharey="col")
    for axes_of_rule, rule in zip(grid, rules, strict=True):
        for axes, quantity in zip(axes_of_rule, quantities, strict=True):
            chosen = values[(values["parametrization"] == rule) & (values["quantity"] == quantity)]
            for step, of_step in chosen.groupby("step"):
                line = means(of_step)
                axes.plot(line.index, line, color=shade[step], lw=1.0, marker="o", ms=2.2, mew=0)
            axes.text(
                0.02, 1.01, _slope_text(slopes, rule, quantity, steps[-1]), transform=axes.transAxes, fontsize=6.5
            )
        wrap(axes_of_rule[0].set_ylabel(parametrization_title(rule), fontweight="bold"), ROW_HEIGHT * figure.dpi)
    for axes, quantity in zip(grid[0], quantities, strict=True):
        axes.set_title(TITLES.get(quantity, quantity), pad=12)
    for column in grid.T:
        widen(column[0], 3.0)
    for axes in grid.flat:
        label_powers(axes)
    figure.supylabel("mean absolute entry", fontsize=8)
    handles = {str(step): Line2D([], [], color=shade[step], lw=1.6) for step in steps}
    handles = {"steps taken": Line2D([], [], ls=""), **handles}
    draw_legend(figure, handles, loc="outside upper center", handlelength=1.6)
    label_sizes(grid, values, WIDTH / len(quantities) - Y_LABELS)
    return figure


def _slope_text(slopes: Sequence[Slope], rule: str, quantity: str, step: int) -> str:
    found = [s.slope for s in slopes if (s.parametrization, s.quantity, s.step) == (rule, quantity, step)]
    mean = float(np.mean(found)) if found else np.nan
    return "" if np.isnan(mean) else f"slope {signed(mean)}"
