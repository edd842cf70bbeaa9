"""The rule for verdicts, and every recorded verdict derived again from the recorded runs."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from scipy.interpolate import PchipInterpolator

from conftest import CONFIG, ROOT, read_config, run_step
from mup_moe.analysis import verdict as verdicts
from mup_moe.analysis.claims import markdown
from mup_moe.analysis.names import MINUS
from mup_moe.analysis.pages import table_page
from mup_moe.analysis.runs import read_rows
from mup_moe.analysis.slopes import Slope, read_values, slopes
from mup_moe.analysis.verdict import judge
from mup_moe.config.cell import Cell
from mup_moe.config.document import read_document
from mup_moe.config.like import overlay
from mup_moe.config.load import validate
from mup_moe.config.settings import ClaimSettings, Config, DriftTest, FigureSettings
from mup_moe.figures.style import FAINT
from mup_moe.figures.verdicts import ClaimTest, draw_rows
from mup_moe.files import write_csv

numbers = st.floats(-3, 3)
margins = st.floats(0.01, 1)
RECORDED = sorted(path.parent for path in ROOT.glob("results/recorded/*/claims.csv"))


@given(numbers, numbers, margins)
def test_an_interval_cannot_both_keep_and_move(one, other, margin):
    low, high = sorted((one, other))
    kept, moved, fell = (judge(expect, low, high, margin) for expect in ("keeps", "moves", "falls"))
    assert not (kept == "replicated" and moved == "replicated")
    assert (kept == "replicated") == (moved == "not replicated")
    if fell == "replicated":
        assert moved == "replicated"
        assert high < 0
    if kept == "not replicated":
        assert moved == "replicated"


@given(numbers, numbers, margins)
def test_falling_is_the_mirror_of_rising(one, other, margin):
    low, high = sorted((one, other))
    for expect in ("keeps", "moves"):
        assert judge(expect, low, high, margin) == judge(expect, -high, -low, margin)


@pytest.mark.parametrize(
    ("expect", "low", "high", "verdict"),
    [
        ("keeps", -0.2, 0.1, "replicated"),
        ("keeps", -0.4, 0.1, "inconclusive"),
        ("keeps", -0.9, -0.4, "not replicated"),
        ("falls", -0.9, -0.1, "replicated"),
        ("falls", -0.2, -0.1, "not replicated"),
        ("falls", -0.9, 0.1, "inconclusive"),
        ("falls", 0.4, 0.9, "not replicated"),
        ("moves", 0.4, 0.9, "replicated"),
        ("moves", -0.1, 0.9, "inconclusive"),
        ("moves", math.nan, math.nan, "inconclusive"),
    ],
)
def test_verdicts_of_plain_cases(expect, low, high, verdict):
    assert judge(expect, low, high, 0.3) == verdict


class Shown(HTMLParser):
    """Collects what a page shows: cells, third-level headings and paragraphs, row by row; and its tags."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.tags, self.text = [], set(), ""
        self.feed(page.partition("</style>")[2])

    def handle_starttag(self, tag, _):
        self.tags.add(tag)
        if tag in ("tr", "h3", "p"):
            self.rows.append([])
        if tag in ("td", "th", "h3", "p"):
            self.text = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th", "h3", "p"):
            self.rows[-1].append(self.text)

    def handle_data(self, data):
        self.text += data


NBSP = "\N{NO-BREAK SPACE}"
# Any text that config.yaml can hold, but more often one with a meaning in Markdown or HTML.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
PIECES = [*"ab1 \n|*_`<>[]()#&;~$\\-+=.:!\"'{}", "\n\n", "<b>", "&lt;", "---", "1. "]
texts |= st.lists(st.sampled_from(PIECES)).map("".join)
TAGS = ["html", "head", "h1", "h2", "h3", "p", "ul", "li", "em", "strong", "code", "br"]
TAGS += ["table", "thead", "tbody", "tr", "th", "td"]


@given(st.dictionaries(texts.filter(str.strip), st.tuples(texts, texts), max_size=3), texts, texts)
@example({"a|b": ("It.\n", "- more")}, "", "")
@example({"C1": ("1. *a*\n\n| <b> \\|", "`more`")}, "a_b_", "a`b")
def test_a_page_shows_names_and_texts_as_they_are(table, what, preset):
    claims = {
        name: ClaimSettings(says=says, decided_by=more, drifts=(DriftTest(figure="f", panel="p", expect="keeps"),))
        for name, (says, more) in table.items()
    }
    numbers = {"expected": 0, "margin": 1, "estimate": 0, "low": -1, "high": 2, "octaves": 3}
    test = verdicts.Test("", what, "", "slope", what, "keeps", reason=what, **numbers)
    report = markdown(replace(CONFIG.claims, table=claims), {name: [test] for name in claims}, preset, 0.9)
    shown = Shown(table_page("t", report))
    plain = lambda text: " ".join(text.replace("muP", "μP").split())  # noqa: E731
    estimate = ["0.00", f"[{MINUS}1.00, +2.00]"]
    of_test = [plain(what), plain(what), f"interval within {MINUS}1.00 to +1.00", *estimate, "--", "inconclusive"]
    expected = []
    for name, (says, _) in table.items():
        rests_on = [NBSP.join(estimate).replace(" ", NBSP), plain(what)]
        expected.append([f"{plain(name)} {plain(says)}".rstrip(), "inconclusive", *rests_on])
    expected.append([shown.rows[2 + len(table)][0]])  # how a verdict is reached
    for name, (says, more) in table.items():
        expected += [[f"{plain(name)}: inconclusive"], *([[plain(says)]] if plain(says) else [])]
        expected += [["result", "test", "criterion", "estimate", "interval", "excess", "verdict"], of_test]
        expected.append([f"What would decide it: {plain(more)}."])
    assert [[cell.strip() for cell in row] for row in shown.rows[2:]] == expected
    assert not shown.tags.difference(TAGS)


# ---------------------------------------------------------------- the command


# A wrong rule: its best learning rate falls, whatever the others do, so that the sweep can tell it from a right one.
CONTROL = "mup-without-experts"


def config_of(widths: tuple[int, ...]) -> Config:
    """Returns the default config, which may lack cells, with other widths in figure 1 if any are given."""
    config = read_config(ROOT / "config.yaml")
    figure = config.figures["figure1"]
    rules = (*figure.axes.parametrization, CONTROL)
    figure = replace(figure, axes=replace(figure.axes, parametrization=rules))
    if widths:
        figure = replace(figure, axes=replace(figure.axes, width=widths))
    analysis = replace(config.analysis, foreign_cells="leave_out")
    return replace(config, figures=config.figures | {"figure1": figure}, analysis=analysis)


def write_results(
    folder: Path,
    drift: float,
    noise: float,
    tokens: int,
    widths: tuple[int, ...] = (),
    vertex: float = -4.5,
    left_out: Callable[[Cell], bool] = lambda _: False,
) -> None:
    """Writes a figure with an optimum that drifts, by the real optima command."""
    config = config_of(widths)
    figure = config.figures["figure1"]
    generator = np.random.default_rng(0)
    rows = []
    shift = {(c.parametrization, c.width): generator.normal(0, noise) for c in figure.cells()}
    for cell in figure.cells():
        own = -1.0 if cell.parametrization == CONTROL else drift
        best = vertex + own * math.log2(cell.width / 32) + shift[cell.parametrization, cell.width]
        loss = 3 + 0.1 * (math.log2(cell.learning_rate) - best) ** 2
        if not left_out(cell):
            rows.append([cell.id, "finished", loss, loss, tokens])
    write_csv(folder / "figure1/runs.csv", ["cell", "status", "train_loss", "valid_loss", "tokens"], rows)
    assert run_step("optima", "figure1", config=config, results=folder) == 0


def deciding(claim: dict[str, Any], config: Config = CONFIG) -> Config:
    """Returns a config with only this claim."""
    document = asdict(config) | {"claims": asdict(CONFIG.claims) | {"table": {"C9": claim}}}
    return validate(json.loads(json.dumps(document)))


def judge_figure(folder: Path, expect: str, panel: str = "mup", widths: tuple[int, ...] = ()) -> pd.Series:
    drift: dict[str, Any] = {"figure": "figure1", "panel": panel, "expect": expect}
    if expect == "keeps":
        drift["controls"] = {"figure": "figure1", "panels": [CONTROL]}
    claim = {"says": "It.", "decided_by": "more", "drifts": [drift], "slopes": []}
    assert run_step("claims", config=deciding(claim, config_of(widths)), results=folder) == 0
    return pd.read_csv(folder / "claims.csv", keep_default_na=False).iloc[0]


LARGE = CONFIG.claims.refuting_tokens


@pytest.mark.parametrize(
    ("drift", "expect", "verdict"),
    [
        (-0.8, "falls", "replicated"),
        (0.0, "keeps", "replicated"),
        (0.5, "moves", "replicated"),
        # Five widths over two octaves cannot refute.
        (-0.8, "keeps", "inconclusive"),
        (0.0, "falls", "inconclusive"),
    ],
)
def test_a_drift_is_judged_by_the_criterion(tmp_path, drift, expect, verdict):
    write_results(tmp_path, drift, 0.01, LARGE)
    row = judge_figure(tmp_path, expect)
    assert row["verdict"] == verdict
    assert (row["decided_by"] != "") == (verdict == "inconclusive")
    report = (tmp_path / "claims.md").read_text()
    assert f"### C9: {verdict}" in report
    assert ("too small a sweep" in report) == (verdict == "inconclusive")
    assert "<table>" in (tmp_path / "claims.html").read_text()


def test_a_large_sweep_refutes(tmp_path):
    widths = (32, 64, 128, 256)
    write_results(tmp_path, 0.0, 0.01, LARGE, widths)
    assert judge_figure(tmp_path, "falls", widths=widths)["verdict"] == "not replicated"
    write_results(tmp_path, -0.6, 0.01, LARGE, widths)
    assert judge_figure(tmp_path, "keeps", widths=widths)["verdict"] == "not replicated"
    write_results(tmp_path, -0.6, 0.01, LARGE - 1, widths)
    assert judge_figure(tmp_path, "keeps", widths=widths)["verdict"] == "inconclusive"


def test_optima_at_the_end_of_the_grid_leave_a_claim_open(tmp_path):
    write_results(tmp_path, 0.0, 0.01, LARGE, vertex=-20.0)
    assert judge_figure(tmp_path, "keeps")["verdict"] == "inconclusive"
    write_results(tmp_path, 0.0, 0.01, LARGE, vertex=-2.2)
    assert judge_figure(tmp_path, "keeps")["verdict"] == "inconclusive"
    assert "end of the grid" in (tmp_path / "claims.md").read_text()


def test_a_panel_that_was_left_out_leaves_its_claim_open(tmp_path):
    write_results(tmp_path, 0.0, 0.01, LARGE)
    assert judge_figure(tmp_path, "keeps", "experts-only")["verdict"] == "inconclusive"
    assert "figure1 has no panel experts-only" in (tmp_path / "claims.md").read_text()


@pytest.mark.parametrize(
    "left_out",
    [
        lambda cell: cell.learning_rate == 2**-7 and cell.width == 96,
        lambda cell: cell.learning_rate == 2**-4,
        lambda cell: cell.width == 32,
        lambda _: True,
    ],
    ids=["one", "a rate", "a width", "all"],
)
@pytest.mark.parametrize(("drift", "expect"), [(0.0, "keeps"), (-0.8, "falls"), (0.0, "falls")])
def test_a_claim_gains_nothing_from_cells_that_are_left_out(tmp_path, left_out, drift, expect):
    widths = (32, 64, 96, 128, 256)
    write_results(tmp_path, drift, 0.01, LARGE, widths)
    assert judge_figure(tmp_path, expect, widths=widths)["verdict"] != "inconclusive"
    # Missing cells of another panel do not affect this claim.
    write_results(tmp_path, drift, 0.01, LARGE, widths, left_out=lambda c: c.parametrization == "sp" and left_out(c))
    assert judge_figure(tmp_path, expect, widths=widths)["verdict"] != "inconclusive"
    write_results(tmp_path, drift, 0.01, LARGE, widths, left_out=lambda c: c.parametrization == "mup" and left_out(c))
    row = judge_figure(tmp_path, expect, widths=widths)
    cells = config_of(widths).figures["figure1"].cells()
    missing = sum(left_out(cell) for cell in cells if cell.parametrization == "mup")
    assert row["verdict"] == "inconclusive"
    assert row["rests_on"] == f"figure1 ({missing} missing cells)"
    assert row["decided_by"] == "the missing cells, trained like the rest"
    assert f"{missing} of the panel's cells are missing" in (tmp_path / "claims.md").read_text()
    assert pd.read_csv(tmp_path / "claims/tests.csv")["missing"].tolist()[0] == missing


def judge_slope(folder: Path, slope: float, values: list[float], predicted: float) -> str:
    widths = [64, 128, 256, 512, 1024]
    rows = [
        ["mup", width, seed, 2, "inner product", "0", value * (width / 64) ** slope * (1 + 0.01 * seed)]
        for width, value in zip(widths, values, strict=True)
        for seed in (0, 1)
    ]
    columns = ["parametrization", "width", "seed", "step", "quantity", "block", "value"]
    write_csv(folder / "p/values.csv", columns, rows)
    write_csv(folder / "p.csv", Slope._fields, slopes(read_values(folder / "p/values.csv"), 0.95))
    test = {"probe": "p", "parametrization": "mup", "quantity": "inner product", "step": 2, "slope": predicted}
    claim = {"says": "It.", "decided_by": "more", "drifts": [], "slopes": [test]}
    probes = CONFIG.probes | {"p": CONFIG.probes["lemma_b1"]}
    assert run_step("claims", config=deciding(claim, replace(CONFIG, probes=probes)), results=folder) == 0
    return str(pd.read_csv(folder / "claims.csv").loc[0, "verdict"])


def test_a_slope_is_judged_around_its_prediction(tmp_path):
    steady, shaken = [1.0, 1.01, 0.99, 1.0, 1.01], [1.0, 2.0, 0.3, 3.0, 1.0]
    assert judge_slope(tmp_path, -0.5, steady, -0.5) == "replicated"
    assert judge_slope(tmp_path, -0.5, steady, 0.0) == "not replicated"
    assert judge_slope(tmp_path, 0.0, shaken, 0.0) == "inconclusive"
    # A model without a value leaves its width out of the slope.
    assert judge_slope(tmp_path, 0.0, [1.0, 1.01, 0.99, 1.0, 0.0], 0.0) == "inconclusive"
    assert "2 of 10 models" in (tmp_path / "claims.md").read_text()


def test_noise_makes_a_verdict_inconclusive(tmp_path):
    write_results(tmp_path, 0.0, 0.8, LARGE)
    assert judge_figure(tmp_path, "keeps")["verdict"] == "inconclusive"


def test_a_missing_result_is_named(tmp_path, capsys):
    with pytest.raises(AssertionError):
        judge_figure(tmp_path, "keeps")
    assert "figure1/optima.csv does not exist" in capsys.readouterr().err


# ---------------------------------------------------------------- what is recorded


def fit(log2_lr: np.ndarray, loss: np.ndarray, fit_points: int) -> tuple[float, float, Callable[[float], float]]:
    """The documented estimator (analysis/curve.py), reimplemented: vertex, its loss, and the loss at any rate."""
    lowest = int(np.nanargmin(loss))

    def reach(direction: int) -> int:
        for step in range(1, fit_points // 2 + 1):
            at = lowest + direction * step
            if not 0 <= at < len(loss) or np.isnan(loss[at]) or (step > 1 and loss[at] > loss[lowest] + 0.5):
                return step - 1
        return fit_points // 2

    def between(rate: float) -> float:
        """Interpolates the converged losses around the lowest one; beyond them, returns the outermost."""
        finite = np.flatnonzero(np.isfinite(loss))
        run = finite[np.cumsum(np.diff(finite, prepend=finite[0]) > 1) == 0] if finite[0] <= lowest else finite
        return float(PchipInterpolator(log2_lr[run], loss[run])(np.clip(rate, *log2_lr[run][[0, -1]])))

    def on(parabola: Callable[[float], float], low: float, high: float, rate: float) -> float:
        return parabola(rate) if low <= rate <= high else between(rate)

    left, right = reach(-1), reach(1)
    windows = ((left, right), (1, 1)) if left and right else ()
    for before, after in windows:
        window = slice(lowest - before, lowest + after + 1)
        parabola = np.polynomial.Polynomial.fit(log2_lr[window], loss[window], 2)
        curvature, slope = parabola.convert().coef[:0:-1]
        low, high = log2_lr[window][[0, -1]]
        if curvature > 1e-9 and low <= -slope / (2 * curvature) <= high:
            vertex = -slope / (2 * curvature)
            return vertex, parabola(vertex), partial(on, parabola, low, high)
    return log2_lr[lowest], loss[lowest], between


def line(points: list[tuple[int, float, float]], confidence: float) -> tuple[float, float, float]:
    """Returns the slope and Student's interval with an intercept per seed, or that of the means if it is wider."""

    def fit(points):
        seeds = sorted({seed for seed, *_ in points})
        design = np.array([[*(seed == s for s in seeds), x] for seed, x, _ in points], dtype=float)
        y = np.array([y for *_, y in points])
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        freedom = len(y) - len(seeds) - 1
        variance = ((y - design @ solution) ** 2).sum() / freedom * np.linalg.inv(design.T @ design)[-1, -1]
        return solution[-1], math.sqrt(variance) * stats.t.ppf((1 + confidence) / 2, freedom)

    means = [(0, x, np.mean([y for _, other, y in points if other == x])) for x in sorted({x for _, x, _ in points})]
    slope, margin = fit(points)
    margin = max(margin, fit(means)[1])
    return slope, slope - margin, slope + margin


def verdict(expect: str, low: float, high: float, margin: float, can_refute: bool) -> str:
    within = low >= -margin and high <= margin
    no = "not replicated" if can_refute else "inconclusive"
    if expect in ("keeps", "drifts"):
        return "replicated" if within else no if low > margin or high < -margin else "inconclusive"
    if within or (expect == "falls" and low > 0):
        return no
    return "replicated" if high < 0 or (expect == "moves" and low > 0) else "inconclusive"


Numbers = tuple[float, float, float, float]


def judged(
    test: DriftTest, figures: list[FigureSettings], config: Config, runs: pd.DataFrame, rule: DriftTest
) -> tuple[str, Numbers]:
    """Judges a drift test without its controls, or a control of `rule`; returns verdict, drift, interval and excess."""
    figure, claims, is_control = config.figures[test.figure], config.claims, test is not rule
    model = config.setups[figure.setup].model
    base = {"width": model.base_width, "experts": model.base_experts, "granularity": 1}[figure.curve]
    curves: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    of_rows = figure.panel == "parametrization"

    def row(one: DriftTest) -> str:
        # A panel that is not a row, such as an architecture, has the row of its figure.
        return one.panel if of_rows else f"{one.panel} {config.figures[one.figure].axes.parametrization[0]}"

    for cell in dict.fromkeys(cell for one in figures for cell in one.cells()):
        panel = str(getattr(cell, figure.panel))
        key = (
            panel if of_rows else f"{panel} {cell.parametrization}",
            getattr(cell, figure.curve),
            cell.seed,
        )
        of_group = re.search(r"-lr2\^(.+)$", cell.learning_rate_of)
        tuned = float(of_group[1]) if of_group else 0.0 if figure.tunes else math.log2(cell.learning_rate)
        curves.setdefault(key, []).append((tuned, runs.loc[cell.id, config.analysis.loss]))
    arrays = {key: np.array(sorted(curve)).T for key, curve in curves.items()}
    fits = {key: fit(*array, config.analysis.fit_points) for key, array in arrays.items()}
    values, seeds = getattr(figure.axes, figure.curve), figure.axes.seed
    at_edge = False
    for value in values:
        losses = np.mean([arrays[row(test), value, seed][1] for seed in seeds], axis=0)
        lowest = int(np.nanargmin(losses))
        at_edge |= bool(np.isnan([np.nan, *losses, np.nan][lowest : lowest + 3]).any())
    points = [(seed, math.log2(value), fits[row(test), value, seed][0]) for seed in seeds for value in values]
    slope, low, high = line(points, config.analysis.confidence)
    octaves = np.ptp([math.log2(value) for value in values])
    tokens = runs.loc[[c.id for c in figure.cells()], "tokens"].max()
    can_refute = is_control or (octaves >= claims.refuting_octaves and tokens >= claims.refuting_tokens)
    expected = test.drift or 0
    outcome = verdict(test.expect, low - expected, high - expected, claims.drift_margin, can_refute)
    if test.expect == "drifts":
        return "inconclusive" if at_edge else outcome, (slope, low, high, math.nan)
    if test.expect != "keeps":
        return outcome if outcome != "not replicated" or not at_edge else "inconclusive", (slope, low, high, math.nan)

    def transferred(panel: str, end: int) -> np.ndarray:
        of_base = [arrays[panel, base, seed] for seed in seeds]
        rate = fit(of_base[0][0], np.mean([losses for _, losses in of_base], axis=0), config.analysis.fit_points)[0]
        return np.array([fits[panel, end, seed][2](rate) for seed in seeds])

    def lowest_of_all(end: int) -> np.ndarray:
        rivals = [k for k in arrays if of_rows or k[0].startswith(f"{test.panel} ")]
        return np.array([min(np.nanmin(arrays[k][1]) for k in rivals if k[1:] == (end, seed)) for seed in seeds])

    found = []
    for end in {min(values), max(values)} - {base}:
        own = transferred(row(test), end)
        nats = own - transferred(row(rule), end) if is_control else np.maximum(own - lowest_of_all(end), 0)
        margin = (
            stats.sem(nats) * stats.t.ppf((1 + config.analysis.confidence) / 2, len(nats) - 1) if len(nats) > 1 else 0
        )
        found.append((nats.mean() - margin, nats.mean(), nats.mean() + margin))
    least, excess, most = max(found, key=lambda bounds: bounds[0 if is_control else 2])
    if least > claims.excess_margin:
        outcome = "not replicated" if can_refute else "inconclusive"
    elif outcome == "replicated" and (most > claims.excess_margin or at_edge):
        outcome = "inconclusive"
    return outcome, (slope, low, high, excess)


def overall(verdicts: list[str]) -> str:
    if "not replicated" in verdicts:
        return "not replicated"
    return "replicated" if set(verdicts) == {"replicated"} else "inconclusive"


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_recorded_verdicts_follow_from_recorded_runs(folder):
    # The criteria recorded with the runs, not the current ones.
    made_by = json.loads((folder / "provenance.json").read_text())
    first, *over = (read_document(folder / name) for name in made_by["config"])
    # Keys added since then: how cells are run, that none was left out, and what was compared.
    since = {name: read_document(ROOT / "config.yaml")[name] for name in ("execution", "analysis", "comparisons")}
    config = validate(overlay(since, first, *over))
    claims, confidence = config.claims, config.analysis.confidence
    tables = [folder / "runs.csv"] if (folder / "runs.csv").exists() else sorted(folder.glob("*/runs.csv"))
    runs = pd.concat(map(pd.read_csv, tables)).drop_duplicates("cell").set_index("cell")
    recorded = pd.read_csv(folder / "claims.csv", keep_default_na=False).set_index("claim")
    tests = pd.read_csv(folder / "claims/tests.csv")
    assert list(recorded.index) == list(claims.table)
    for name, claim in claims.table.items():
        own, found, estimates = [], [], []
        for test in claim.drifts:
            of_test = [test]
            if test.controls:
                of_test += [
                    DriftTest(figure=test.controls.figure, panel=p, expect="keeps") for p in test.controls.panels
                ]
            figures = [config.figures[one.figure] for one in of_test]
            judgments = [judged(one, figures, config, runs, rule=test) for one in of_test]
            outcome, *fates = [verdict for verdict, _ in judgments]
            if test.expect == "keeps" and outcome == "replicated":
                outcome = "replicated" if fates and set(fates) == {"not replicated"} else "inconclusive"
            own.append(outcome)
            found += [outcome, *fates]
            estimates += [numbers for _, numbers in judgments]
        for test in claim.slopes:
            probe = config.probes[test.probe]
            values = pd.read_csv(folder / test.probe / "values.csv.gz", dtype={"block": "str"}).fillna({"block": ""})
            chosen = values[
                (values["parametrization"] == test.parametrization)
                & (values["quantity"] == test.quantity)
                & (values["step"] == test.step)
            ]
            for _, block in chosen.groupby("block", sort=False):
                points = list(zip(block["seed"], np.log2(block[probe.over]), np.log2(block["value"]), strict=True))
                slope, low, high = line(points, confidence)
                wide = np.ptp(np.log2(probe.axes.values(probe.over))) >= claims.refuting_octaves
                found.append(verdict("keeps", low - test.slope, high - test.slope, claims.slope_margin, wide))
                own.append(found[-1])
                estimates.append((slope, low, high, math.nan))
        assert recorded.loc[name, "verdict"] == overall(own), name
        of_claim = tests[tests["claim"] == name]
        assert of_claim["verdict"].tolist() == found
        np.testing.assert_allclose(of_claim[["estimate", "low", "high", "excess"]], estimates, atol=1e-6)


def test_something_is_recorded():
    assert RECORDED
    for folder in RECORDED:
        assert json.loads((folder / "provenance.json").read_text())["machine"]
        assert yaml.safe_load((folder / "config.yaml").read_text())["claims"]


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_the_figure_of_the_claims_shows_every_test_once(folder):
    rows = read_rows(folder / "claims/tests.csv", ClaimTest)
    figure = draw_rows(rows, CONFIG.claims)
    shown = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert len(shown) == len({(row.claim, row.panel, row.what.split(", ")[0] * (row.kind == "slope")) for row in rows})
    points = [line for axes in figure.axes for line in axes.lines if line.get_marker() in ("o", ">")]
    estimates = [line.get_xdata()[0] for line in points if np.isfinite(line.get_xdata()[0])]
    excesses = [row.excess for row in rows if not math.isnan(row.excess)]
    assert len(estimates) == len(rows) + len(excesses)
    assert {round(row.estimate - row.expected, 9) for row in rows} <= {round(float(value), 9) for value in estimates}


def test_a_control_is_grey_whatever_becomes_of_it():
    row = ClaimTest("C2", "mup", "control", "drift", 0.0, 0.0, -0.1, 0.1, 0.0, 0.0, 0.0, "replicated")
    figure = draw_rows([row, row._replace(kind="drift")], CONFIG.claims)
    control, test = (line.get_color() for line in figure.axes[0].lines if line.get_marker() == "o")
    assert control == FAINT
    assert test != FAINT
