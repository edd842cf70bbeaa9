"""The slope of a line through points, and how sure of it they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

IntervalKind = Literal["bootstrap", "window", "bracket", "t", ""]


@dataclass(frozen=True)
class Interval:
    """Bounds around an estimate, and where they come from ("" and NaN: there are none).

    bootstrap: percentiles over resampled seeds, widened to hold the estimate. window: see
    `curve.window_interval`. bracket: the neighbouring learning rates, of an optimum that the grid
    does not enclose. t: Student's t of the regression.
    """

    low: float
    high: float
    kind: IntervalKind

    def hull(self, low: float, high: float) -> "Interval":
        """The smallest interval that holds this one and [low, high]."""
        return Interval(min(self.low, low), max(self.high, high), self.kind)


NO_INTERVAL = Interval(np.nan, np.nan, "")
EQUAL = 1e-9  # less is rounding


def regress(points: Sequence[tuple[int, float, float]], confidence: float) -> tuple[float, Interval]:
    """The slope of points (seed, x, y), and the wider of two Student's intervals.

    One is of all points, each seed with an intercept of its own: it knows the seeds' noise. The
    other is of the means over seeds: it knows departures from a line that all seeds share, which
    more seeds do not make smaller. With one seed they are the same. NaN where there are not two
    distinct x; no interval where residuals allow neither.
    """
    table = pd.DataFrame(points, columns=["seed", "x", "y"], dtype=float)
    table = table[np.isfinite(table["y"])]
    within = table[["x", "y"]] - table.groupby("seed")[["x", "y"]].transform("mean")
    slope, of_points = _line(within, len(table) - table["seed"].nunique() - 1, confidence)
    means = table.groupby("x", as_index=False)["y"].mean()
    _, of_means = _line(means, len(means) - 2, confidence)
    margin = float(np.nanmax([of_points, of_means, -1.0]))  # -1: neither allows one
    return slope, NO_INTERVAL if margin < 0 else Interval(slope - margin, slope + margin, "t")


def _line(table: pd.DataFrame, freedom: int, confidence: float) -> tuple[float, float]:
    """The slope of y on x with so many degrees of freedom, and its margin; NaN where there is none."""
    if table.empty or np.ptp(table["x"]) == 0:
        return np.nan, np.nan
    line = stats.linregress(table["x"], table["y"])
    # No residual to judge by: too few points, or all y equal, such as optima all at one edge.
    if freedom < 1 or not np.isfinite(line.stderr) or np.ptp(table["y"]) < EQUAL:
        return float(line.slope), np.nan
    error = line.stderr * np.sqrt((len(table) - 2) / freedom)  # linregress knows of one intercept only
    return float(line.slope), float(error * stats.t.ppf((1 + confidence) / 2, freedom))
