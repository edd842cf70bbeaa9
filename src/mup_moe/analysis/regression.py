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


def regress(points: Sequence[tuple[int, float, float]], confidence: float) -> tuple[float, Interval]:
    """The slope that points (seed, x, y) share, each seed with an intercept of its own.

    What shifts all points of a seed alike says nothing of the slope. The interval is Student's with
    as many degrees of freedom as there are points, less the intercepts and the slope; there is none
    where residuals allow none. NaN where no seed has two distinct x.
    """
    table = pd.DataFrame(points, columns=["seed", "x", "y"], dtype=float)
    table = table[np.isfinite(table["y"])]
    within = table[["x", "y"]] - table.groupby("seed")[["x", "y"]].transform("mean")
    if within.empty or np.ptp(within["x"]) == 0:
        return np.nan, NO_INTERVAL
    line = stats.linregress(within["x"], within["y"])
    slope = float(line.slope)
    freedom = len(within) - table["seed"].nunique() - 1
    # Two points leave no residual to judge by, nor do equal ones, such as optima all at one edge.
    if freedom < 1 or not np.isfinite(line.stderr) or np.ptp(within["y"]) == 0:
        return slope, NO_INTERVAL
    error = line.stderr * np.sqrt((len(within) - 2) / freedom)  # linregress knows of one intercept only
    margin = float(error * stats.t.ppf((1 + confidence) / 2, freedom))
    return slope, Interval(slope - margin, slope + margin, "t")
