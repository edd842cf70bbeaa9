"""Draws a probe: the coordinate check, or the covariance of experts and gradients."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.slopes import Slope, read_slopes, read_values
from mup_moe.figures.panel import DOTTED, FAINT, INK
from mup_moe.figures.plotting import (
    ConstrainedLayoutEngine,
    Figure,
    FuncFormatter,
    Line2D,
    MaxNLocator,
    NullLocator,
    sns,
)
from mup_moe.figures.ticks import excess, label_axis, labels, number_formatter, thinned
from mup_moe.figures.transfer import WIDTH, draw_legend, drawing_style, save, wrap

ROW_HEIGHT = 1.45  # inches
Y_LABELS = 0.55  # inches, of the labels beside a panel
# What Lemma B.1 and its neighbourhood predict under muP: steps taken -> slope.
_ALIGNING = {range(1): -0.5, range(2, 1000): 0.0}
PREDICTED = {
    "inner product": _ALIGNING,
    "cosine": _ALIGNING,
    "router logits": _ALIGNING,
    "router-logit change": {range(2, 1000): 0.0},
}
TITLES = {"feed-forward": "feed-forward (MoE)"}
MARKERS = ("o", "s", "^", "D", "v", "P")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `probe-figure`."""
    parser.add_argument("values", type=Path, nargs="+", help="the CSVs that `probe` wrote, one per width")
    parser.add_argument("--slopes", type=Path, required=True, help="the CSV that `slopes` wrote")
    parser.add_argument("--measure", required=True, choices=["activations", "covariance"])
    parser.add_argument("--out", type=Path, required=True, help="the PDF to write")
    parser.add_argument("--png", type=Path, help="a PNG of the same figure to write as well")


def run(arguments: argparse.Namespace) -> None:
    """Writes the figure. Raises UserError for values or slopes that are missing or damaged."""
    values, slopes = read_values(arguments.values), read_slopes(arguments.slopes)
    with drawing_style():
        draw = draw_activations if arguments.measure == "activations" else draw_covariance
        save(draw(values, slopes), arguments.out, arguments.png)


def draw_activations(values: pd.DataFrame, slopes: Sequence[Slope]) -> Figure:
    """A row per parametrization, a column per quantity; a line per step over the widths.

    Lines are geometric means over seeds and blocks. Flat lines are what muP promises after a step.
    """
    rules, quantities = values["parametrization"].unique(), values["quantity"].unique()
    steps = sorted(values["step"].unique())
    shades = dict(zip(steps, sns.color_palette("crest", as_cmap=True)(np.linspace(0.05, 1.0, len(steps))), strict=True))
    figure, grid = _grid(len(rules), len(quantities), sharey="col")
    for axes_of_rule, rule in zip(grid, rules, strict=True):
        for axes, quantity in zip(axes_of_rule, quantities, strict=True):
            chosen = values[(values["parametrization"] == rule) & (values["quantity"] == quantity)]
            for step, of_step in chosen.groupby("step"):
                line = _means(of_step)
                axes.plot(np.log2(line.index), line, color=shades[step], lw=1.0, marker="o", ms=2.2, mew=0)
            axes.text(
                0.02, 1.01, _slope_text(slopes, rule, quantity, steps[-1]), transform=axes.transAxes, fontsize=6.5
            )
        wrap(axes_of_rule[0].set_ylabel(parametrization_title(rule), fontweight="bold"), ROW_HEIGHT * figure.dpi)
    for axes, quantity in zip(grid[0], quantities, strict=True):
        axes.set_title(TITLES.get(quantity, quantity), pad=12)
    for column in grid.T:
        _widen(column[0], 3.0)
    for axes in grid.flat:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(_powers())
    figure.supylabel("mean absolute entry", fontsize=8)
    handles = [Line2D([], [], color=shades[step], lw=1.6) for step in steps]
    _legend(figure, [Line2D([], [], ls=""), *handles], ["steps taken", *map(str, steps)])
    _label_widths(grid, values, WIDTH / len(quantities) - Y_LABELS)
    return figure


def draw_covariance(values: pd.DataFrame, slopes: Sequence[Slope]) -> Figure:
    """A column per quantity. Above: its size over widths at the first and the last step. Below: its slope by step.

    A colour and marker per parametrization; sizes are geometric means over seeds and blocks, slopes
    are drawn block by block with their intervals.
    """
    rules, quantities = list(values["parametrization"].unique()), values["quantity"].unique()
    steps = sorted(values["step"].unique())
    first, last = steps[0], steps[-1]
    palette = dict(zip(rules, sns.color_palette("colorblind", len(rules)), strict=True))
    markers = {rule: MARKERS[index % len(MARKERS)] for index, rule in enumerate(rules)}
    figure, grid = _grid(2, len(quantities), sharey=False)
    for above, below, quantity in zip(*grid, quantities, strict=True):
        for rule in rules:
            chosen = values[(values["parametrization"] == rule) & (values["quantity"] == quantity)]
            style: dict[str, Any] = {"color": palette[rule], "marker": markers[rule], "ms": 3, "mew": 0.6, "lw": 1.0}
            for step, look in ((first, {"ls": (0, (3, 1.5)), "mfc": "white"}), (last, {})):
                line = _means(chosen[chosen["step"] == step])
                if len(line):
                    above.plot(np.log2(line.index), line, **style | look)
            _draw_slopes(
                below, [s for s in slopes if (s.parametrization, s.quantity) == (rule, quantity)], style, rules
            )
        above.set_title(quantity.replace("-logit ", "-logit\n"), linespacing=1.1)
        low, high = above.get_ylim()
        if math.floor(high) - math.ceil(low) < 1:  # less than two powers in view
            _widen(above, 3.0)
        above.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        above.yaxis.set_major_formatter(_powers())
        below.axhline(0, color=FAINT, lw=0.4, zorder=0)
        for steps_taken, slope in PREDICTED.get(quantity, {}).items():
            spans = [at for at, step in enumerate(steps) if step in steps_taken]
            if spans:
                ends = [spans[0] - 0.4, spans[-1] + 0.4]
                below.plot(ends, [slope] * 2, color=INK, lw=1.1, ls=DOTTED, zorder=1)
        below.set(xlabel="steps taken", xlim=(-0.5, len(steps) - 0.5))
        _widen(below, 0.1)
        below.yaxis.set_major_locator(MaxNLocator(5))
        below.yaxis.set_major_formatter(number_formatter(below.get_ylim()))
    grid[0, 0].set_ylabel("size")
    grid[1, 0].set_ylabel("slope on width")
    names = [parametrization_title(rule) for rule in rules]
    handles = [Line2D([], [], color=palette[rule], marker=markers[rule], ms=4, lw=1.4) for rule in rules]
    handles += [Line2D([], [], color=INK, ls=(0, (3, 1.5)), marker="o", mfc="white", ms=3.5, lw=1)]
    handles += [Line2D([], [], color=INK, ls=DOTTED, lw=1)]
    _legend(
        figure, handles, [*names, f"step {first} (solid: step {last})", "predicted under \N{GREEK SMALL LETTER MU}P"]
    )
    inches = WIDTH / len(quantities) - Y_LABELS - excess(*(label for below in grid[1] for label in labels(below.yaxis)))
    _label_widths(grid[:1], values, inches)
    for below in grid[1]:
        _label(below, {at: str(step) for at, step in enumerate(steps)}, inches)
    return figure


def _draw_slopes(axes: Any, found: Sequence[Slope], style: dict[str, Any], rules: Sequence[str]) -> None:
    """Points with intervals beside each other: steps at whole numbers, rules and blocks around them."""
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


def _grid(rows: int, columns: int, sharey: Any) -> tuple[Figure, Any]:
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.03)
    figure = Figure(figsize=(WIDTH, 0.9 + rows * ROW_HEIGHT), layout=layout)
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    sns.despine(fig=figure)
    return figure, grid


def _means(values: pd.DataFrame) -> "pd.Series[float]":
    """log2 of the geometric mean by width, of what is positive and finite."""
    positive = values[np.isfinite(values["value"]) & (values["value"] > 0)]
    means: pd.Series[float] = np.log2(positive["value"]).groupby(positive["width"]).mean()
    return means


def _slope_text(slopes: Sequence[Slope], rule: str, quantity: str, step: int) -> str:
    found = [s.slope for s in slopes if (s.parametrization, s.quantity, s.step) == (rule, quantity, step)]
    mean = float(np.mean(found)) if found else np.nan
    return "" if np.isnan(mean) else f"slope {mean:+.2f}".replace("-", "\N{MINUS SIGN}")


def _label_widths(grid: Any, values: pd.DataFrame, inches: float) -> None:
    """Labels horizontal axes that are about so long."""
    ticks = {math.log2(width): str(width) for width in sorted(values["width"].unique())}
    margin = 0.05 * (max(ticks) - min(ticks)) or 0.5
    for axes in grid.flat:
        # All widths, also where a quantity has no value that can be drawn.
        axes.set_xlim(min(ticks) - margin, max(ticks) + margin)
        _label(axes, ticks, inches, most=4)
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in grid[:-1].flat:
        axes.tick_params(labelbottom=False)
    for axes in grid[-1]:
        axes.set_xlabel("width")


def _label(axes: Any, ticks: Mapping[float, str], inches: float, most: int | None = None) -> None:
    label_axis(axes, thinned(ticks, axes.get_xlim(), inches - excess(*ticks.values()), most), inches)


def _widen(axes: Any, least: float) -> None:
    """Has the vertical axis span `least` or more: what hardly moves should look so, between labels."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, (low + high - least) / 2), max(high, (low + high + least) / 2))


def _powers() -> FuncFormatter:
    return FuncFormatter(lambda at, _: f"$2^{{{at:g}}}$")


def _legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    draw_legend(figure, handles, names, {}, loc="outside upper center", handlelength=1.6)
