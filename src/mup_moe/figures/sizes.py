"""Draws a probe's measurements: sizes over its axis, and their slopes by step."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mup_moe.analysis.names import axis_title, parametrization_title
from mup_moe.analysis.slopes import Slope, over
from mup_moe.figures.plotting import Figure, Line2D, MaxNLocator, sns
from mup_moe.figures.style import DOTTED, FAINT, INK, WIDTH, draw_legend
from mup_moe.figures.ticks import excess, labels, number_formatter
from mup_moe.figures.widths import Y_LABELS, label, label_powers, label_sizes, means, new_grid, widen

FIRST: dict[str, Any] = {"ls": (0, (3, 1.5)), "mfc": "white"}  # how the first step is drawn
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Prediction:
    """The predicted slope of a quantity after some steps; parametrization "" means any rule."""

    quantity: str
    steps: Container[int]
    slope: float
    parametrization: str = ""


def draw_sizes(
    values: pd.DataFrame, slopes: Sequence[Slope], predictions: Sequence[Prediction], predicted: str
) -> Figure:
    """Draws a column per quantity: above, its size over the axis at the first and last step; below, its slope by step.

    Each parametrization has a color and a marker. Sizes are geometric means over seeds and blocks; slopes are drawn
    block by block with their intervals. predicted: the legend entry for predictions.
    """
    axis = over(values)
    rules, quantities = list(values["parametrization"].unique()), values["quantity"].unique()
    steps = sorted(values["step"].unique())
    first, last = steps[0], steps[-1]
    palette = dict(zip(rules, sns.color_palette("colorblind", len(rules)), strict=True))
    markers = {rule: MARKERS[index % len(MARKERS)] for index, rule in enumerate(rules)}
    figure, grid = new_grid(2, len(quantities), sharey=False)
    for above, below, quantity in zip(*grid, quantities, strict=True):
        for rule in rules:
            chosen = values[(values["parametrization"] == rule) & (values["quantity"] == quantity)]
            style: dict[str, Any] = {"color": palette[rule], "marker": markers[rule], "ms": 3, "mew": 0.6, "lw": 1.0}
            for step, look in ((first, FIRST), (last, {})):
                line = means(chosen[chosen["step"] == step])
                if len(line):
                    above.plot(line.index, line, **style | look)
            _draw_slopes(
                below, [s for s in slopes if (s.parametrization, s.quantity) == (rule, quantity)], style, rules
            )
        above.set_title(quantity.replace("-logit ", "-logit\n").replace(" by ", "\nby "), linespacing=1.1)
        low, high = above.get_ylim()
        if math.floor(high) - math.ceil(low) < 1:  # fewer than two powers in view
            widen(above, 3.0)
        label_powers(above)
        below.axhline(0, color=FAINT, lw=0.4, zorder=0)
        for prediction in predictions:
            spans = [at for at, step in enumerate(steps) if step in prediction.steps]
            if prediction.quantity == quantity and spans:
                ends = [spans[0] - 0.4, spans[-1] + 0.4]
                color = palette.get(prediction.parametrization, INK)
                below.plot(ends, [prediction.slope] * 2, color=color, lw=1.1, ls=DOTTED, zorder=1)
        below.set(xlabel="steps taken", xlim=(-0.5, len(steps) - 0.5))
        widen(below, 0.1)
        below.yaxis.set_major_locator(MaxNLocator(5))
        below.yaxis.set_major_formatter(number_formatter(below.get_ylim()))
    grid[0, 0].set_ylabel("size")
    grid[1, 0].set_ylabel(f"slope on {axis_title(axis)}")
    handles = {
        **{parametrization_title(r): Line2D([], [], color=palette[r], marker=markers[r], ms=4, lw=1.4) for r in rules},
        f"step {first} (solid: step {last})": Line2D([], [], color=INK, lw=1, ms=3.5, marker="o", **FIRST),
        predicted: Line2D([], [], color=INK, ls=DOTTED, lw=1),
    }
    draw_legend(figure, handles, loc="outside upper center", handlelength=1.6)
    inches = WIDTH / len(quantities) - Y_LABELS - excess(*(label for below in grid[1] for label in labels(below.yaxis)))
    label_sizes(grid[:1], values, inches)
    for below in grid[1]:
        label(below, {at: str(step) for at, step in enumerate(steps)}, inches)
    return figure


def _draw_slopes(axes: Any, found: Sequence[Slope], style: dict[str, Any], rules: Sequence[str]) -> None:
    """Draws points with intervals side by side: steps at whole numbers, rules and blocks around them."""
    steps = sorted({slope.step for slope in found})
    blocks = sorted({slope.block for slope in found})
    slots = len(rules) * len(blocks)
    for slope in found:
        if not np.isfinite(slope.slope):
            continue
        slot = rules.index(slope.parametrization) * len(blocks) + blocks.index(slope.block)
        at = steps.index(slope.step) + (slot - (slots - 1) / 2) * 0.75 / slots
        axes.plot([at] * 2, [slope.low, slope.high], color=style["color"], lw=0.9, zorder=2)
        axes.plot(at, slope.slope, **style | {"ls": "", "ms": 2.6}, zorder=3)
