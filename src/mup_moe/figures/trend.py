"""Draws how a drift depends on the length of training and on the base width, since a claim about a limit is a trend.

Each figure of a trend contributes one point to each of its panels; its set-up gives the steps and the base width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.optima import OptimumRow, read_optima
from mup_moe.config.settings import Config
from mup_moe.figures.plotting import Figure, Line2D, NullLocator, sns
from mup_moe.figures.style import BAND, FAINT, NARROW, RC, WIDTH, draw_legend, new_figure, shades

HEIGHT = 2.4  # inches, of the panels


@dataclass(frozen=True)
class Point:
    """The drift of one panel of one figure, in octaves per octave, and its interval."""

    base_width: int
    steps: int
    drift: float
    low: float
    high: float


def draw(config: Config, name: str, results: Path) -> Figure:
    """Draws a trend of the config. Raises UserError for missing or damaged optima."""
    panels: dict[str, list[Point]] = {}
    for part in config.trends[name]:
        setup = config.setups[config.figures[part].setup]
        spec = FigureSpec.of(config, part)
        for panel, rows in read_optima(results / part / "optima.csv", part, spec).items():
            panels.setdefault(str(panel), []).append(_point(setup.model.base_width, setup.training.steps, rows))
    return draw_points(panels, config.claims.drift_margin)


def _point(base_width: int, steps: int, rows: Sequence[OptimumRow]) -> Point:
    return Point(base_width, steps, rows[0].drift, rows[0].drift_low, rows[0].drift_high)


def draw_points(panels: Mapping[str, Sequence[Point]], margin: float) -> Figure:
    """Draws a panel per row of the table: drift against steps, a line per base width. The band shows the margin."""
    every = [point for points in panels.values() for point in points]
    bases, steps = (sorted({getattr(point, axis) for point in every}) for axis in ("base_width", "steps"))
    colors = shades(bases)
    figure = new_figure(WIDTH if len(panels) > 1 else NARROW, HEIGHT + 0.6)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (panel, points) in zip(grid.flat, panels.items(), strict=True):
        axes.axhspan(-margin, margin, color=BAND, lw=0)
        axes.axhline(0, color=FAINT, lw=0.7)
        for number, base in enumerate(bases):
            line = sorted((p.steps, p.drift, p.low, p.high) for p in points if p.base_width == base)
            x, y, low, high = np.array(line).T
            # Side by side, so that intervals at the same number of steps do not hide each other.
            x = x * 2 ** (0.06 * (number - (len(bases) - 1) / 2))
            errors = np.nan_to_num([y - low, high - y])
            axes.errorbar(x, y, errors, color=colors[base], lw=1.2, elinewidth=0.8, capsize=2, marker="o", ms=3.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, map(str, steps))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("steps of training")
        axes.set_title(parametrization_title(panel), loc="left", fontsize=RC["axes.titlesize"], fontweight="bold")
    grid.flat[0].set_ylabel("drift (octaves per octave)")
    sns.despine(fig=figure)
    handles = {str(base): Line2D([], [], color=colors[base], lw=1.6, marker="o", ms=3.5) for base in bases}
    handles = {"base width": Line2D([], [], ls=""), **handles}
    draw_legend(figure, handles, loc="outside upper center", handlelength=1.4)
    return figure
