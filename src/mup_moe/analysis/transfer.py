"""Measures how the optima of a panel's curves move along the curve axis: slope (drift), intervals and regret."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from mup_moe.analysis.curve import (
    Curve,
    FloatArray,
    Optimum,
    Regret,
    bracket,
    find_optimum,
    regret,
    window_interval,
)
from mup_moe.config.settings import AnalysisSettings

BOOTSTRAP_SEED = 0
EQUAL = 1e-9  # smaller differences are rounding
IntervalKind = Literal["bootstrap", "window", "bracket", "t", ""]


@dataclass(frozen=True)
class Interval:
    """Bounds around an estimate and the method behind them ("" and NaN if there are none).

    bootstrap: percentiles over resampled seeds, widened to include the estimate. window: see
    `curve.window_interval`. bracket: the neighboring learning rates, for an optimum without a vertex. t: Student's t of
    the regression.
    """

    low: float
    high: float
    kind: IntervalKind

    def hull(self, low: float, high: float) -> "Interval":
        """Returns the smallest interval that contains this one and [low, high]."""
        return Interval(min(self.low, low), max(self.high, high), self.kind)


NO_INTERVAL = Interval(np.nan, np.nan, "")


@dataclass(frozen=True)
class Transfer:
    """A panel's results: one per value of the curve axis (ascending), and the drift over them.

    regrets: the cost of using the optimum of the base; NaN without a base. drift: octaves of learning rate per octave
    of the curve axis; NaN for fewer than two optima.
    """

    optima: dict[int, Optimum]
    intervals: dict[int, Interval]
    regrets: dict[int, Regret]
    drift: float
    drift_interval: Interval


def measure_transfer(curves: Mapping[int, Curve], base: int | None, analysis: AnalysisSettings) -> Transfer:
    """Returns the optima, intervals, regrets and drift of the curves of one panel (curve value -> curve).

    The drift is the slope of every seed's own optima on the curve axis, in log2 of both, with the interval of
    `regress`. With several seeds, the interval of one curve's optimum is a bootstrap over seeds; with few seeds its
    coverage is below its nominal level.
    """
    if len({curve.seeds for curve in curves.values()}) != 1:
        raise ValueError("the curves of a panel must have the same seeds")
    curves = dict(sorted(curves.items()))
    optima = {value: find_optimum(curve, analysis.fit_points) for value, curve in curves.items()}
    found = [value for value, best in optima.items() if np.isfinite(best.log2_lr)]
    own = {
        (seed, value): find_optimum(curves[value].seed(seed), analysis.fit_points)
        for value in found
        for seed in range(curves[value].seeds)
    }
    points = [(seed, float(np.log2(value)), best.log2_lr) for (seed, value), best in own.items()]
    drift, drift_interval = regress(points, analysis.confidence)

    intervals = dict.fromkeys(curves, NO_INTERVAL)
    if found and curves[found[0]].seeds > 1:
        for value, interval in _bootstrap({value: curves[value] for value in found}, analysis).items():
            intervals[value] = interval.hull(optima[value].log2_lr, optima[value].log2_lr)
    for value in found:
        curve, best = curves[value], optima[value]
        if best.fit in ("edge", "grid"):  # there is no vertex to vary, even if the seeds agree on the point
            between, known = Interval(*bracket(curve), "bracket"), intervals[value]
            intervals[value] = between.hull(known.low, known.high) if known.kind else between
        elif curve.seeds == 1:
            intervals[value] = Interval(*window_interval(curve, best), "window")

    base_optimum = optima[base].log2_lr if base in optima else np.nan
    regrets = {value: regret(curve, optima[value], base_optimum) for value, curve in curves.items()}
    return Transfer(optima, intervals, regrets, drift, drift_interval)


def _bootstrap(curves: Mapping[int, Curve], analysis: AnalysisSettings) -> dict[int, Interval]:
    """Returns percentile intervals of each curve's optimum."""

    def estimate(seeds: npt.NDArray[np.int64]) -> list[float]:
        return [find_optimum(curve.resampled(seeds), analysis.fit_points).log2_lr for curve in curves.values()]

    def statistic(seeds: npt.NDArray[np.int64], axis: Any) -> FloatArray:
        seeds = np.moveaxis(seeds, axis, -1)
        # Few seeds have few distinct resamples, so fit each only once.
        flat = np.sort(seeds, axis=-1).reshape(-1, seeds.shape[-1])
        distinct, which = np.unique(flat, axis=0, return_inverse=True)
        estimates = np.array([estimate(row) for row in distinct]).T
        return estimates[:, which.reshape(-1)].reshape(len(estimates), *seeds.shape[:-1])

    count = next(iter(curves.values())).seeds
    result = stats.bootstrap(
        (np.arange(count),),
        statistic,
        n_resamples=analysis.resamples,
        confidence_level=analysis.confidence,
        method="percentile",
        vectorized=True,
        random_state=np.random.default_rng(BOOTSTRAP_SEED),
    )
    bounds = zip(result.confidence_interval.low, result.confidence_interval.high, strict=True)
    return {
        value: Interval(float(low), float(high), "bootstrap") for value, (low, high) in zip(curves, bounds, strict=True)
    }


def regress(points: Sequence[tuple[int, float, float]], confidence: float) -> tuple[float, Interval]:
    """Returns the slope of points (seed, x, y) and the wider of two Student's intervals.

    One interval comes from all points, with an intercept per seed, and reflects the seeds' noise. The other comes from
    the means over seeds and reflects departures from a line that all seeds share, which more seeds do not reduce. With
    one seed they are the same. The slope is NaN without two distinct x; there is no interval if the residuals allow
    neither.
    """
    table = pd.DataFrame(points, columns=["seed", "x", "y"], dtype=float)
    table = table[np.isfinite(table["y"])]
    within = table[["x", "y"]] - table.groupby("seed")[["x", "y"]].transform("mean")
    slope, of_points = _line(within, len(table) - table["seed"].nunique() - 1, confidence)
    means = table.groupby("x", as_index=False)["y"].mean()
    _, of_means = _line(means, len(means) - 2, confidence)
    margin = float(np.nanmax([of_points, of_means, -1.0]))  # -1: there is neither
    return slope, NO_INTERVAL if margin < 0 else Interval(slope - margin, slope + margin, "t")


def _line(table: pd.DataFrame, freedom: int, confidence: float) -> tuple[float, float]:
    """Returns the slope of y on x and its margin for these degrees of freedom; NaN if there is none."""
    if table.empty or np.ptp(table["x"]) == 0:
        return np.nan, np.nan
    line = stats.linregress(table["x"], table["y"])
    # The residuals give no error estimate: too few points, or all y equal, such as optima all at one edge.
    if freedom < 1 or not np.isfinite(line.stderr) or np.ptp(table["y"]) < EQUAL:
        return float(line.slope), np.nan
    error = line.stderr * np.sqrt((len(table) - 2) / freedom)  # linregress assumes a single intercept
    return float(line.slope), float(error * stats.t.ppf((1 + confidence) / 2, freedom))
