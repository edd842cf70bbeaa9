"""One curve of loss against learning rate: its optimum, and the uncertainty of that optimum.

The estimator was fixed before we looked at any of our runs:

1. The loss of a learning rate is its mean over seeds. A learning rate at which any seed diverged counts as diverged: it
   is not a candidate, and it is a wall that no window crosses. The same holds for a gap: a learning rate at which the
   cell of some seed was left out.
2. The window holds the `fit_points` learning rates around the lowest loss, equally many on either side. It stops early
   at the end of the grid, at a wall, and before a loss more than NEAR nats above the lowest. It always includes the two
   neighbors of the lowest point.
3. The optimum is the vertex of the least-squares parabola through the window, in log2 of the learning rate. If that
   parabola is not convex or its vertex is outside its window, the parabola through the three central points is used
   instead; if these are flat, the optimum is the lowest point itself.
4. A lowest point without a measured neighbor on both sides is not bracketed: it is reported as the optimum, with the
   flag `at_edge`.

Why NEAR: a loss close to divergence rises like a cliff, not like a parabola. One such point at the end of the window
drags a five-point fit away from a minimum on which the other four agree.
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

ABSENT = np.inf  # replaces the loss of a cell that was left out
NEAR = 0.5  # nats above the lowest loss: a factor of 1.6 in perplexity
FLAT = 1e-9  # nats across a window: less is rounding, not curvature
ONE_SEED_RESOLUTION = 0.25  # fraction of the distance to the neighboring learning rate


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses of S seeds at R learning rates.

    log2_lr: (R,), strictly ascending. losses: (S, R), nats; NaN where diverged, ABSENT where not measured.
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
        """The number of seeds S."""
        return len(self.losses)

    @cached_property
    def mean(self) -> FloatArray:
        """(R,) mean loss over seeds; NaN where any seed diverged or was not measured."""
        mean: FloatArray = np.where(np.isfinite(self.losses), self.losses, np.nan).mean(axis=0)
        return mean

    @property
    def diverged(self) -> BoolArray:
        """(R,) whether any seed diverged."""
        return np.asarray(np.isnan(self.losses).any(axis=0))

    @property
    def gaps(self) -> BoolArray:
        """(R,) whether some seed was not measured and none diverged, so that the loss is unknown."""
        return np.asarray(np.isinf(self.losses).any(axis=0)) & ~self.diverged

    @property
    def missing(self) -> int:
        """How many of the S x R losses were not measured."""
        return int(np.isinf(self.losses).sum())

    def seed(self, index: int) -> "Curve":
        """Returns the curve of one of the S seeds."""
        return self.resampled(np.array([index]))

    def resampled(self, seeds: npt.NDArray[np.int64]) -> "Curve":
        """Returns the curve of the chosen seeds (indices, repeats allowed)."""
        return Curve(self.log2_lr, self.losses[seeds])


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of a curve, with the parabola around it in vertex form.

    log2_lr, loss: the vertex; NaN if no learning rate has a loss. curvature: nats per octave squared; NaN without a
    parabola. low, high: ends of the window in which the parabola represents the curve.
    """

    log2_lr: float
    loss: float
    curvature: float
    low: float
    high: float
    fit: Fit

    @property
    def at_edge(self) -> bool:
        """Whether the optimum is not bracketed, because of the grid's end, divergence or a gap."""
        return self.fit == "edge"


def find_optimum(curve: Curve, fit_points: int) -> Optimum:
    """Returns the optimum by the estimator of this module's docstring; `fit_points` must be at least 3."""
    loss = curve.mean
    if not np.isfinite(loss).any():
        return Optimum(np.nan, np.nan, np.nan, np.nan, np.nan, "none")
    lowest = int(np.nanargmin(loss))
    left, right = _reach(loss, lowest, fit_points // 2)
    if left + right + 1 > fit_points:  # for an even window, drop the end that says less about the minimum
        drop_left = loss[lowest - left] >= loss[lowest + right]
        left, right = left - drop_left, right - (not drop_left)
    here = float(curve.log2_lr[lowest])
    if not (left and right):
        return Optimum(here, float(loss[lowest]), np.nan, here, here, "edge")
    wide = _vertex(curve, lowest, left, right, "parabola")
    narrow = _vertex(curve, lowest, 1, 1, "three-point")
    return wide or narrow or Optimum(here, float(loss[lowest]), np.nan, here, here, "grid")


def window_interval(curve: Curve, best: Optimum) -> tuple[float, float]:
    """Returns how far a parabola's vertex moves with the choice of window, the only uncertainty visible in one seed.

    This is the hull of `best` and the vertices of the windows of 3, 4 (extending left), 4 (extending right) and 5
    points, cut like the estimator's. To either side it extends at least ONE_SEED_RESOLUTION of the way to the lowest
    point's neighbor, since the agreement of windows says nothing about other seeds.
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
    """Returns the learning rates (log2) next to the lowest loss, including diverged ones; infinite beyond the grid.

    A gap is not a bound; the next learning rate beyond it is.
    """
    known = ~curve.gaps
    lowest = int(np.nanargmin(curve.mean[known]))
    fenced = np.concatenate([[-np.inf], curve.log2_lr[known], [np.inf]])
    return float(fenced[lowest]), float(fenced[lowest + 2])


def loss_at(curve: Curve, best: Optimum, log2_lr: float) -> float:
    """Returns the loss (nats) at a learning rate: from the fitted parabola in its window, from PCHIP elsewhere.

    PCHIP interpolates the measured mean losses between neighboring learning rates that both converged. Beyond the grid
    and next to a diverged learning rate or a gap, the loss is +inf, since no measurement bounds it. Returns NaN for a
    NaN learning rate or a curve without any loss.
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
    """The cost of a learning rate relative to the curve's own optimum.

    nats: never negative. at_least: the learning rate is beyond those that converged, and `nats` is the cost of the last
    one that converged on that side.
    """

    nats: float
    at_least: bool


def regret(curve: Curve, best: Optimum, log2_lr: float) -> Regret:
    """Returns the cost of using `log2_lr` instead of the curve's own optimum; NaN if either is unknown.

    A curve rises away from its optimum, so the outermost loss is a lower bound where nothing was measured or everything
    diverged. If a least-squares vertex is above a measured loss, the difference is a fit residual and the cost is 0.
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
    """Yields (start, stop) of each unbroken run of finite values."""
    edges = np.flatnonzero(np.diff(np.isfinite(values).astype(int), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _reach(loss: FloatArray, lowest: int, most: int) -> tuple[int, int]:
    """Returns the numbers of points left and right of the lowest that a window may hold, at most `most` each."""

    def steps(direction: int) -> int:
        for step in range(1, most + 1):
            at = lowest + direction * step
            outside = not 0 <= at < loss.size or not np.isfinite(loss[at])
            if outside or (step > 1 and loss[at] - loss[lowest] > NEAR):
                return step - 1
        return most

    return steps(-1), steps(1)


def _vertex(curve: Curve, lowest: int, left: int, right: int, fit: Fit) -> Optimum | None:
    """Returns the vertex of the window's parabola; None if it is not convex or its vertex is outside the window."""
    window = slice(lowest - left, lowest + right + 1)
    # Centered on the lowest point, so that the offsets of the grid and the loss cost no precision.
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
