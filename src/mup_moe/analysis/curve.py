"""One curve of loss against learning rate: where its optimum is, and how sure of that we are.

The estimator, fixed before any run of ours was looked at:

1. A learning rate's loss is its mean over seeds. One at which any seed diverged is diverged: it is
   no candidate, and a wall that no window reaches across. So is a gap, a learning rate of which a
   seed's cell was left out.
2. The window holds the `fit_points` learning rates around the lowest loss, equally many on either
   side; it ends early at the grid's end, at a wall, and before a loss more than NEAR nats above the
   lowest. The lowest point's two neighbours always belong to it.
3. The optimum is the vertex of the least-squares parabola, in log2 of the learning rate, through
   the window; of the three central points where that one is not convex or its vertex lies outside
   its window; and the lowest point itself where those are flat.
4. A lowest point without a measured neighbour on both sides is not bracketed: it is reported
   itself, flagged `at_edge`.

Why NEAR: a loss close to divergence rises like a cliff, not a parabola, and one such point at the
window's end drags a five-point fit away from a minimum that the other four agree on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Fit = Literal["parabola", "three-point", "grid", "edge", "none"]

ABSENT = np.inf  # in place of the loss of a cell that was left out
NEAR = 0.5  # nats above the lowest loss: a factor of 1.6 in perplexity
FLAT = 1e-9  # nats across a window: less is rounding, not curvature
ONE_SEED_RESOLUTION = 0.25  # of the distance to the neighbouring learning rate


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses of S seeds at R learning rates.

    log2_lr: (R,), strictly ascending. losses: (S, R), nats, NaN where diverged, ABSENT where not measured.
    """

    log2_lr: FloatArray
    losses: FloatArray

    def __post_init__(self) -> None:
        if self.losses.ndim != 2 or self.losses.shape[1:] != self.log2_lr.shape:
            raise ValueError(f"losses {self.losses.shape} must be (seeds, {self.log2_lr.size})")
        if not np.all(np.diff(self.log2_lr) > 0):
            raise ValueError("log2_lr must ascend")

    @property
    def seeds(self) -> int:
        """S."""
        return len(self.losses)

    @cached_property
    def mean(self) -> FloatArray:
        """(R,) mean over seeds; NaN where any seed diverged or was not measured."""
        mean: FloatArray = np.where(np.isfinite(self.losses), self.losses, np.nan).mean(axis=0)
        return mean

    @property
    def diverged(self) -> BoolArray:
        """(R,) whether any seed diverged."""
        return np.asarray(np.isnan(self.losses).any(axis=0))

    @property
    def gaps(self) -> BoolArray:
        """(R,) whether any seed was not measured, and none diverged: what the loss is there is not known."""
        return np.asarray(np.isinf(self.losses).any(axis=0)) & ~self.diverged

    @property
    def missing(self) -> int:
        """How many of the S x R losses were not measured."""
        return int(np.isinf(self.losses).sum())

    def seed(self, index: int) -> "Curve":
        """The curve of one of the S seeds."""
        return self.resampled(np.array([index]))

    def resampled(self, seeds: npt.NDArray[np.int64]) -> "Curve":
        """The curve of the chosen seeds (indices, repeats allowed)."""
        return Curve(self.log2_lr, self.losses[seeds])


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of a curve, in the vertex form of the parabola around it.

    log2_lr, loss: the vertex; NaN where no learning rate has a loss. curvature: nats per octave squared; NaN
    without a parabola. low, high: ends of the window, in which the parabola stands for the curve.
    """

    log2_lr: float
    loss: float
    curvature: float
    low: float
    high: float
    fit: Fit

    @property
    def at_edge(self) -> bool:
        """Whether the grid, divergence or a gap leaves the optimum without a bracket."""
        return self.fit == "edge"


def find_optimum(curve: Curve, fit_points: int) -> Optimum:
    """The optimum by the estimator of this module's docstring; `fit_points` >= 3."""
    loss = curve.mean
    if not np.isfinite(loss).any():
        return Optimum(np.nan, np.nan, np.nan, np.nan, np.nan, "none")
    lowest = int(np.nanargmin(loss))
    left, right = _reach(loss, lowest, fit_points // 2)
    if left + right + 1 > fit_points:  # an even window: leave out the end that says least about the minimum
        drop_left = loss[lowest - left] >= loss[lowest + right]
        left, right = left - drop_left, right - (not drop_left)
    here = float(curve.log2_lr[lowest])
    if not (left and right):
        return Optimum(here, float(loss[lowest]), np.nan, here, here, "edge")
    wide = _vertex(curve, lowest, left, right, "parabola")
    narrow = _vertex(curve, lowest, 1, 1, "three-point")
    return wide or narrow or Optimum(here, float(loss[lowest]), np.nan, here, here, "grid")


def window_interval(curve: Curve, best: Optimum) -> tuple[float, float]:
    """How far a parabola's vertex moves with the choice of window: all that one seed can tell.

    The hull of `best` and of the vertices of the windows of 3, 4 (reaching left), 4 (reaching
    right) and 5 points, cut as the estimator's; to either side at least ONE_SEED_RESOLUTION of the
    way to the lowest point's neighbour, since agreement of windows says nothing of seeds.
    """
    lowest = int(np.nanargmin(curve.mean))
    left, right = _reach(curve.mean, lowest, 2)
    vertices = [best.log2_lr]
    for before, after in {(1, 1), (left, 1), (1, right), (left, right)}:
        found = _vertex(curve, lowest, before, after, "parabola")
        vertices += [found.log2_lr] if found else []
    below, above = (np.diff(curve.log2_lr[lowest - 1 : lowest + 2]) * ONE_SEED_RESOLUTION).tolist()
    return min(*vertices, best.log2_lr - below), max(*vertices, best.log2_lr + above)


def bracket(curve: Curve) -> tuple[float, float]:
    """The learning rates (log2) next to the lowest loss, diverged ones too; infinite beyond the grid.

    A gap bounds nothing: the next learning rate beyond it does.
    """
    known = ~curve.gaps
    lowest = int(np.nanargmin(curve.mean[known]))
    fenced = np.concatenate([[-np.inf], curve.log2_lr[known], [np.inf]])
    return float(fenced[lowest]), float(fenced[lowest + 2])


def loss_at(curve: Curve, best: Optimum, log2_lr: float) -> float:
    """The loss (nats) that a learning rate gives: the fitted parabola in its window, PCHIP elsewhere.

    PCHIP runs through the measured mean losses between neighbouring learning rates that both
    converged. Beyond the grid and next to a diverged learning rate or a gap the loss is +inf, since
    nothing measured bounds it. NaN for a NaN learning rate or a curve without any loss.
    """
    if np.isnan(log2_lr) or np.isnan(best.log2_lr):
        return np.nan
    if log2_lr == best.log2_lr:
        return best.loss
    if best.low <= log2_lr <= best.high:
        return best.loss + best.curvature * (log2_lr - best.log2_lr) ** 2
    for start, stop in finite_runs(curve.mean):
        x = curve.log2_lr[start:stop]
        if x[0] <= log2_lr <= x[-1]:
            y = curve.mean[start:stop]
            return float(y[0]) if x.size == 1 else float(PchipInterpolator(x, y)(log2_lr))
    return np.inf


@dataclass(frozen=True)
class Regret:
    """What a learning rate costs over the curve's own optimum.

    nats: never negative. at_least: the learning rate lies beyond what converged, and `nats` is what
    the last one that converged on that side costs.
    """

    nats: float
    at_least: bool


def regret(curve: Curve, best: Optimum, log2_lr: float) -> Regret:
    """The cost of using `log2_lr` instead of the curve's own optimum; NaN where either is unknown.

    A curve rises away from its optimum, so that where nothing was measured, or all diverged, the
    outermost loss is a lower bound. Where a least-squares vertex lies above a measured loss, the
    difference is fit residual: 0.
    """
    loss = loss_at(curve, best, log2_lr)
    at_least = bool(np.isinf(loss))
    if at_least:
        (own_run,) = (
            curve.mean[start:stop]
            for start, stop in finite_runs(curve.mean)
            if curve.log2_lr[start] <= best.log2_lr <= curve.log2_lr[stop - 1]
        )
        loss = float(own_run[-1] if log2_lr > best.log2_lr else own_run[0])
    return Regret(float(np.maximum(loss - best.loss, 0.0)), at_least)


def finite_runs(values: FloatArray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each unbroken run of finite values."""
    edges = np.flatnonzero(np.diff(np.isfinite(values).astype(int), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _reach(loss: FloatArray, lowest: int, most: int) -> tuple[int, int]:
    """Points left and right of the lowest that a window may hold, at most `most` each."""

    def steps(direction: int) -> int:
        for step in range(1, most + 1):
            at = lowest + direction * step
            outside = not 0 <= at < loss.size or not np.isfinite(loss[at])
            if outside or (step > 1 and loss[at] - loss[lowest] > NEAR):
                return step - 1
        return most

    return steps(-1), steps(1)


def _vertex(curve: Curve, lowest: int, left: int, right: int, fit: Fit) -> Optimum | None:
    """The vertex of the window's parabola; None where it is not convex or its vertex lies outside."""
    window = slice(lowest - left, lowest + right + 1)
    # Centred on the lowest point, so that neither the grid's place nor the loss's level costs digits.
    x = curve.log2_lr[window] - curve.log2_lr[lowest]
    y = curve.mean[window] - curve.mean[lowest]
    a, b, c = (float(coefficient) for coefficient in np.polyfit(x, y, 2))
    if a * (x[-1] - x[0]) ** 2 <= FLAT or not x[0] <= -b / (2 * a) <= x[-1]:
        return None
    low, high = curve.log2_lr[window][[0, -1]]
    return Optimum(
        log2_lr=float(curve.log2_lr[lowest]) - b / (2 * a),
        loss=float(curve.mean[lowest]) + c - b * b / (4 * a),
        curvature=a,
        low=float(low),
        high=float(high),
        fit=fit,
    )
