"""Draws one figure: loss against learning rate, with a panel per rule, a curve per width, and the optima joined.

Published losses from the figure's reference are overlaid on the curves of the same panel and width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mup_moe.analysis.curve import Curve
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.names import axis_title, axis_value, parametrization_title
from mup_moe.analysis.optima import OptimumRow, read_optima
from mup_moe.analysis.reference import published_curves, read_reference
from mup_moe.analysis.runs import figure_curves, read_runs
from mup_moe.config.settings import Config
from mup_moe.figures.panel import (
    DIVERGED,
    MISSING,
    OFF_SCALE,
    OPTIMUM,
    PUBLISHED,
    SUMMARY_HEIGHT,
    Scale,
    Style,
    draw_panel,
)
from mup_moe.figures.plotting import Figure, FixedLocator, Line2D, MaxNLocator, Patch, SubFigure, sns
from mup_moe.figures.style import (
    DOTTED,
    FAINT,
    INK,
    MARGIN,
    NARROW,
    RC,
    WIDTH,
    add_lines,
    draw_legend,
    new_figure,
    shades,
    wrap,
)
from mup_moe.figures.ticks import NICE, excess, label_axis, labels, number_formatter, rate_ticks

COLUMNS = 3  # the most panels in a row: the summaries of four would run into each other
PANEL_HEIGHT = 2.1  # inches, without labels and titles
Y_LABEL = 0.6  # inches, for the label and numbers left of the panels
LANE, STRIP = 0.075, 0.4  # inches: the height of a curve's lane in the strip, and of all lanes at most
LR_MARGIN = 0.4  # octaves beyond the learning rates, for a grid that spans at least one octave
INTERESTING = 0.6  # nats above the highest optimum that stay on the scale: more than a fit's window
ALIKE = 1e-7  # octaves: closer learning rates are drawn at the same place
LOSS_LABELS = {"train_loss": "training loss (nats)", "valid_loss": "validation loss (nats)"}

Curves = Mapping[Any, Mapping[int, Curve]]
Rows = Mapping[Any, list[OptimumRow]]


@dataclass(frozen=True)
class Content:
    """The data of a figure: panel -> value -> curve, panel -> rows of the optima.

    published: like `curves`, for panels and values that the figure has.
    """

    spec: FigureSpec
    curves: Curves
    rows: Rows
    published: Curves

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of panels."""
        lines = math.ceil(len(self.curves) / COLUMNS)
        return lines, math.ceil(len(self.curves) / lines)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        lines, columns = self.grid
        return WIDTH if columns > 1 else NARROW, 0.75 + lines * (PANEL_HEIGHT + 0.75)


def draw(config: Config, name: str, results: Path) -> Figure:
    """Draws a figure of the config. Raises UserError if the runs, the optima or the reference lack part of its data."""
    content = read_content(config, name, results)
    figure = new_figure(*content.size)
    draw_content(figure, content, content.size[0])
    return figure


def read_content(config: Config, name: str, results: Path) -> Content:
    """Reads the data of a figure of the config. Raises UserError."""
    spec = FigureSpec.of(config, name)
    curves = figure_curves(read_runs(results / name / "runs.csv"), spec)
    points = read_reference(results / name / "reference.csv") if config.figures[name].reference is not None else []
    published = published_curves(points)
    of_panels = {
        panel: {value: curve for value, curve in published.get(panel, {}).items() if value in of_panel}
        for panel, of_panel in curves.items()
    }
    return Content(spec, curves, read_optima(results / name / "optima.csv", name, spec), of_panels)


def draw_content(figure: Figure | SubFigure, content: Content, width: float, letter: str = "", more: str = "") -> None:
    """Draws the content into a figure or part of one, `width` inches wide.

    letter: (a), (b), ... more: text that its title adds to the axis.
    """
    spec, curves = content.spec, content.curves
    lines, columns = content.grid
    scale = shared_scale(curves, content.rows, content.published)
    style = Style(shades(spec.values), spec.base)

    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (panel, of_panel) in zip(grid.flat, curves.items(), strict=False):
        draw_panel(axes, of_panel, content.rows[panel], content.published[panel], scale, style)
        axes.set(xlabel="", ylabel="")
    _label_axes(grid, curves, scale, spec, width / columns)
    _draw_titles(figure, grid, [_title(spec, panel) for panel in curves], width)
    for axes in grid.flat[len(curves) :]:
        axes.remove()
    sns.despine(fig=figure)
    _draw_curve_legend(figure, spec, style, letter, more)
    _draw_mark_legend(figure, content, scale, style)


def shared_scale(curves: Curves, rows: Rows, published: Curves) -> Scale:
    """Returns the scale of all panels, which covers every optimum and losses near one, but not cliffs near divergence.

    It also covers published losses near their optimum, as long as ours keep half of the height.
    """
    every, theirs = _all_of(curves), _all_of(published)
    means = np.concatenate([curve.mean for curve in every])
    best = np.array([row.best_loss for of_panel in rows.values() for row in of_panel])
    bottom, top = 0.0, 1.0
    if np.isfinite(means).any():
        low, high = np.nanmin(best), np.nanmax(best)
        bottom = min(np.nanmin(means), low)
        top = min(np.nanmax(means), high + max(INTERESTING, 0.75 * (high - low)))
        near = np.concatenate(
            [[bottom], *(curve.mean[curve.mean <= curve.mean.min() + INTERESTING] for curve in theirs)]
        )
        room = (top - bottom) / 2
        near = near[(bottom - room <= near) & (near <= top + room)]
        bottom, top = min(bottom, near.min()), max(top, near.max())
        margin = 0.05 * max(top - bottom, 0.02, 1e-3 * abs(top))
        bottom, top = bottom - margin, top + margin
    marked = not np.all(means <= top)  # written so that NaN is marked
    lanes = max(len(of_panel) for of_panel in curves.values()) if marked else 0
    inches = min(lanes * LANE, STRIP)
    strip = (top - bottom) * inches / (PANEL_HEIGHT - inches)
    seen = [curve.log2_lr[(bottom <= curve.mean) & (curve.mean <= top)] for curve in theirs]
    lr = np.concatenate([*(curve.log2_lr for curve in every), *seen])
    span = float(np.ptp(lr))
    beyond = LR_MARGIN * min(span, 1.0) if span > ALIKE else LR_MARGIN
    return Scale(bottom=bottom, top=top, upper=top + strip, lanes=lanes, lr=(lr.min() - beyond, lr.max() + beyond))


def _all_of(curves: Curves) -> list[Curve]:
    return [curve for of_panel in curves.values() for curve in of_panel.values()]


def _draw_titles(figure: Figure | SubFigure, grid: Any, titles: Sequence[str], width: float) -> None:
    """Draws the panels' titles, each in as few lines as fit above its panel."""
    rows, columns = grid.shape
    panel = (width - Y_LABEL - excess(*labels(grid.flat[0].yaxis))) / columns - MARGIN
    for axes, text in zip(grid.flat, titles, strict=False):
        title = axes.set_title(text, loc="left", fontweight="bold", pad=SUMMARY_HEIGHT + 2)
        wrap(title, panel * figure.dpi)
        if "\n" in title.get_text():
            title.set_verticalalignment("bottom")  # additional lines extend upward
    lines = [axes.get_title(loc="left").count("\n") for axes in grid.flat]
    add_lines(figure, sum(max(lines[row * columns : (row + 1) * columns]) for row in range(rows)))


def _title(spec: FigureSpec, panel: Any) -> str:
    axes, axis = spec.figure.axes, spec.figure.panel
    if axis == "parametrization":
        title = parametrization_title(str(panel))
    else:
        title = f"{axis_value(axis, panel)}, {parametrization_title(axes.parametrization[0])}"
    return f"{title}, dense" if axes.architecture == ("dense",) and axis != "architecture" else title


def _label_axes(grid: Any, curves: Curves, scale: Scale, spec: FigureSpec, panel_inches: float) -> None:
    axes = grid.flat[0]
    axes.set(xlim=scale.lr, ylim=(scale.bottom, scale.upper))
    ticks = MaxNLocator(nbins=6, steps=NICE).tick_values(scale.bottom, scale.top)
    measured = any(np.isfinite(curve.mean).any() for curve in _all_of(curves))
    axes.yaxis.set_major_locator(FixedLocator([y for y in ticks if measured and scale.bottom <= y <= scale.top]))
    axes.yaxis.set_major_formatter(number_formatter((scale.bottom, scale.top)))
    inches = panel_inches - 0.4 - excess(*labels(axes.yaxis))
    rates = rate_ticks(list(spec.log2_rates), scale.lr, inches)
    for axes in grid.flat:
        label_axis(axes, rates, inches)
    for axes in grid[:, 0]:
        axes.set_ylabel(LOSS_LABELS[spec.analysis.loss])
    for column in range(grid.shape[1]):
        # The lowest panel of a column is not always in the last row.
        axes = grid.flat[: len(curves)][column :: grid.shape[1]][-1]
        axes.set_xlabel(f"factor on the learning rate of {spec.figure.tunes}" if spec.figure.tunes else "learning rate")
        axes.xaxis.label.set_visible(True)
        axes.tick_params(labelbottom=True)


def _draw_curve_legend(figure: Figure | SubFigure, spec: FigureSpec, style: Style, letter: str, more: str) -> None:
    """Draws the legend of the curves above the panels; in a part of a figure it is also the title."""
    handles = {f"{letter} {axis_title(spec.figure.curve)}{more}".strip(): Line2D([], [], ls="")}
    for value in spec.values:
        handles[f"{value} (base)" if value == spec.base else f"{value}"] = Line2D([], [], lw=1.6, **style.line(value))
    draw_legend(
        figure,
        handles,
        loc="outside upper left" if letter else "outside upper center",
        handlelength=1.8,
        title={"fontweight": "bold", "fontsize": RC["axes.titlesize"]} if letter else {},
    )


def _draw_mark_legend(figure: Figure | SubFigure, content: Content, scale: Scale, style: Style) -> None:
    """Draws the legend of the marks that occur below the panels."""
    draw_legend(figure, dict(_marks(content, scale, style)), loc="outside lower center", handlelength=1.4)


def _marks(content: Content, scale: Scale, style: Style) -> Iterator[tuple[str, Any]]:
    every = _all_of(content.curves)
    theirs = [curve.mean for curve in _all_of(content.published)]
    means = np.concatenate([curve.mean for curve in every])
    found = [row for of_panel in content.rows.values() for row in of_panel if np.isfinite(row.log2_lr)]
    if not all(row.at_edge for row in found):
        yield "optimum", Line2D([], [], color=INK, lw=0.9, **OPTIMUM)
    if any(row.at_edge for row in found):
        yield "not bracketed", Line2D([], [], color=INK, lw=0.9, mfc="white", **OPTIMUM)
    if any(row.value == style.base for row in found):
        yield "base optimum", Line2D([], [], color=FAINT, lw=0.9, ls=DOTTED)
    if every[0].seeds > 1:
        yield f"range of {every[0].seeds} seeds", Patch(fc=FAINT, alpha=0.35)
    if any(curve.diverged.any() for curve in every):
        yield "diverged", Line2D([], [], color=INK, **DIVERGED)
    if any(curve.gaps.any() for curve in every):
        yield "missing", Line2D([], [], color=INK, **MISSING)
    if np.any(means[np.isfinite(means)] > scale.top):
        yield "off the scale", Line2D([], [], color=INK, **OFF_SCALE)
    if theirs:
        losses = np.concatenate(theirs)
        seen = (scale.bottom <= losses) & (losses <= scale.top)
        note = "" if seen.all() else " (some off the scale)" if seen.any() else " (off the scale)"
        yield f"published{note}", Line2D([], [], color=INK, **PUBLISHED)
