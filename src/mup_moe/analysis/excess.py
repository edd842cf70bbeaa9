"""Computes what a learning rate tuned at the base costs at the other end of the axis.

The drift alone does not expose a rule with a fixed optimum but rising losses; the excess does. S: seeds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from mup_moe.analysis.curve import Curve, FloatArray, find_optimum, regret
from mup_moe.config.settings import AnalysisSettings

Curves = Mapping[int, Curve]  # value of the curve axis -> curve
Panels = Mapping[Any, Curves]


@dataclass(frozen=True)
class Excess:
    """Nats per token above other losses, and Student's interval over seeds; NaN means unknown.

    With one seed there is no interval: low and high equal the value. at_least: the learning rate is beyond those that
    converged, so there is no upper bound.
    """

    nats: float
    low: float
    high: float
    at_least: bool


@dataclass(frozen=True)
class Losses:
    """(S,) losses at one learning rate, in nats.

    at_least: for some seed the learning rate is beyond those that converged, so its loss is only a lower bound.
    """

    nats_S: FloatArray
    at_least: bool


UNKNOWN = Excess(np.nan, np.nan, np.nan, False)


def over_lowest(panels: Panels, panel: Any, base: int, analysis: AnalysisSettings) -> Excess:
    """Returns a panel's loss at its far end, at the base's best learning rate, over the lowest of any panel there.

    The lowest loss is measured, not fitted: a vertex next to a cliff is below everything that a cell reached. The
    result is never negative. If there are two far ends, the one with more evidence against the panel counts.
    """

    def lost(end: int) -> Excess:
        found = transferred(panels[panel], end, base, analysis)
        lowest_PS = [_lowest(of_panel[end]) for of_panel in panels.values() if end in of_panel]
        return over_seeds(np.maximum(found.nats_S - np.fmin.reduce(lowest_PS), 0), found.at_least, analysis.confidence)

    return max(_at_ends(panels[panel], base, lost), key=lambda one: (one.high, one.nats), default=UNKNOWN)


def over_rule(control: Curves, rule: Curves, base: int, analysis: AnalysisSettings) -> Excess:
    """Returns a control's loss over that of the rule that it varies, each at its own base's best learning rate.

    If there are two far ends, the one with more evidence against the control counts. UNKNOWN if the rule has other
    ends.
    """

    def lost(end: int) -> Excess:
        ours, theirs = (transferred(of, end, base, analysis) for of in (control, rule))
        return difference(ours, theirs, analysis.confidence)

    if _far_ends(control, base) != _far_ends(rule, base):
        return UNKNOWN
    return max(_at_ends(control, base, lost), key=lambda one: (one.low, one.nats), default=UNKNOWN)


def _far_ends(curves: Curves, base: int) -> set[int]:
    """Returns the ends of the curve axis except the base; none if the base is not on the axis."""
    return {min(curves), max(curves)} - {base} if base in curves else set()


def _at_ends(curves: Curves, base: int, lost: Callable[[int], Excess]) -> list[Excess]:
    """Returns the excess at each end, or only the first unknown one if any is unknown."""
    found = [lost(end) for end in sorted(_far_ends(curves, base), reverse=True)]
    unknown = [one for one in found if np.isnan(one.nats)]
    return unknown[:1] or found


def transferred(curves: Curves, end: int, base: int, analysis: AnalysisSettings) -> Losses:
    """Returns the losses at a value of the axis, at the learning rate that is best at the base."""
    return losses_at(curves[end], find_optimum(curves[base], analysis.fit_points).log2_lr, analysis)


def losses_at(curve: Curve, log2_lr: float, analysis: AnalysisSettings) -> Losses:
    """Returns the loss of each seed of a curve at a learning rate, from the seed's own fit."""
    own = [curve.seed(seed) for seed in range(curve.seeds)]
    optima = [find_optimum(one, analysis.fit_points) for one in own]
    costs = [regret(one, best, log2_lr) for one, best in zip(own, optima, strict=True)]
    losses = [best.loss + cost.nats for best, cost in zip(optima, costs, strict=True)]
    return Losses(np.array(losses), any(cost.at_least for cost in costs))


def difference(ours: Losses, theirs: Losses, confidence: float) -> Excess:
    """Returns our losses minus theirs, seed by seed; there is no lower bound if theirs are lower bounds themselves."""
    found = over_seeds(ours.nats_S - theirs.nats_S, ours.at_least, confidence)
    return replace(found, low=-np.inf) if theirs.at_least else found


def _lowest(curve: Curve) -> FloatArray:
    """Returns the lowest loss of each seed at any learning rate, (S,); NaN for a seed without losses."""
    lowest: FloatArray = np.fmin.reduce(np.where(np.isfinite(curve.losses), curve.losses, np.nan), axis=1)
    return lowest


def over_seeds(nats_S: FloatArray, at_least: bool, confidence: float) -> Excess:
    """Returns the mean of (S,) nats per token with Student's interval over the seeds."""
    mean, margin = float(nats_S.mean()), 0.0
    if len(nats_S) > 1:
        margin = float(stats.sem(nats_S) * stats.t.ppf((1 + confidence) / 2, len(nats_S) - 1))
    return Excess(mean, mean - margin, np.inf if at_least else mean + margin, at_least)
