"""What a learning rate that was tuned at the base costs elsewhere, beside the best that any row reaches there.

The drift alone does not show a rule whose optimum stays while its losses rise; this does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from mup_moe.analysis.curve import Curve, find_optimum, regret
from mup_moe.config.settings import AnalysisSettings

Panels = Mapping[Any, Mapping[int, Curve]]  # panel -> value of the curve axis -> curve


@dataclass(frozen=True)
class Excess:
    """Nats per token above the lowest loss of any row, and Student's interval over seeds; NaN: not known.

    One seed has no interval: low and high are the value. at_least: the learning rate lies beyond what
    converged, so that there is no upper bound.
    """

    nats: float
    low: float
    high: float
    at_least: bool


def excess(panels: Panels, panel: Any, value: int, base: int, analysis: AnalysisSettings) -> Excess:
    """The loss of a panel at a value, at the learning rate that is best at the panel's base value, less the lowest.

    The lowest is that of the optima of all panels at this value, for each seed by itself.
    """
    curves = panels[panel]
    rate = find_optimum(curves[base], analysis.fit_points).log2_lr
    own = [curves[value].seed(seed) for seed in range(curves[value].seeds)]
    optima = [find_optimum(curve, analysis.fit_points) for curve in own]
    regrets = [regret(curve, best, rate) for curve, best in zip(own, optima, strict=True)]
    transferred = np.array([best.loss + cost.nats for best, cost in zip(optima, regrets, strict=True)])
    lowest = [
        [
            find_optimum(of_panel[value].seed(seed), analysis.fit_points).loss
            for of_panel in panels.values()
            if value in of_panel
        ]
        for seed in range(len(own))
    ]
    values = np.maximum(transferred - np.fmin.reduce(np.array(lowest), axis=1), 0)
    at_least = any(cost.at_least for cost in regrets)
    mean, margin = float(values.mean()), 0.0
    if len(values) > 1:
        error = values.std(ddof=1) / np.sqrt(len(values))
        margin = float(error * stats.t.ppf((1 + analysis.confidence) / 2, len(values) - 1))
    return Excess(mean, mean - margin, np.inf if at_least else mean + margin, at_least)


def largest_excess(panels: Panels, panel: Any, base: int, analysis: AnalysisSettings) -> Excess:
    """That at the far end of the curve axis: the end at which it is larger, where the base lies within."""
    ends = {min(panels[panel]), max(panels[panel])} - {base} if base in panels[panel] else set()
    found = [excess(panels, panel, end, base, analysis) for end in sorted(ends, reverse=True)]
    return max(found, key=lambda one: one.nats, default=Excess(np.nan, np.nan, np.nan, False))
