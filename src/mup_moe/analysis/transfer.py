"""How the optima of a panel's curves move along the curve axis: intervals, drift and regret."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from mup_moe.analysis.regression import NO_INTERVAL, Interval, regress
from mup_moe.config.settings import AnalysisSettings

BOOTSTRAP_SEED = 0


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

    The drift is the slope of every seed's own optima on the curve axis, in log2 of both, with the
    interval of `regress`. That of one curve's optimum is a bootstrap over seeds where there are
    several; with few its coverage is below its level.
    """
    if len({curve.seeds for curve in curves.values()}) != 1:
        raise ValueError("the curves of a panel must have the same seeds")
    curves = dict(sorted(curves.items()))
    optima = {value: find_optimum(curve, analysis.fit_points) for value, curve in curves.items()}
    found = [value for value, best in optima.items() if np.isfinite(best.log2_lr)]
    own = {
        (seed, value): find_optimum(curves[value].resampled(np.array([seed])), analysis.fit_points)
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
        if best.fit in ("edge", "grid"):  # no vertex to move about, though seeds may agree on the point
            between, known = Interval(*bracket(curve), "bracket"), intervals[value]
            intervals[value] = between.hull(known.low, known.high) if known.kind else between
        elif curve.seeds == 1:
            intervals[value] = Interval(*window_interval(curve, best), "window")

    base_optimum = optima[base].log2_lr if base in optima else np.nan
    regrets = {value: regret(curve, optima[value], base_optimum) for value, curve in curves.items()}
    return Transfer(optima, intervals, regrets, drift, drift_interval)


def _bootstrap(curves: Mapping[int, Curve], analysis: AnalysisSettings) -> dict[int, Interval]:
    """Percentile intervals of each curve's optimum."""

    def estimate(seeds: npt.NDArray[np.int64]) -> list[float]:
        return [find_optimum(curve.resampled(seeds), analysis.fit_points).log2_lr for curve in curves.values()]

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
    return {
        value: Interval(float(low), float(high), "bootstrap") for value, (low, high) in zip(curves, bounds, strict=True)
    }
