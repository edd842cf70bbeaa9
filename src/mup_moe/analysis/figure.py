"""Draws one figure: loss against learning rate, a panel per rule, a curve per width, the optima joined."""

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from mup_moe.analysis.curve import Curve
from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.optima import Row, read_optima
from mup_moe.analysis.panel import (
    DIVERGED,
    DOTTED,
    FAINT,
    INK,
    OFF_SCALE,
    OPTIMUM,
    SUMMARY_HEIGHT,
    Scale,
    Style,
    draw_panel,
)
from mup_moe.analysis.request import FigureRequest, parse_json
from mup_moe.analysis.runs import figure_curves, read_runs
from mup_moe.files import atomic_write

COLUMNS = 4  # panels in a row, at most
WIDTH = 7.0  # inches: the text width of a paper
NARROW = 4.6  # inches, of a figure of one panel
PANEL_HEIGHT = 2.1  # inches, of the axes alone
LANE, STRIP = 0.075, 0.4  # inches, of a curve's lane in the strip, and of all lanes at most
INTERESTING = 0.6  # nats above the highest optimum that stay on the scale: a fit's window and more
LOSS_LABELS = {"train_loss": "training loss (nats)", "valid_loss": "validation loss (nats)"}
LEGEND: dict[str, Any] = {"frameon": False, "handletextpad": 0.5, "columnspacing": 1.4, "borderaxespad": 0.2}
RC: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType, embedded: text that can be searched and edited
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

Curves = Mapping[Any, Mapping[int, Curve]]
Rows = Mapping[Any, list[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `figure`."""
    parser.add_argument("--runs", type=Path, required=True, help="the CSV that `aggregate` wrote")
    parser.add_argument("--optima", type=Path, required=True, help="the CSV that `optima` wrote")
    parser.add_argument("--figure", required=True, help="JSON object: the figure_request() of the figure")
    parser.add_argument("--name", required=True, help="the figure's name in the config, and in the optima")
    parser.add_argument("--out", type=Path, required=True, help="the PDF to write")
    parser.add_argument("--png", type=Path, help="a PNG of the same figure to write as well")


def run(arguments: argparse.Namespace) -> None:
    """Writes the figure. Raises UserError when the runs or the optima lack a part of it."""
    request = FigureRequest.of(parse_json(arguments.figure, "--figure"))
    curves = figure_curves(read_runs(arguments.runs), request)
    rows = read_optima(arguments.optima, arguments.name, request)
    with sns.axes_style("ticks"), matplotlib.rc_context(RC):
        figure = draw(curves, rows, request)
        # Dates and versions would make equal figures differ.
        with atomic_write(arguments.out) as file:
            figure.savefig(file, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
        if arguments.png:
            with atomic_write(arguments.png) as file:
                figure.savefig(file, format="png", dpi=200, metadata={"Software": None})


def draw(curves: Curves, rows: Rows, request: FigureRequest) -> Figure:
    """The figure of `curves` (panel -> value -> curve) and `rows` (panel -> rows of the optima)."""
    lines = math.ceil(len(curves) / COLUMNS)
    columns = math.ceil(len(curves) / lines)
    width = WIDTH if columns > 1 else NARROW
    scale = shared_scale(curves, rows)
    # Light to dark with the value; crest is perceptually uniform and told apart by lightness alone.
    shades = sns.color_palette("crest", as_cmap=True)(np.linspace(0.05, 1.0, len(request.values)))
    style = Style(dict(zip(request.values, map(tuple, shades), strict=True)), request.base)

    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(width, 0.75 + lines * (PANEL_HEIGHT + 0.75)), layout=layout)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (panel, of_panel) in zip(grid.flat, curves.items(), strict=False):
        draw_panel(axes, of_panel, rows[panel], scale, style)
        axes.set_title(_title(request, panel), loc="left", fontweight="bold", pad=SUMMARY_HEIGHT + 2)
        axes.set(xlabel="", ylabel="")
    _label_axes(grid, curves, scale, request, width / columns)
    for axes in grid.flat[len(curves) :]:
        axes.remove()
    sns.despine(fig=figure)
    _draw_legends(figure, curves, rows, request, scale, style)
    return figure


def shared_scale(curves: Curves, rows: Rows) -> Scale:
    """The scale of all panels: every optimum and what lies near one, not the cliffs by divergence."""
    every = [curve for of_panel in curves.values() for curve in of_panel.values()]
    means = np.concatenate([curve.mean for curve in every])
    best = np.array([row.best_loss for of_panel in rows.values() for row in of_panel])
    bottom, top = 0.0, 1.0
    if np.isfinite(means).any():
        low, high = np.nanmin(best), np.nanmax(best)
        bottom = min(np.nanmin(means), low)
        top = min(np.nanmax(means), high + max(INTERESTING, 0.75 * (high - low)))
        margin = 0.05 * max(top - bottom, 0.02)
        bottom, top = bottom - margin, top + margin
    marked = not np.all(means <= top)  # written so that NaN is marked
    lanes = max(len(of_panel) for of_panel in curves.values()) if marked else 0
    inches = min(lanes * LANE, STRIP)
    strip = (top - bottom) * inches / (PANEL_HEIGHT - inches)
    lr = np.concatenate([curve.log2_lr for curve in every])
    return Scale(bottom=bottom, top=top, upper=top + strip, lanes=lanes, lr=(lr.min() - 0.4, lr.max() + 0.4))


def _title(request: FigureRequest, panel: Any) -> str:
    match request.figure.panel:
        case "parametrization":
            return parametrization_title(str(panel))
        case "architecture":
            return {"moe": "MoE", "dense": "Dense"}[panel]
        case axis:
            return f"{axis} {panel}"


def _label_axes(grid: Any, curves: Curves, scale: Scale, request: FigureRequest, panel_inches: float) -> None:
    axes = grid.flat[0]
    axes.set(xlim=scale.lr, ylim=(scale.bottom, scale.upper))
    octaves = range(math.ceil(scale.lr[0]), math.floor(scale.lr[1]) + 1)
    room = (panel_inches - 0.4) / 0.27  # labels such as 2^-10, side by side
    step = next(2**power for power in range(20) if len(octaves) / 2**power <= room)
    axes.xaxis.set_major_locator(FixedLocator([octave for octave in octaves if octave % step == 0]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda octave, _: f"$2^{{{octave:g}}}$"))
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(scale.bottom, scale.top)
    measured = any(np.isfinite(curve.mean).any() for of_panel in curves.values() for curve in of_panel.values())
    axes.yaxis.set_major_locator(FixedLocator([y for y in ticks if measured and scale.bottom <= y <= scale.top]))
    for axes in grid[:, 0]:
        axes.set_ylabel(LOSS_LABELS[request.analysis.loss])
    for column in range(grid.shape[1]):
        # The lowest panel of a column, which need not be in the last row.
        axes = grid.flat[: len(curves)][column :: grid.shape[1]][-1]
        axes.set_xlabel("learning rate")
        axes.xaxis.label.set_visible(True)
        axes.tick_params(labelbottom=True)


def _draw_legends(
    figure: Figure, curves: Curves, rows: Rows, request: FigureRequest, scale: Scale, style: Style
) -> None:
    """The curves above the panels; below them the marks that occur."""
    inches = figure.get_figwidth()
    lines = [Line2D([], [], lw=1.6, **style.line(value)) for value in request.values]
    names = [f"{value} (base)" if value == request.base else f"{value}" for value in request.values]
    figure.legend(
        [Line2D([], [], ls=""), *lines],
        [request.figure.curve, *names],
        loc="outside upper center",
        ncols=min(len(lines) + 1, int(inches / 0.8)),
        handlelength=1.8,
        **LEGEND,
    )
    marks = dict(_marks(curves, rows, scale, style))
    figure.legend(
        list(marks.values()),
        list(marks),
        loc="outside lower center",
        ncols=min(len(marks), int(inches / 1.15)),
        handlelength=1.4,
        **LEGEND,
    )


def _marks(curves: Curves, rows: Rows, scale: Scale, style: Style) -> Iterator[tuple[str, Any]]:
    every = [curve for of_panel in curves.values() for curve in of_panel.values()]
    means = np.concatenate([curve.mean for curve in every])
    found = [row for of_panel in rows.values() for row in of_panel if np.isfinite(row.log2_lr)]
    if not all(row.at_edge for row in found):
        yield "optimum", Line2D([], [], color=INK, lw=0.9, **OPTIMUM)
    if any(row.at_edge for row in found):
        yield "not bracketed", Line2D([], [], color=INK, lw=0.9, mfc="white", **OPTIMUM)
    if any(row.value == style.base for row in found):
        yield "base optimum", Line2D([], [], color=FAINT, lw=0.9, ls=DOTTED)
    if every[0].seeds > 1:
        yield f"range of {every[0].seeds} seeds", Patch(fc=FAINT, alpha=0.35)
    if np.isnan(means).any():
        yield "diverged", Line2D([], [], color=INK, **DIVERGED)
    if np.any(means[np.isfinite(means)] > scale.top):
        yield "off the scale", Line2D([], [], color=INK, **OFF_SCALE)
