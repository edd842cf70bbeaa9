"""How the optima of a panel's curves move along the curve axis: intervals, drift and regret."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
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

IntervalKind = Literal["bootstrap", "window", "bracket", "t", ""]
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Interval:
    """Bounds around an estimate, and where they come from ("" and NaN: there are none).

    bootstrap: percentiles over resampled seeds, widened to hold the estimate. window: see
    `window_interval`. bracket: the neighbouring learning rates, of an optimum that the grid does
    not enclose. t: Student's t of the regression.
    """

    low: float
    high: float
    kind: IntervalKind

    def hull(self, low: float, high: float) -> "Interval":
        """The smallest interval that holds this one and [low, high]."""
        return Interval(min(self.low, low), max(self.high, high), self.kind)


NO_INTERVAL = Interval(np.nan, np.nan, "")


@dataclass(frozen=True)
class Transfer:
    """A panel's result: per value of the curve axis (ascending), and the drift over them.

    regrets: what the base value's optimum costs; NaN without a base. drift: octaves of learning
    rate per octave of the curve axis; NaN for fewer than two optima.
    """

    optima: dict[int, Optimum]
    intervals: dict[int, Interval]
    regrets: dict[int, Regret]
    drift: float
    drift_interval: Interval


def measure_transfer(curves: Mapping[int, Curve], base: int | None, analysis: AnalysisSettings) -> Transfer:
    """Optima, intervals, regrets and drift of the curves of one panel (curve value -> curve).

    With several seeds, one bootstrap resamples the seeds of all curves together and repeats the
    whole estimate, so that the drift's interval has in it what the curves share. With few seeds its
    coverage is below its level; it never covers less than its own estimate.
    """
    if len({curve.seeds for curve in curves.values()}) != 1:
        raise ValueError("the curves of a panel must have the same seeds")
    curves = dict(sorted(curves.items()))
    optima = {value: find_optimum(curve, analysis.fit_points) for value, curve in curves.items()}
    found = [value for value, best in optima.items() if np.isfinite(best.log2_lr)]
    drift, drift_interval = _regression({value: optima[value].log2_lr for value in found}, analysis.confidence)

    intervals = dict.fromkeys(curves, NO_INTERVAL)
    if found and curves[found[0]].seeds > 1:
        of_curves, of_drift = _bootstrap({value: curves[value] for value in found}, analysis)
        for value, interval in of_curves.items():
            intervals[value] = interval.hull(optima[value].log2_lr, optima[value].log2_lr)
        if of_drift:
            drift_interval = of_drift.hull(drift, drift)
    for value in found:
        curve, best = curves[value], optima[value]
        if best.fit in ("edge", "grid"):  # no vertex to move about, though seeds may agree on the point
            between, known = Interval(*bracket(curve), "bracket"), intervals[value]
            intervals[value] = between.hull(known.low, known.high) if known.kind else between
        elif curve.seeds == 1:
            intervals[value] = Interval(*window_interval(curve, best), "window")

    base_optimum = optima[base].log2_lr if base in optima else np.nan
    regrets = {value: regret(curve, optima[value], base_optimum) for value, curve in curves.items()}
    return Transfer(optima, intervals, regrets, drift, drift_interval)


def _regression(log2_lr: Mapping[int, float], confidence: float) -> tuple[float, Interval]:
    """The slope of log2_lr on log2 of the curve axis, with Student's interval where residuals allow one."""
    if len(log2_lr) < 2:
        return np.nan, NO_INTERVAL
    line = stats.linregress(np.log2(list(log2_lr)), list(log2_lr.values()))
    slope = float(line.slope)
    # Two optima leave no residual to judge by, nor do equal ones, such as all at one edge.
    if len(log2_lr) == 2 or not np.isfinite(line.stderr):
        return slope, NO_INTERVAL
    margin = float(line.stderr * stats.t.ppf((1 + confidence) / 2, len(log2_lr) - 2))
    return slope, Interval(slope - margin, slope + margin, "t")


def _bootstrap(curves: Mapping[int, Curve], analysis: AnalysisSettings) -> tuple[dict[int, Interval], Interval | None]:
    """Percentile intervals of each curve's optimum, and of the drift if there are two curves or more."""

    def estimate(seeds: npt.NDArray[np.int64]) -> list[float]:
        optima = {
            value: find_optimum(curve.resampled(seeds), analysis.fit_points).log2_lr for value, curve in curves.items()
        }
        drift = [_regression(optima, analysis.confidence)[0]] if len(optima) > 1 else []
        return [*optima.values(), *drift]

    def statistic(seeds: npt.NDArray[np.int64], axis: Any) -> FloatArray:
        seeds = np.moveaxis(seeds, axis, -1)
        # Few seeds have few distinct resamples: each is fitted once.
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
    intervals = [Interval(float(low), float(high), "bootstrap") for low, high in bounds]
    return dict(zip(curves, intervals, strict=False)), intervals[-1] if len(curves) > 1 else None
