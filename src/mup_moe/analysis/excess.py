"""What a learning rate that was tuned at the base costs at the other end of the axis.

The drift alone does not show a rule whose optimum stays while its losses rise; this does. S: seeds.
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
    """Nats per token above other losses, and Student's interval over seeds; NaN: not known.

    One seed has no interval: low and high are the value. at_least: the learning rate lies beyond what
    converged, so that there is no upper bound.
    """

    nats: float
    low: float
    high: float
    at_least: bool


@dataclass(frozen=True)
class Losses:
    """(S,) losses at one learning rate, in nats.

    at_least: that of one seed lies beyond what converged, so that its loss is only a lower bound.
    """

    nats_S: FloatArray
    at_least: bool


UNKNOWN = Excess(np.nan, np.nan, np.nan, False)


def over_lowest(panels: Panels, panel: Any, base: int, analysis: AnalysisSettings) -> Excess:
    """A panel's loss at its far end, at the base's best learning rate, over the lowest that any panel has there.

    The lowest is measured, not fitted: a vertex beside a cliff lies below everything that a cell reached. Never
    negative. Of two ends the one that speaks more against the panel.
    """

    def lost(end: int) -> Excess:
        found = transferred(panels[panel], end, base, analysis)
        lowest_PS = [_lowest(of_panel[end]) for of_panel in panels.values() if end in of_panel]
        return over_seeds(np.maximum(found.nats_S - np.fmin.reduce(lowest_PS), 0), found.at_least, analysis.confidence)

    return max(_at_ends(panels[panel], base, lost), key=lambda one: (one.high, one.nats), default=UNKNOWN)


def over_rule(control: Curves, rule: Curves, base: int, analysis: AnalysisSettings) -> Excess:
    """A control's loss over that of the rule that it varies, each at its own base's best learning rate.

    Of two ends the one that speaks more against the control; UNKNOWN where the rule has other ends.
    """

    def lost(end: int) -> Excess:
        ours, theirs = (transferred(of, end, base, analysis) for of in (control, rule))
        return difference(ours, theirs, analysis.confidence)

    if _far_ends(control, base) != _far_ends(rule, base):
        return UNKNOWN
    return max(_at_ends(control, base, lost), key=lambda one: (one.low, one.nats), default=UNKNOWN)


def _far_ends(curves: Curves, base: int) -> set[int]:
    """The ends of the curve axis, without the base; none where the base is not on it."""
    return {min(curves), max(curves)} - {base} if base in curves else set()


def _at_ends(curves: Curves, base: int, lost: Callable[[int], Excess]) -> list[Excess]:
    """That of each end; of those that are not known, the first alone."""
    found = [lost(end) for end in sorted(_far_ends(curves, base), reverse=True)]
    unknown = [one for one in found if np.isnan(one.nats)]
    return unknown[:1] or found


def transferred(curves: Curves, end: int, base: int, analysis: AnalysisSettings) -> Losses:
    """What a value of the axis comes to at the learning rate that is best at the base."""
    return losses_at(curves[end], find_optimum(curves[base], analysis.fit_points).log2_lr, analysis)


def losses_at(curve: Curve, log2_lr: float, analysis: AnalysisSettings) -> Losses:
    """What each seed of a curve has at a learning rate, by the seed's own fit."""
    own = [curve.seed(seed) for seed in range(curve.seeds)]
    optima = [find_optimum(one, analysis.fit_points) for one in own]
    costs = [regret(one, best, log2_lr) for one, best in zip(own, optima, strict=True)]
    losses = [best.loss + cost.nats for best, cost in zip(optima, costs, strict=True)]
    return Losses(np.array(losses), any(cost.at_least for cost in costs))


def difference(ours: Losses, theirs: Losses, confidence: float) -> Excess:
    """Our losses over theirs, seed by seed; without a lower bound where theirs are at least so high."""
    found = over_seeds(ours.nats_S - theirs.nats_S, ours.at_least, confidence)
    return replace(found, low=-np.inf) if theirs.at_least else found


def _lowest(curve: Curve) -> FloatArray:
    """(S,) the lowest loss that each seed has at any learning rate; NaN where it has none."""
    lowest: FloatArray = np.fmin.reduce(np.where(np.isfinite(curve.losses), curve.losses, np.nan), axis=1)
    return lowest


def over_seeds(nats_S: FloatArray, at_least: bool, confidence: float) -> Excess:
    """The mean of (S,) nats per token, with Student's interval over the seeds."""
    mean, margin = float(nats_S.mean()), 0.0
    if len(nats_S) > 1:
        margin = float(stats.sem(nats_S) * stats.t.ppf((1 + confidence) / 2, len(nats_S) - 1))
    return Excess(mean, mean - margin, np.inf if at_least else mean + margin, at_least)
