"""Writes the verdicts on the paper's claims: claims.csv, .md and .html, and all tests as CSV and page."""

import argparse
import math
from collections.abc import Mapping, Sequence

from mup_moe.analysis.markup import markdown_table, markdown_text
from mup_moe.analysis.names import estimated
from mup_moe.analysis.pages import write_page, write_rows_page
from mup_moe.analysis.verdict import CANNOT_TELL, Test, all_tests, verdict_of, without_controls
from mup_moe.config.settings import ClaimSettings, ClaimsSettings
from mup_moe.files import write_csv
from mup_moe.options import read_sweep

# What the verdict of a test says of a control, which should fail the test.
FATES = {"replicated": "passes", "not replicated": "fails", "inconclusive": "undecided"}


def run(arguments: argparse.Namespace) -> None:
    """Writes the claims. Raises UserError for results that are missing or damaged."""
    sweep = read_sweep(arguments)
    settings, results = sweep.config.claims, sweep.results
    tests = all_tests(sweep.config, results)
    report = markdown(settings, tests, sweep.layers, sweep.config.analysis.confidence)
    all_of_them = [test for found in tests.values() for test in found]
    write_csv(results / "claims/tests.csv", Test._fields, all_of_them)
    write_rows_page(results / "claims/tests.html", Test._fields, all_of_them)
    rows = [claim_row(name, claim, tests[name]) for name, claim in settings.table.items()]
    write_csv(results / "claims.csv", list(rows[0]) if rows else ["claim"], (list(row.values()) for row in rows))
    write_page(results / "claims", report)


def claim_row(name: str, claim: ClaimSettings, tests: Sequence[Test]) -> dict[str, str]:
    """Returns a row of claims.csv. Estimates and intervals are those of the tests, in order, separated by ";"."""
    verdict, controls = verdict_of(tests), [test for test in tests if test.kind == "control"]
    own = without_controls(tests)
    return {
        "claim": name,
        "says": claim.says,
        "criterion": "; ".join(dict.fromkeys(criterion(test) for test in own)),
        "estimate": "; ".join(estimated(test.estimate) for test in own),
        "interval": "; ".join(_interval(test) for test in own),
        "controls": "; ".join(f"{test.panel} {FATES[test.verdict]}" for test in controls),
        "verdict": verdict,
        "rests_on": "; ".join(_results(tests)),
        "decided_by": _decided_by(claim, tests) if verdict == "inconclusive" else "",
    }


def criterion(test: Test) -> str:
    """Describes the criterion for a test to replicate."""
    bounds = f"within {estimated(test.expected - test.margin)} to {estimated(test.expected + test.margin)}"
    excess = "" if math.isnan(test.excess_margin) else f", excess at most {test.excess_margin:g} nats"
    return {
        "keeps": f"interval {bounds}{excess}",
        "drifts": f"interval {bounds}",
        "falls": f"interval below 0 and not {bounds}",
        "moves": f"interval without 0 and not {bounds}",
    }[test.expect]


def markdown(settings: ClaimsSettings, tests: Mapping[str, Sequence[Test]], sweep: str, confidence: float) -> str:
    """Returns the replication report of all claims. sweep: the layers of its config."""
    counts = [verdict_of(found) for found in tests.values()]
    lines = [
        "# What replicates",
        "",
        f"Of {len(counts)} claims, {counts.count('replicated')} replicate, "
        f"{counts.count('not replicated')} do not, and {counts.count('inconclusive')} are inconclusive "
        f"in the sweep of this config: **{_text(sweep)}**.",
        "",
    ]
    overview = []
    for name, claim in settings.table.items():
        own = without_controls(tests[name])
        estimates = "<br>".join(f"{estimated(test.estimate)} {_interval(test)}" for test in own)
        estimates = estimates.replace(" ", "\N{NO-BREAK SPACE}")
        rests = _text(", ".join(_results(tests[name])))
        verdict = verdict_of(tests[name])
        blind = verdict == "inconclusive" and any(test.reason.startswith(CANNOT_TELL) for test in own)
        shown = f"**{verdict}**{f': {CANNOT_TELL}' if blind else ''}"
        row = [f"**{_text(name)}** {_text(claim.says)}", shown, estimates, rests]
        overview.append(row)
    lines += [
        markdown_table(("claim", "verdict", "estimate [interval]", "rests on"), overview),
        "## How a verdict is reached",
        "",
        f"The criteria are in the section `claims` of the config. An interval is Student's at {confidence:.0%}, for "
        "the regression through all seeds' optima (a drift: octaves of the best learning rate per octave of the axis) "
        "or through all models' values (a slope: log2 of the quantity on log2 of the axis). Where the interval of the "
        "regression through the means over seeds is wider, it is used instead.",
        "",
        f"- *keeps*: the interval is within the margin, ±{settings.drift_margin:g} for a drift and "
        f"±{settings.slope_margin:g} around the predicted slope. If interval and margin do not overlap, the test is "
        "refuted.",
        "- A panel that *keeps* its best learning rate must also have an excess of at most "
        f"{settings.excess_margin:g} nats. The excess is the loss at the far end of the axis with the base's best "
        "learning rate, over the lowest loss that any row of the figure or of its controls has there.",
        "- Such a test counts only if its controls fail it. Controls are rows that are wrong in what the claim is "
        "about; a control's excess is over the loss of the rule that it varies. If a control passes, the sweep cannot "
        "tell, and the test is inconclusive.",
        "- *drifts*: the interval is within the margin around the predicted drift. If the two do not overlap, the test "
        "is refuted.",
        "- *falls*, *moves*: the interval excludes 0 (*falls*: it is below 0; *moves*: on either side) and is not "
        "within the margin. If it is within the margin, or if it is above 0 for *falls*, the test is refuted.",
        f"- A drift can refute a claim only in a sweep with at least {settings.refuting_tokens:,} tokens per cell, and "
        f"drifts and slopes only over at least {settings.refuting_octaves:g} octaves of the axis. Evidence against a "
        "claim from a smaller sweep is inconclusive.",
        "- A drift that seems small, or that is predicted, is inconclusive if an optimum is at the end of the grid. "
        "Any drift is inconclusive if cells of its panel are missing.",
        "- A claim is replicated if all its tests are replicated, and not replicated if any test is refuted.",
        "",
        "## Claim by claim",
    ]
    for name, claim in settings.table.items():
        lines += ["", f"### {_text(name)}: {verdict_of(tests[name])}", "", _text(claim.says), ""]
        rows = (
            [
                *(_text(test.result), _text(_tested(test)), criterion(test) if test.kind != "control" else "the same"),
                *(estimated(test.estimate), _interval(test), _excess(test)),
                FATES[test.verdict] if test.kind == "control" else test.verdict,
            ]
            for test in tests[name]
        )
        headings = ("result", "test", "criterion", "estimate", "interval", "excess", "verdict")
        lines.append(markdown_table(headings, rows).rstrip())
        undecided = [t for t in without_controls(tests[name]) if t.verdict == "inconclusive"]
        if undecided:
            lines += ["", *(f"- {_text(f'{t.result}, {t.what}: {t.reason}.')}" for t in undecided), ""]
            lines.append(f"What would decide it: {_text(_decided_by(claim, tests[name]))}.")
    return "\n".join(lines) + "\n"


def _tested(test: Test) -> str:
    drift = f"{test.what} {test.expect}" + (f" by {estimated(test.expected)}" if test.expect == "drifts" else "")
    return {"control": f"control: {test.what}", "drift": drift, "slope": test.what}[test.kind]


def _excess(test: Test) -> str:
    if math.isnan(test.excess):
        return "--"
    bound = "\N{GREATER-THAN OR EQUAL TO}\N{NO-BREAK SPACE}" if math.isinf(test.excess_high) else ""
    return f"{bound}{test.excess:.3f}"


def _results(tests: Sequence[Test]) -> list[str]:
    """Lists the results that the tests rest on, each once, with the number of its missing cells."""
    missing = {(test.result, test.what): test.missing for test in tests}  # a panel counts once
    names = dict.fromkeys(test.result for test in tests)
    counts = {name: sum(count for (result, _), count in missing.items() if result == name) for name in names}
    return [f"{name} ({count} missing cells)" if count else name for name, count in counts.items()]


def _decided_by(claim: ClaimSettings, tests: Sequence[Test]) -> str:
    """Says what would decide the claim: the missing cells if there are any, otherwise what the config says."""
    return "the missing cells, trained like the rest" if any(test.missing for test in tests) else claim.decided_by


def _text(text: str) -> str:
    return markdown_text(text.replace("muP", "\N{GREEK SMALL LETTER MU}P"))


def _interval(test: Test) -> str:
    return "[none]" if math.isnan(test.low) else f"[{estimated(test.low)}, {estimated(test.high)}]"
