"""Draws one panel: curves, their optima joined by a line, and a strip with marks for points off the scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mup_moe.analysis.curve import Curve, finite_runs
from mup_moe.analysis.names import axis_value, signed
from mup_moe.analysis.optima import OptimumRow
from mup_moe.figures.plotting import Axes, Rectangle, sns
from mup_moe.figures.style import DOTTED, FAINT, INK

SHADE = "#efefef"
OPTIMUM: dict[str, Any] = {"marker": "D", "ms": 4.2, "mec": INK, "mew": 0.8}
DIVERGED: dict[str, Any] = {"marker": "x", "ms": 3.4, "mew": 0.9, "ls": ""}
MISSING: dict[str, Any] = {"marker": "$?$", "ms": 4.2, "mew": 0.3, "ls": ""}
OFF_SCALE: dict[str, Any] = {"marker": "^", "ms": 3.4, "mew": 0.0, "ls": ""}
PUBLISHED: dict[str, Any] = {"marker": "o", "ms": 3.6, "mfc": "none", "mew": 0.7, "lw": 0.7, "ls": DOTTED}
SUMMARY_POINTS = 7.0  # font size of the two lines between a panel and its title
SUMMARY_HEIGHT = 2 * 1.35 * SUMMARY_POINTS + 4  # points


@dataclass(frozen=True)
class Scale:
    """The axes that panels share. Losses are drawn below `top`; the strip extends from there to `upper`.

    lanes: the number of curves with a lane in the strip; 0 means that there is no strip. lr: the limits of log2
    learning rate.
    """

    bottom: float
    top: float
    upper: float
    lanes: int
    lr: tuple[float, float]

    def lane(self, index: int) -> float:
        """Returns the height of a curve's marks in the strip."""
        return self.top + (self.upper - self.top) * (index + 0.5) / self.lanes


@dataclass(frozen=True)
class Style:
    """The color per curve value, and the value that has a dashed curve."""

    palette: Mapping[int, Any]
    base: int | None

    def line(self, value: int) -> dict[str, Any]:
        """Returns the line style of a value's curve."""
        return {"color": self.palette[value], "ls": (0, (4, 1.5)) if value == self.base else "-"}


def draw_panel(
    axes: Axes,
    curves: Mapping[int, Curve],
    rows: Sequence[OptimumRow],
    published: Mapping[int, Curve],
    scale: Scale,
    style: Style,
) -> None:
    """Draws one panel: its curves (value -> curve), their rows of the optima, and published curves."""
    for value, curve in published.items():
        axes.plot(curve.log2_lr, curve.mean, color=style.palette[value], zorder=2.5, **PUBLISHED)
    for lane, (value, curve) in enumerate(curves.items()):
        _draw_curve(axes, curve, style.line(value))
        above = np.nan_to_num(curve.mean, nan=-np.inf) > scale.top
        for marked, mark in ((above, OFF_SCALE), (curve.diverged, DIVERGED), (curve.gaps, MISSING)):
            if marked.any():
                heights = np.full(marked.sum(), scale.lane(lane))
                axes.plot(curve.log2_lr[marked], heights, color=style.palette[value], zorder=6, **mark)
    if scale.lanes:
        # Opaque and above the curves: curves that leave the scale end here, and the marks show which.
        # Twice as high as the strip and clipped by the panel: at the edge of a clip a sliver of a curve would show.
        width, height = scale.lr[1] - scale.lr[0], 2 * (scale.upper - scale.top)
        axes.add_patch(Rectangle((scale.lr[0], scale.top), width, height, fc=SHADE, ec="none", zorder=5))
    _draw_optima(axes, rows, scale, style)
    axes.annotate(
        summary(rows, style.base),
        (0, 1),
        xytext=(0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=SUMMARY_POINTS,
        linespacing=1.35,
        va="bottom",
    )


def summary(rows: Sequence[OptimumRow], base: int | None) -> str:
    """Returns two lines on transfer: the drift with its interval, and the regret at the far end of the axis.

    If the base is inside the range of the axis, the far end is the one with the greater regret.
    """
    last = rows[-1]
    found = sum(np.isfinite(row.log2_lr) for row in rows)
    if found == 0:
        missing = any(row.missing for row in rows)
        return "no optimum: runs are missing or diverged\n" if missing else "every run diverged\n"
    lines = ["drift: one optimum only", ""]
    if np.isfinite(last.drift):
        lines[0] = f"drift {signed(last.drift)}"
        if np.isfinite(last.drift_low):
            lines[0] += f" [{signed(last.drift_low)}, {signed(last.drift_high)}]"
    ends = [row for row in (last, rows[0]) if row.value != base and not np.isnan(row.regret)]
    if ends:
        # The largest value comes first, so it wins a tie.
        end = max(ends, key=lambda row: row.regret)
        bound = "\N{GREATER-THAN OR EQUAL TO} " if end.regret_at_least else ""
        lines[1] = f"regret {bound}{end.regret:.3f} nats at {axis_value(end.axis, end.value)}"
    return "\n".join(lines)


def _draw_curve(axes: Axes, curve: Curve, line: Mapping[str, Any]) -> None:
    # One line per run of converged learning rates, so that no line crosses a diverged one.
    for start, stop in finite_runs(curve.mean):
        sns.lineplot(
            x=np.tile(curve.log2_lr[start:stop], curve.seeds),
            y=curve.losses[:, start:stop].ravel(),
            ax=axes,
            lw=1.2,
            marker="o",
            markersize=2.6,
            markeredgewidth=0,
            errorbar=("pi", 100) if curve.seeds > 1 else None,  # from the minimum to the maximum
            err_kws={"alpha": 0.25, "lw": 0},
            legend=False,
            zorder=2,
            **line,
        )


def _draw_optima(axes: Axes, rows: Sequence[OptimumRow], scale: Scale, style: Style) -> None:
    found = [row for row in rows if np.isfinite(row.log2_lr)]
    axes.plot([row.log2_lr for row in found], [row.best_loss for row in found], color=INK, lw=1.0, zorder=3)
    for row in found:
        color = style.palette[row.value]
        if row.value == style.base:
            axes.plot([row.log2_lr] * 2, [scale.bottom, scale.top], color=FAINT, lw=0.7, ls=DOTTED, zorder=1)
        # A bound beyond the grid is infinite, so its line runs out of the panel.
        ends = np.clip([row.log2_lr_low, row.log2_lr_high], *scale.lr)
        axes.plot(ends, [row.best_loss] * 2, color=color, lw=0.9, marker="|", ms=4, mew=0.9, zorder=3.5)
        axes.plot(row.log2_lr, row.best_loss, mfc="white" if row.at_edge else color, zorder=4, **OPTIMUM)
