"""Decides whether a claim of the paper replicates, by the criteria that the config fixes.

A test is a number with its interval and an expectation, which `judge` compares. A test that the measurement cannot
decide is inconclusive. So is any drift in a panel with a left-out cell, since leaving out cells must never improve a
result. A panel that keeps its best learning rate counts only if its controls, which are wrong in what the claim is
about, do not keep theirs; otherwise the sweep cannot tell. A claim is replicated if all its tests are, not replicated
if any test is not, and otherwise inconclusive.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from mup_moe.analysis.excess import Panels, over_lowest, over_rule
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.names import panel_title, parametrization_title
from mup_moe.analysis.optima import OptimumRow, read_optima
from mup_moe.analysis.runs import figure_curves, read_rows, read_runs, read_table
from mup_moe.analysis.slopes import Slope
from mup_moe.config.settings import ClaimSettings, ClaimsSettings, Config, DriftTest, SlopeTest

Expectation = Literal["keeps", "moves", "falls", "drifts"]
Verdict = Literal["replicated", "not replicated", "inconclusive"]
CANNOT_TELL = "this sweep cannot tell"  # the reason where a wrong rule passes a test


def judge(expect: Expectation, low: float, high: float, margin: float) -> Verdict:
    """Compares an interval with an expectation, whatever the size of the sweep; inconclusive without an interval.

    keeps, drifts: replicated if the interval is within +-margin, refuted if the two do not overlap. moves, falls:
    replicated if the interval excludes 0 (falls: is below 0) and extends beyond the margin, refuted if it is within the
    margin (falls: or above 0).
    """
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    within = -margin <= low and high <= margin
    if expect in ("keeps", "drifts"):
        apart = low > margin or high < -margin
        return "replicated" if within else "not replicated" if apart else "inconclusive"
    moved = high < 0 or (expect == "moves" and low > 0)
    if moved and not within:
        return "replicated"
    return "not replicated" if within or (expect == "falls" and low > 0) else "inconclusive"


class Test(NamedTuple):
    """One test of a claim, or the same test applied to one of its controls.

    kind: "drift", "slope" or "control". estimate, low, high: a drift in octaves of learning rate per octave of the
    axis, or a slope; NaN if there is none. expected: subtracted before the comparison with the margin. excess,
    excess_low, excess_high: nats at the far end of the axis (`analysis.excess`); for a panel that should keep its best
    learning rate, over the lowest loss there; for a control, over the loss of its rule; otherwise NaN. octaves: the
    range of the axis over the points that count. tokens: per cell, 0 for a slope. missing: cells that were left out of
    the runs. verdict: replicated, not replicated, or inconclusive for the given `reason`; the verdict of a control does
    not count toward that of the claim.
    """

    claim: str
    result: str
    panel: str
    kind: str
    what: str
    expect: str
    expected: float
    margin: float
    excess_margin: float = math.nan
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    excess: float = math.nan
    excess_low: float = math.nan
    excess_high: float = math.nan
    octaves: float = 0.0
    tokens: int = 0
    missing: int = 0
    verdict: Verdict = "inconclusive"
    reason: str = ""


@dataclass(frozen=True)
class Evidence:
    """The results that tests use: figure -> its optima, the most tokens of a cell, its curves; probe -> slopes."""

    optima: Mapping[str, Sequence[OptimumRow]]
    tokens: Mapping[str, int]
    curves: Mapping[str, Panels]
    specs: Mapping[str, FigureSpec]
    slopes: Mapping[str, Sequence[Slope]]


def read_evidence(config: Config, results: Path) -> Evidence:
    """Reads the results that the tests of all claims rest on. Raises UserError."""
    figures = config.claims.figures
    specs = {name: FigureSpec.of(config, name) for name in figures}
    probes = dict.fromkeys(slope.probe for claim in config.claims.table.values() for slope in claim.slopes)
    return Evidence(
        optima={
            name: [row for rows in read_optima(results / name / "optima.csv", name, spec).values() for row in rows]
            for name, spec in specs.items()
        },
        tokens={name: _most_tokens(results / name / "runs.csv") for name in figures},
        curves={name: figure_curves(read_runs(results / name / "runs.csv"), specs[name]) for name in figures},
        specs=specs,
        slopes={name: read_rows(results / f"{name}.csv", Slope) for name in probes},
    )


def _most_tokens(runs: Path) -> int:
    return int(max(read_table(runs, {"tokens": int})["tokens"], default=0))


def all_tests(config: Config, results: Path) -> dict[str, list[Test]]:
    """Returns the tests of every claim of a config by the claim's name. Raises UserError as `read_evidence` does."""
    settings, evidence = config.claims, read_evidence(config, results)
    return {name: list(tests_of(name, claim, settings, evidence)) for name, claim in settings.table.items()}


def tests_of(name: str, claim: ClaimSettings, settings: ClaimsSettings, evidence: Evidence) -> Iterator[Test]:
    """Yields every test of a claim, each followed by its controls; a slope is tested in each block."""
    for drift in claim.drifts:
        test = _drift_test(name, drift, settings, evidence)
        where = drift.controls
        own = [DriftTest(figure=where.figure, panel=panel, expect="keeps") for panel in where.panels] if where else []
        controls = [_drift_test(name, control, settings, evidence, control_of=drift) for control in own]
        yield _with_controls(test, controls) if drift.expect == "keeps" else test
        yield from (control._replace(kind="control") for control in controls)
    for slope in claim.slopes:
        yield from _slope_tests(name, slope, settings, evidence)


def _drift_test(
    name: str, drift: DriftTest, settings: ClaimsSettings, evidence: Evidence, control_of: DriftTest | None = None
) -> Test:
    """Tests one panel by a criterion, before its controls are considered. control_of: the test that it controls."""
    rows = [row for row in evidence.optima[drift.figure] if row.panel == drift.panel]
    test = Test(
        claim=name,
        result=drift.figure,
        panel=drift.panel,
        kind="drift",
        what=f"drift, {panel_title(drift.panel)}",
        expect=drift.expect,
        expected=drift.drift or 0.0,
        margin=settings.drift_margin,
        excess_margin=settings.excess_margin if drift.expect == "keeps" else math.nan,
        tokens=evidence.tokens[drift.figure],
        reason=f"{drift.figure} has no panel {drift.panel}",
    )
    if not rows:
        return test
    found = [row.value for row in rows if not math.isnan(row.log2_lr)]
    test = test._replace(
        what=f"drift over {rows[0].axis}, {panel_title(drift.panel)}",
        estimate=rows[0].drift,
        low=rows[0].drift_low,
        high=rows[0].drift_high,
        octaves=math.log2(max(found) / min(found)) if found else 0.0,
        missing=sum(row.missing for row in rows),
    )
    if test.missing:
        reason = f"{test.missing} of the panel's cells are missing because they were left out: their effect is unknown"
        return test._replace(reason=reason)
    # A control is supposed to fail, so its failure counts in a sweep of any size.
    large = test.tokens >= settings.refuting_tokens and test.octaves >= settings.refuting_octaves
    large = large or control_of is not None
    says = judge(drift.expect, test.low - test.expected, test.high - test.expected, settings.drift_margin)
    if drift.expect == "keeps":
        test = _with_excess(test, drift, evidence, control_of)
        if test.excess_low > settings.excess_margin:
            return _with_verdict(test, "not replicated", large, "excess")
        if says == "replicated" and control_of and math.isnan(test.excess):
            return test._replace(reason=f"{drift.figure} has other seeds or ends than {control_of.figure}")
        if says == "replicated" and not test.excess_high <= settings.excess_margin:
            return test._replace(reason="the excess at the far end of the axis is neither above nor within its margin")
    seems_small = drift.expect == "drifts" or says == ("replicated" if drift.expect == "keeps" else "not replicated")
    if seems_small and any(row.at_edge or math.isnan(row.log2_lr) for row in rows):
        reason = "an optimum is at the end of the grid, or missing, so the drift may be larger than it seems"
        return test._replace(reason=reason)
    return _with_verdict(test, says, large)


def _with_excess(test: Test, drift: DriftTest, evidence: Evidence, control_of: DriftTest | None) -> Test:
    """Adds the excess to a test: a panel's over all rows of its figure and its controls, a control's over its rule.

    If the panels are not rows of the table but, for example, architectures, a panel is compared only with itself and
    its controls. The excess of a control is unknown if its figure has other seeds or ends than its rule's.
    """
    spec, curves = evidence.specs[drift.figure], _panels(evidence, drift.figure)
    other = (control_of or drift.controls or drift).figure
    same_seeds = evidence.specs[other].figure.axes.seed == spec.figure.axes.seed
    others = _panels(evidence, other) if same_seeds else {}
    if control_of is None:
        if spec.figure.panel != "parametrization":
            # The other panels are other models, with losses that are not comparable.
            others = {
                f"control {p}": others[p] for p in (drift.controls.panels if drift.controls else ()) if p in others
            }
            curves = {drift.panel: curves[drift.panel]}
        # The figure's own curves win, since the controls' figure may be smaller.
        found = over_lowest({**others, **curves}, drift.panel, spec.base, spec.analysis)
    else:
        found = over_rule(curves[drift.panel], others.get(control_of.panel, {}), spec.base, spec.analysis)
    return test._replace(excess=found.nats, excess_low=found.low, excess_high=found.high)


def _panels(evidence: Evidence, figure: str) -> Panels:
    return {str(panel): curves for panel, curves in evidence.curves[figure].items()}


def _with_controls(test: Test, controls: Sequence[Test]) -> Test:
    """Revises the test of a panel that should keep its best learning rate in the light of its controls."""
    if test.verdict != "replicated":
        return test
    if not controls:
        return test._replace(verdict="inconclusive", reason="no control shows whether a wrong rule would pass")
    passing = [control.panel for control in controls if control.verdict == "replicated"]
    if passing:
        titles = " and ".join(map(panel_title, passing))
        reason = f"{CANNOT_TELL}: {titles} {'passes' if len(passing) == 1 else 'pass'} the same test"
        return test._replace(verdict="inconclusive", reason=reason)
    for control in controls:
        if control.verdict == "inconclusive":
            reason = f"its control {panel_title(control.panel)} is inconclusive: {control.reason}"
            return test._replace(verdict="inconclusive", reason=reason)
    return test


def _slope_tests(name: str, slope: SlopeTest, settings: ClaimsSettings, evidence: Evidence) -> Iterator[Test]:
    key = (slope.parametrization, slope.quantity, slope.step)
    rows = [s for s in evidence.slopes[slope.probe] if (s.parametrization, s.quantity, s.step) == key]
    what = f"slope of {slope.quantity} after {slope.step} steps, {parametrization_title(slope.parametrization)}"
    test = Test(
        claim=name,
        result=slope.probe,
        panel=slope.parametrization,
        kind="slope",
        what=what,
        expect="keeps",
        expected=slope.slope,
        margin=settings.slope_margin,
        reason=f"{slope.probe} did not measure it",
    )
    if not rows:
        yield test
    for row in rows:
        measured = test._replace(
            what=f"{what}, block {row.block}" if row.block else what,
            estimate=row.slope,
            low=row.low,
            high=row.high,
            octaves=math.log2(row.highest / row.lowest),
        )
        says = judge("keeps", row.low - slope.slope, row.high - slope.slope, settings.slope_margin)
        if row.points < row.models:
            reason = f"{row.models - row.points} of {row.models} models have no value that is positive and finite"
            yield measured._replace(reason=reason)
        else:
            yield _with_verdict(measured, says, measured.octaves >= settings.refuting_octaves)


def _with_verdict(test: Test, says: Verdict, large: bool, what: str = "interval") -> Test:
    """Returns the test with its verdict; a refutation is inconclusive if the sweep is too small for one."""
    if says == "not replicated" and not large:
        scale = f"{test.octaves:.1f} octaves" + (f" and {test.tokens:,} tokens a cell" if test.tokens else "")
        reason = f"the {what} speaks against the claim, but {scale} are too small a sweep to refute it"
        return test._replace(reason=reason)
    if math.isnan(test.low):
        return test._replace(reason="there is no interval: the points are too few, or all equal")
    reason = "the interval neither meets the criterion nor rules it out" if says == "inconclusive" else ""
    return test._replace(verdict=says, reason=reason)


def without_controls(tests: Sequence[Test]) -> list[Test]:
    """Returns the tests that determine a claim's verdict."""
    return [test for test in tests if test.kind != "control"]


def verdict_of(tests: Sequence[Test]) -> Verdict:
    """Returns a claim's verdict from those of its tests."""
    verdicts = {test.verdict for test in without_controls(tests)}
    if "not replicated" in verdicts:
        return "not replicated"
    return "replicated" if verdicts == {"replicated"} else "inconclusive"
