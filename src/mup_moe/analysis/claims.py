"""The paper's claims, judged by the criteria that the config fixes: claims.csv, .md, .html, and all tests.

A test is a number with its interval and an expectation; `judge` compares them. A claim is
replicated if all its tests are, not replicated if one is not, and otherwise inconclusive.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mup_moe.analysis.markup import html_page
from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.optima import Row, read_rows
from mup_moe.analysis.request import parse_json
from mup_moe.analysis.runs import read_table
from mup_moe.analysis.slopes import Slope, read_slopes
from mup_moe.config.settings import ClaimSettings, ClaimsSettings, DriftTest, SlopeTest
from mup_moe.files import UserError, write_csv, write_text

Expectation = Literal["keeps", "moves", "falls"]
Verdict = Literal["replicated", "not replicated", "inconclusive"]
MINUS = "\N{MINUS SIGN}"


def judge(expect: Expectation, low: float, high: float, margin: float) -> Verdict:
    """What an interval says of an expectation, whatever the scale; inconclusive without an interval.

    keeps: within +-margin; refuted where the two do not meet. moves, falls: 0 is excluded (falls:
    from below) and the interval reaches beyond the margin; refuted within it (falls: or above 0).
    """
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    within = -margin <= low and high <= margin
    if expect == "keeps":
        apart = low > margin or high < -margin
        return "replicated" if within else "not replicated" if apart else "inconclusive"
    moved = high < 0 or (expect == "moves" and low > 0)
    if moved and not within:
        return "replicated"
    return "not replicated" if within or (expect == "falls" and low > 0) else "inconclusive"


class Test(NamedTuple):
    """One test of a claim.

    estimate, low, high: a drift in octaves of learning rate per octave of the axis, or a slope.
    expected: what is subtracted before the comparison with the margin. octaves: of the axis; tokens:
    of a cell, 0 for a slope. says: the interval's verdict; verdict: that of the test, for which
    the sweep must be large enough to refute.
    """

    claim: str
    result: str
    what: str
    expect: str
    expected: float
    margin: float
    estimate: float
    low: float
    high: float
    octaves: float
    tokens: int
    says: Verdict
    verdict: Verdict


@dataclass(frozen=True)
class Evidence:
    """What tests are read from: figure -> its optima and the most tokens of a cell; probe -> slopes."""

    optima: Mapping[str, Sequence[Row]]
    tokens: Mapping[str, int]
    slopes: Mapping[str, Sequence[Slope]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `claims`."""
    parser.add_argument("--claims", required=True, help="JSON object: the `claims` of the config")
    parser.add_argument("--confidence", type=float, required=True, help="that of the intervals")
    parser.add_argument("--results", type=Path, required=True, help="folder of FIGURE/optima.csv and PROBE.csv")
    parser.add_argument("--preset", default="default", help="the name of what ran")
    parser.add_argument("--out", type=Path, required=True, help="path of the tables, but for .csv, .md and .html")
    parser.add_argument("--tests", type=Path, required=True, help="the CSV of all tests to write")


def run(arguments: argparse.Namespace) -> None:
    """Writes the claims. Raises UserError for results that are missing or damaged."""
    settings = parse_claims(parse_json(arguments.claims, "--claims"))
    evidence = read_evidence(settings, arguments.results)
    tests = {name: list(tests_of(name, claim, settings, evidence)) for name, claim in settings.table.items()}
    report = markdown(settings, tests, arguments.preset, arguments.confidence)
    write_csv(arguments.tests, Test._fields, ([_plain(x) for x in test] for found in tests.values() for test in found))
    rows = [claim_row(name, claim, tests[name], settings) for name, claim in settings.table.items()]
    write_csv(Path(f"{arguments.out}.csv"), list(rows[0]) if rows else ["claim"], (list(row.values()) for row in rows))
    write_text(Path(f"{arguments.out}.md"), report)
    write_text(Path(f"{arguments.out}.html"), html_page("What replicates", report))


def parse_claims(document: Mapping[str, Any]) -> ClaimsSettings:
    """Reads `dataclasses.asdict(ClaimsSettings)`. Raises UserError for anything else."""
    try:
        table = {
            name: ClaimSettings(
                says=claim["says"],
                drifts=tuple(DriftTest(**drift) for drift in claim["drifts"]),
                slopes=tuple(SlopeTest(**slope) for slope in claim["slopes"]),
            )
            for name, claim in document["table"].items()
        }
        return ClaimsSettings(**{**document, "table": table})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--claims is not the config's `claims` ({error!r}): pass what the workflow passes") from None


def read_evidence(settings: ClaimsSettings, results: Path) -> Evidence:
    """Reads what the tests of all claims rest on. Raises UserError."""
    claims = settings.table.values()
    figures = dict.fromkeys(drift.figure for claim in claims for drift in claim.drifts)
    probes = dict.fromkeys(slope.probe for claim in claims for slope in claim.slopes)
    return Evidence(
        optima={name: read_rows(results / name / "optima.csv") for name in figures},
        tokens={name: int(read_table(results / name / "runs.csv", ("tokens",))["tokens"].max()) for name in figures},
        slopes={name: read_slopes(results / f"{name}.csv") for name in probes},
    )


def tests_of(name: str, claim: ClaimSettings, settings: ClaimsSettings, evidence: Evidence) -> Iterator[Test]:
    """Every test of a claim; a slope is tested in each block. Raises UserError where it was not measured."""
    for drift in claim.drifts:
        rows = [row for row in evidence.optima[drift.figure] if str(row.panel) == drift.panel]
        if not rows:
            raise UserError(f"results/{drift.figure}/optima.csv lacks panel {drift.panel}, which claim {name} needs")
        last = rows[-1]
        says = judge(drift.expect, last.drift_low, last.drift_high, settings.drift_margin)
        octaves = math.log2(max(row.value for row in rows) / min(row.value for row in rows))
        tokens = evidence.tokens[drift.figure]
        large = tokens >= settings.refuting_tokens and octaves >= settings.refuting_octaves
        yield Test(
            claim=name,
            result=drift.figure,
            what=f"drift over {last.axis}, {_title(drift.panel)}",
            expect=drift.expect,
            expected=0.0,
            margin=settings.drift_margin,
            estimate=last.drift,
            low=last.drift_low,
            high=last.drift_high,
            octaves=octaves,
            tokens=tokens,
            says=says,
            verdict=says if says != "not replicated" or large else "inconclusive",
        )
    for slope in claim.slopes:
        key = (slope.parametrization, slope.quantity, slope.step)
        found = [s for s in evidence.slopes[slope.probe] if (s.parametrization, s.quantity, s.step) == key]
        if not found:
            raise UserError(f"results/{slope.probe}.csv lacks {' '.join(map(str, key))}, which claim {name} needs")
        for row in found:
            margin = settings.slope_margin
            says = judge("keeps", row.low - slope.slope, row.high - slope.slope, margin)
            octaves = math.log2(row.highest_width / row.lowest_width)
            wide = octaves >= settings.refuting_octaves
            block = f", block {row.block}" if row.block else ""
            yield Test(
                claim=name,
                result=slope.probe,
                what=f"slope of {slope.quantity} after step {slope.step}, {_title(slope.parametrization)}{block}",
                expect="keeps",
                expected=slope.slope,
                margin=margin,
                estimate=row.slope,
                low=row.low,
                high=row.high,
                octaves=octaves,
                tokens=0,
                says=says,
                verdict=says if says != "not replicated" or wide else "inconclusive",
            )


def verdict_of(tests: Sequence[Test]) -> Verdict:
    """A claim's verdict from those of its tests."""
    verdicts = {test.verdict for test in tests}
    if "not replicated" in verdicts:
        return "not replicated"
    return "replicated" if verdicts == {"replicated"} else "inconclusive"


def claim_row(name: str, claim: ClaimSettings, tests: Sequence[Test], settings: ClaimsSettings) -> dict[str, str]:
    """A row of claims.csv. Estimates and intervals are those of the tests, in their order, with ";" between."""
    verdict = verdict_of(tests)
    return {
        "claim": name,
        "says": claim.says,
        "criterion": "; ".join(dict.fromkeys(criterion(test) for test in tests)),
        "estimate": "; ".join(_number(test.estimate) for test in tests),
        "interval": "; ".join(_interval(test) for test in tests),
        "verdict": verdict,
        "rests_on": "; ".join(dict.fromkeys(test.result for test in tests)),
        "decided_by": settings.decided_by if verdict == "inconclusive" else "",
    }


def criterion(test: Test) -> str:
    """What would replicate a test, in words."""
    bounds = f"within {_number(test.expected - test.margin)} to {_number(test.expected + test.margin)}"
    match test.expect:
        case "keeps":
            return f"interval {bounds}"
        case "falls":
            return f"interval below 0 and not {bounds}"
        case _:
            return f"interval without 0 and not {bounds}"


def markdown(settings: ClaimsSettings, tests: Mapping[str, Sequence[Test]], preset: str, confidence: float) -> str:
    """The replication report of all claims."""
    counts = [verdict_of(found) for found in tests.values()]
    lines = [
        "# What replicates",
        "",
        f"Of {len(counts)} claims, {counts.count('replicated')} replicate, "
        f"{counts.count('not replicated')} do not, and {counts.count('inconclusive')} are inconclusive "
        f"in the sweep `{preset}`.",
        "",
        "| claim | verdict | estimate [interval] | rests on |",
        "|---|---|---|---|",
    ]
    for name, claim in settings.table.items():
        estimates = "<br>".join(f"{_number(test.estimate)} {_interval(test)}" for test in tests[name])
        rests = ", ".join(dict.fromkeys(test.result for test in tests[name]))
        lines.append(f"| **{name}** {_symbols(claim.says)} | **{verdict_of(tests[name])}** | {estimates} | {rests} |")
    lines += [
        "",
        "## How a verdict comes about",
        "",
        f"The criteria stood in the config before the runs. An interval is Student's at {confidence:.0%}, of the "
        "regression through all seeds' optima (a drift: octaves of the best learning rate per octave of the axis) or "
        "through all models' values (a slope: log2 of the quantity on log2 of the width).",
        "",
        f"- *keeps*: the interval lies within the margin, ±{settings.drift_margin:g} for a drift and "
        f"±{settings.slope_margin:g} around the predicted slope; refuted where interval and margin do not meet.",
        "- *falls*, *moves*: the interval excludes 0 (from below, from either side) and is not within the margin; "
        "refuted where it is, or lies above 0 where it should fall.",
        f"- Only a sweep of at least {settings.refuting_tokens:,} tokens a cell (drifts) over at least "
        f"{settings.refuting_octaves:g} octaves of the axis can refute; a smaller one that speaks against a claim is "
        "inconclusive.",
        "- A claim is replicated if all its tests are, and not replicated if one is not.",
        "",
        "## Claim by claim",
    ]
    for name, claim in settings.table.items():
        lines += ["", f"### {name}: {verdict_of(tests[name])}", "", _symbols(claim.says), ""]
        lines += [
            "| result | test | criterion | estimate | interval | verdict |",
            "|---|---|---|---|---|---|",
            *(
                f"| {t.result} | {t.what} {t.expect if t.tokens else ''} | {criterion(t)} | {_number(t.estimate)} "
                f"| {_interval(t)} | {t.verdict} |"
                for t in tests[name]
            ),
        ]
        undecided = [test for test in tests[name] if test.verdict == "inconclusive"]
        lines += ["", *(f"- {_why(test)}" for test in undecided)] if undecided else []
        if undecided:
            lines += ["", f"What would decide it: {settings.decided_by}."]
    return "\n".join(lines) + "\n"


def _why(test: Test) -> str:
    """Why a test is inconclusive, in a sentence."""
    where = f"{test.result}, {test.what}"
    if math.isnan(test.low):
        return f"{where}: there are too few optima for an interval."
    if test.says == "not replicated":
        scale = f"{test.octaves:.1f} octaves" + (f" and {test.tokens:,} tokens a cell" if test.tokens else "")
        return f"{where}: the interval speaks against the claim, but {scale} are too small a sweep to refute it."
    return f"{where}: the interval neither meets the criterion nor rules it out."


def _title(panel: str) -> str:
    return parametrization_title(panel)


def _symbols(text: str) -> str:
    return text.replace("muP", "\N{GREEK SMALL LETTER MU}P")


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}".replace("-", MINUS).replace("+0.00", "0.00")


def _interval(test: Test) -> str:
    return "[none]" if math.isnan(test.low) else f"[{_number(test.low)}, {_number(test.high)}]"


def _plain(value: Any) -> Any:
    return "" if isinstance(value, float) and np.isnan(value) else value
