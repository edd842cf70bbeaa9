"""Rows that are wrong on purpose, learning rates of groups of roles, and what a sweep can see by them."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from conftest import CONFIG, TABLE, VOCABULARY, make_request, run_step
from mup_moe.__main__ import main
from mup_moe.analysis.attribution import AttributionRow
from mup_moe.analysis.curve import Curve
from mup_moe.analysis.excess import excess, largest_excess
from mup_moe.analysis.power import seeds_needed
from mup_moe.analysis.runs import read_rows
from mup_moe.analysis.sensitivity import SensitivityRow, lost_at, seen
from mup_moe.analysis.transfer import regress
from mup_moe.config.cell import Cell, GroupRate, LearningRate
from mup_moe.config.document import ConfigError
from mup_moe.config.load import validate
from mup_moe.config.settings import Config, FigureSettings
from mup_moe.figures import attribution, sensitivity, trend
from mup_moe.figures.style import drawing_style, save
from mup_moe.files import write_csv
from mup_moe.model.inventory import ModelShape, tensors_of
from mup_moe.model.scaling import factors
from mup_moe.parametrization import ATTENTION_LOGITS, GROUPS, ROLES, control
from mup_moe.training.trainer import Trainer
from test_parametrization import CPU

RULES = sorted(TABLE)
groups = st.sampled_from(sorted(GROUPS))
octaves = st.integers(-16, 16).map(lambda quarters: quarters / 4)

# ---------------------------------------------------------------- rows made from the table


def part(row, role):
    return row.attention_logits if role == ATTENTION_LOGITS else row.rules[role]


@given(st.sampled_from(RULES), groups)
def test_a_control_differs_from_its_row_in_one_group_of_roles(name, group):
    row, sp = TABLE[name], TABLE["sp"]
    without, only = (control(TABLE, f"{name}-{what}-{group}") for what in ("without", "only"))
    if all(part(row, role) == part(sp, role) for role in GROUPS[group]):
        assert without is only is None
        return
    for role in (*ROLES, ATTENTION_LOGITS):
        inside = role in GROUPS[group]
        assert part(without, role) == part(sp if inside else row, role)
        assert part(only, role) == part(row if inside else sp, role)
    assert (without.name, only.name) == (f"{name}-without-{group}", f"{name}-only-{group}")


def test_every_role_is_in_one_group():
    assert sorted(role for roles in GROUPS.values() for role in roles) == sorted((*ROLES, ATTENTION_LOGITS))


@pytest.mark.parametrize("name", ["mup", "mup-without", "mup-without-noses", "nobody-without-experts", "mup-only-norm"])
def test_no_other_name_is_a_control(name):
    assert control({row: TABLE[row] for row in RULES}, name) is None


def test_without_a_standard_row_there_are_no_controls():
    assert control({"mup": TABLE["mup"]}, "mup-without-experts") is None


def axes_of(figure, **axes):
    document = asdict(CONFIG)
    document["figures"] = json.loads(json.dumps(document["figures"]))
    document["figures"][figure]["axes"] |= axes
    return json.loads(json.dumps(document))


def test_a_figure_takes_controls_by_name_and_no_others():
    rows = ("mup", "mup-without-experts", "simplep-only-unembedding")
    config = validate(axes_of("figure1", parametrization=list(rows)))
    assert config.figures["figure1"].axes.parametrization == rows
    for wrong in ("mup-without-norm", "mup-without-nothing"):
        with pytest.raises(ConfigError, match=f"names '{wrong}', which `parametrizations` does not list"):
            validate(axes_of("figure1", parametrization=["mup", wrong]))


# ---------------------------------------------------------------- learning rates of groups


@given(groups, octaves)
def test_a_learning_rate_of_a_group_reads_back(group, factor):
    rate = GroupRate(group, LearningRate(2.0**factor))
    assert GroupRate.parse(str(rate)) == rate
    cell = Cell("small", "moe", "mup", 64, 8, 1, LearningRate("2^-4"), 0, str(rate))
    assert Cell.parse(cell.id) == cell
    assert cell.id == f"{replace(cell, learning_rate_of='').id}_{rate}"


@pytest.mark.parametrize("text", ["experts", "noses-lr2^3", "experts-lr8", "experts-lr-1", "-lr2^3"])
def test_no_other_text_is_a_learning_rate_of_a_group(text):
    with pytest.raises(ValueError, match=r"learning rate|spelt"):
        Cell("small", "moe", "mup", 64, 8, 1, LearningRate("2^-4"), 0, text)


@given(groups, octaves, st.sampled_from([8, 16, 32]))
def test_it_multiplies_that_groups_learning_rates_alone(group, factor, width):
    plain = make_request(width=width)
    scaled = make_request(width=width, learning_rate_of=f"{group}-lr{LearningRate(2.0**factor)}")
    shape, base = (
        ModelShape.of(plain.cell, plain.model, VOCABULARY),
        ModelShape.base_of(plain.cell, plain.model, VOCABULARY),
    )
    before, after = (factors(request.rules, shape, base, plain.model) for request in (plain, scaled))
    for name, tensor in tensors_of(shape, plain.model).items():
        by = 2.0**factor if tensor.role in GROUPS[group] else 1
        assert after[name] == replace(before[name], lr=before[name].lr * by)


def test_it_trains_as_a_row_that_says_the_same(tokens):
    wrong = control(TABLE, "mup-without-experts")
    # Under SP the experts' learning rate does not follow the width; at twice the base width muP halves it.
    table = TABLE | {wrong.name: wrong}
    requests = [
        make_request(width=16, table=table, parametrization=name, learning_rate_of=rate)
        for name, rate in ((wrong.name, ""), ("mup", "experts-lr2^1"), ("mup", ""))
    ]
    trainer = Trainer(requests, tokens, tokens, VOCABULARY, CPU)
    trainer.run()
    one, other, plain = (outcome.history_TM for outcome in trainer.outcomes())
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, plain)


def test_factors_are_tried_one_group_at_a_time_beside_none():
    config = validate(
        axes_of("sensitivity", learning_rate_of={"experts": ["2^-1", 1, "2^2"], "router": ["2^2"]}, seed=[0, 1])
    )
    cells = config.figures["sensitivity"].cells()
    names = ["", "experts-lr2^-1", "experts-lr2^2", "router-lr2^2"]
    assert [cell.learning_rate_of for cell in cells] == [name for _ in (0, 1) for name in names]


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        ({"noses": ["2^1"]}, "`learning_rate_of` has 'noses'"),
        ({"experts": ["2^1", 2]}, "lists experts-lr2.1 more than"),
    ],
)
def test_groups_and_factors_are_checked(rates, sentence):
    with pytest.raises(ConfigError, match=sentence):
        validate(axes_of("sensitivity", learning_rate_of=rates))


def test_a_figure_of_curves_has_no_learning_rates_of_groups():
    with pytest.raises(ConfigError, match="`learning_rate_of` has 2 values but is neither panel nor curve"):
        validate(axes_of("figure1", learning_rate_of={"experts": ["2^1"]}))


# ---------------------------------------------------------------- excess

RATES = np.arange(-8.0, 0.0)


def parabola(vertex, lowest, seeds=1, noise=0.0, generator=None):
    shift = generator.normal(0, noise, (seeds, 1)) if generator is not None else np.zeros((seeds, 1))
    return Curve(RATES, lowest + 0.1 * (RATES - vertex) ** 2 + shift)


vertices = st.floats(-5.5, -3.5)
losses = st.floats(2, 5)


@given(vertices, st.floats(-1.4, 1.4), losses, losses)
def test_the_excess_is_over_the_lowest_loss_of_any_row(far, moved, own, best):
    base = far + moved  # within the window of the far curve's parabola
    panels = {"a": {32: parabola(base, 4), 128: parabola(far, own)}, "b": {128: parabola(-4, best)}}
    found = excess(panels, "a", 128, 32, CONFIG.analysis)
    assert found.nats == pytest.approx(own + 0.1 * (base - far) ** 2 - min(own, best), abs=1e-6)
    assert found.low == found.nats == found.high


def test_the_excess_of_seeds_has_students_interval():
    generator = np.random.default_rng(0)
    panels = {
        "a": {32: parabola(-4, 4, 4), 128: parabola(-4, 3.2, 4, 0.01, generator)},
        "b": {32: parabola(-4, 4, 4), 128: parabola(-4, 3.0, 4, 0.01, generator)},
    }
    found = excess(panels, "a", 128, 32, CONFIG.analysis)
    differences = panels["a"][128].losses.min(axis=1) - panels["b"][128].losses.min(axis=1)
    interval = stats.t.interval(0.95, 3, differences.mean(), stats.sem(differences))
    assert (found.low, found.high) == pytest.approx(interval)


def test_an_excess_beyond_what_converged_has_no_upper_bound():
    far = parabola(-7, 3)
    far.losses[0, -5:] = np.nan
    panels = {"a": {32: parabola(-3, 4), 128: far}}
    found = excess(panels, "a", 128, 32, CONFIG.analysis)
    assert found.at_least
    assert found.high == math.inf
    assert found.nats == pytest.approx(0.1 * (RATES[2] + 7) ** 2, abs=1e-6)


def test_with_the_base_in_the_middle_the_dearer_end_counts():
    panels = {"a": {2: parabola(-4, 3), 8: parabola(-4, 3), 32: parabola(-2, 3)}}
    assert largest_excess(panels, "a", 8, CONFIG.analysis).nats == pytest.approx(0.4)
    panels = {"a": {2: parabola(-1.5, 3), 8: parabola(-4, 3), 32: parabola(-2, 3)}}
    assert largest_excess(panels, "a", 8, CONFIG.analysis).nats == pytest.approx(0.1 * 2.5**2)
    assert math.isnan(largest_excess(panels, "a", 64, CONFIG.analysis).nats)


# ---------------------------------------------------------------- sensitivity

STEEP = {"experts": 0.001, "router": 0.0, "unembedding": 0.05}


def sensitivity_config(seeds=(0, 1)) -> Config:
    figure = CONFIG.figures["sensitivity"]
    steps = tuple(LearningRate(f"2^{octave}") for octave in (-4, -2, 2, 4))
    rates = (LearningRate("2^-6"), LearningRate("2^-4"))
    axes = replace(figure.axes, learning_rate_of=dict.fromkeys(STEEP, steps), learning_rate=rates, seed=seeds)
    return replace(CONFIG, figures=CONFIG.figures | {"sensitivity": replace(figure, axes=axes)})


def write_losses(folder, config: Config, loss) -> None:
    cells = config.figures["sensitivity"].cells()
    rows = [[cell.id, "diverged" if loss(cell) is None else "finished", loss(cell), loss(cell)] for cell in cells]
    write_csv(folder / "sensitivity/runs.csv", ["cell", "status", "train_loss", "valid_loss"], rows)


def loss_of(cell):
    """Lowest at 2^-4; a group costs its square of octaves, and the router diverges at 2^4."""
    loss = 4 + 0.1 * cell.seed + (math.log2(cell.learning_rate) + 4) ** 2
    if not cell.learning_rate_of:
        return loss
    group, factor = GroupRate.parse(cell.learning_rate_of)
    return None if (group, factor) == ("router", 16) else loss + STEEP[group] * math.log2(factor) ** 2


def test_sensitivity_is_what_a_factor_costs_at_the_best_learning_rate(tmp_path):
    config = sensitivity_config()
    write_losses(tmp_path, config, loss_of)
    assert run_step("sensitivity", "sensitivity", config=config, results=tmp_path) == 0
    rows = read_rows(tmp_path / "sensitivity/sensitivity.csv", SensitivityRow)
    assert len(rows) == 5 * len(STEEP)
    for row in rows:
        assert row.log2_lr == -4
        expected = math.inf if (row.group, row.log2_factor) == ("router", 4) else STEEP[row.group] * row.log2_factor**2
        assert row.lost == pytest.approx(expected)
    assert lost_at(rows, 2) == pytest.approx({"experts": 0.004, "router": 0.0, "unembedding": 0.2})
    assert lost_at(rows, 1)["unembedding"] == pytest.approx(0.1)
    assert seen(rows, 2, 0.1) == "will see: unembedding; not: experts, router"
    assert seen(rows, 5, 0.1).startswith("will see: nothing; not: nothing; not measured so far: experts")
    page = (tmp_path / "sensitivity/sensitivity.md").read_text()
    assert "| unembedding | +0.800 | +0.200 | +0.000 | +0.200 | +0.800 | +0.200 | +0.200 |" in page
    assert "| router | +0.000 | +0.000 | +0.000 | +0.000 | diverged | +0.000 | diverged |" in page
    picture(sensitivity.draw(config, "sensitivity", tmp_path), tmp_path)


def test_the_bill_says_what_a_sweep_will_see(tmp_path, capsys):
    config = sensitivity_config()
    assert run_step("plan", config=config, results=tmp_path) == 0
    assert "figure1: which roles it can see is not measured for the set-up" in capsys.readouterr().out
    write_losses(tmp_path, config, loss_of)
    assert run_step("sensitivity", "sensitivity", config=config, results=tmp_path) == 0
    assert run_step("plan", config=config, results=tmp_path) == 0
    told = "figure1, 2 octaves of width, will see: unembedding; not: experts, router (0.1 nats or more)."
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "plan.md").read_text()
    # Another set-up of the same name has not been measured.
    setup = config.setups["mixtral"]
    longer = replace(setup, training=replace(setup.training, steps=301))
    other = replace(config, setups=config.setups | {"mixtral": longer})
    assert run_step("plan", config=other, results=tmp_path) == 0
    assert "figure1: which roles it can see is not measured" in capsys.readouterr().out


def picture(figure, folder):
    with drawing_style():
        save(figure, folder / "drawn")
    with Image.open(folder / "drawn.png") as image:
        assert min(image.size) > 300


# ---------------------------------------------------------------- attribution

DRIFTS = {"sp": -0.9, "mup": 0.0, "mup-without-experts": 0.0, "mup-only-experts": -0.8}
LEVELS = {"mup-without-experts": 0.2}


def attribution_config(rows=tuple(DRIFTS)) -> Config:
    figure = CONFIG.figures["attribution"]
    axes = replace(figure.axes, parametrization=rows, width=(32, 64, 96, 128))
    return replace(CONFIG, figures=CONFIG.figures | {"attribution": replace(figure, axes=axes)})


def write_figure(folder, config: Config, name: str, drifts, levels, tokens=0):
    """Runs and optima of a figure over widths: vertices that drift, and rows whose losses lie higher when wide."""
    rows = []
    for cell in config.figures[name].cells():
        doublings = math.log2(cell.width / 32)
        # No line goes through these, so that the drift has an interval.
        best = -4.5 + drifts[cell.parametrization] * doublings + (0.02 if cell.width in (64, 96) else 0)
        level = 3 + levels.get(cell.parametrization, 0) * doublings / 2
        loss = level + 0.1 * (math.log2(cell.learning_rate) - best) ** 2
        rows.append([cell.id, "finished", loss, loss, tokens])
    write_csv(folder / name / "runs.csv", ["cell", "status", "train_loss", "valid_loss", "tokens"], rows)
    assert run_step("optima", name, config=config, results=folder) == 0


def test_attribution_says_what_each_group_contributes(tmp_path):
    config = attribution_config()
    write_figure(tmp_path, config, "attribution", DRIFTS, LEVELS)
    assert run_step("attribution", "attribution", config=config, results=tmp_path) == 0
    rows = {row.panel: row for row in read_rows(tmp_path / "attribution/attribution.csv", AttributionRow)}
    assert list(rows) == list(DRIFTS)
    without, only = rows["mup-without-experts"], rows["mup-only-experts"]
    assert (without.of, without.group, only.of, only.group) == ("mup", "experts", "sp", "experts")
    assert without.excess == pytest.approx(0.2, abs=0.01)
    assert without.excess_change == pytest.approx(without.excess - rows["mup"].excess)
    assert only.drift_change == pytest.approx(0.1, abs=0.02)
    assert math.isnan(rows["mup"].drift_change)
    page = (tmp_path / "attribution/attribution.md").read_text()
    assert "| μP without experts |" in page
    assert "| SP |" in page
    picture(attribution.draw(config, "attribution", tmp_path), tmp_path)


# ---------------------------------------------------------------- verdicts


def judged(folder, controls, drifts=DRIFTS, levels=LEVELS) -> pd.Series:
    """What the claim that muP keeps its best learning rate comes to with these controls."""
    config = attribution_config()
    drift = {"figure": "attribution", "panel": "mup", "expect": "keeps"}
    if controls:
        drift["controls"] = {"figure": "attribution", "panels": controls}
    table = {"C9": {"says": "It.", "decided_by": "more", "drifts": [drift], "slopes": []}}
    document = asdict(config) | {"claims": asdict(CONFIG.claims) | {"table": table}}
    config = validate(json.loads(json.dumps(document)))
    write_figure(folder, config, "attribution", drifts, levels)
    assert run_step("claims", config=config, results=folder) == 0
    return pd.read_csv(folder / "claims.csv", keep_default_na=False).iloc[0]


def test_a_sweep_that_a_wrong_rule_passes_cannot_tell(tmp_path):
    row = judged(tmp_path, ["mup-without-experts"], levels={})
    assert row["verdict"] == "inconclusive"
    assert row["controls"] == "mup-without-experts passes"
    report = (tmp_path / "claims.md").read_text()
    assert "this sweep cannot tell: μP without experts passes the same test" in report
    assert "| **C9** It. | **inconclusive**: this sweep cannot tell |" in report
    tests = pd.read_csv(tmp_path / "claims/tests.csv")
    assert tests["kind"].tolist() == ["drift", "control"]


@pytest.mark.parametrize("what", ["loss", "drift"])
def test_a_control_that_fails_lets_the_rule_replicate(tmp_path, what):
    drifts = DRIFTS | ({"mup-without-experts": -0.6} if what == "drift" else {})
    row = judged(tmp_path, ["mup-without-experts"], drifts, LEVELS if what == "loss" else {})
    assert row["verdict"] == "replicated"
    assert row["controls"] == "mup-without-experts fails"


def test_one_control_that_passes_is_enough_to_leave_a_claim_open(tmp_path):
    row = judged(tmp_path, ["mup-without-experts", "mup-only-experts"], DRIFTS | {"mup-only-experts": 0.0})
    assert row["verdict"] == "inconclusive"
    assert row["controls"] == "mup-without-experts fails; mup-only-experts passes"


def test_a_control_near_the_margin_leaves_a_claim_open(tmp_path):
    row = judged(tmp_path, ["mup-without-experts"], DRIFTS | {"mup-without-experts": -0.3}, {})
    assert row["verdict"] == "inconclusive"
    assert row["controls"] == "mup-without-experts undecided"
    assert "its control μP without experts is inconclusive" in (tmp_path / "claims.md").read_text()


def test_without_a_control_nothing_is_kept(tmp_path):
    assert judged(tmp_path, [])["verdict"] == "inconclusive"
    assert "no control says whether a wrong rule would pass" in (tmp_path / "claims.md").read_text()


def test_a_rule_whose_losses_rise_does_not_transfer_though_its_optimum_stays(tmp_path):
    row = judged(tmp_path, ["mup-without-experts"], levels={"mup": 0.3, "mup-without-experts": 0.3})
    assert row["verdict"] == "inconclusive"
    report = (tmp_path / "claims.md").read_text()
    assert "too small a sweep to refute it" in report
    assert "| 0.300 |" in report


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"controls": {"figure": "figure4", "panels": ["mup-without-experts"]}}, "whose `setup` is not that of"),
        ({"controls": {"figure": "figure2a", "panels": ["mup"]}}, "whose `curve` is not that of"),
        ({"controls": {"figure": "attribution", "panels": []}}, "`panels` of `controls` is empty"),
        ({"controls": {"figure": "attribution", "panels": ["mup-without-x"]}}, "does not list"),
        ({"expect": "falls", "controls": {"figure": "attribution", "panels": ["mup"]}}, "belong to a test that"),
    ],
)
def test_controls_are_checked(changes, sentence):
    drift = {"figure": "figure1", "panel": "mup", "expect": "keeps"} | changes
    table = {"C9": {"says": "It.", "decided_by": "more", "drifts": [drift], "slopes": []}}
    document = asdict(CONFIG) | {"claims": asdict(CONFIG.claims) | {"table": table}}
    with pytest.raises(ConfigError, match=sentence):
        validate(json.loads(json.dumps(document)))


def test_verdicts_of_sweeps_are_shown_side_by_side(tmp_path, capsys):
    judged(tmp_path / "seeing", ["mup-without-experts"])
    judged(tmp_path / "blind", ["mup-without-experts"], levels={})
    capsys.readouterr()
    assert main(["verdicts", str(tmp_path / "seeing"), str(tmp_path / "blind")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| claim | seeing | blind |"
    assert table[2] == "| C9 | replicated | inconclusive: cannot tell, μP without experts passes too |"


# ---------------------------------------------------------------- trends and power


def trend_config() -> Config:
    setups, figures = dict(CONFIG.setups), {}
    for base in (32, 64):
        for steps in (100, 200):
            setup = CONFIG.setups["small"]
            model, training = replace(setup.model, base_width=base), replace(setup.training, steps=steps)
            setups[f"b{base}-s{steps}"] = replace(setup, model=model, training=training)
            axes = replace(CONFIG.figures["figure1"].axes, parametrization=("mup",), width=(base, base * 2, base * 4))
            figures[f"b{base}-s{steps}"] = FigureSettings(
                setup=f"b{base}-s{steps}", axes=axes, panel="parametrization", curve="width"
            )
    claims = replace(CONFIG.claims, table={})
    parts = {"figures": figures, "compositions": {}, "trends": {"limit": tuple(figures)}, "probes": {}}
    return replace(CONFIG, setups=setups, claims=claims, **parts)


def test_a_trend_shows_the_drift_of_each_of_its_figures(tmp_path):
    config = trend_config()
    for name in config.figures:
        write_figure(tmp_path, config, name, {"mup": -0.2}, {})
    drawn = trend.draw(config, "limit", tmp_path)
    (axes,) = drawn.axes
    assert [line.get_text() for line in drawn.legends[0].get_texts()] == ["base width", "32", "64"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100", "200"]
    picture(drawn, tmp_path)
    assert run_step("figure", "limit", config=config, results=tmp_path) == 0


@settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(5, 9), st.integers(0, 2**31))
def test_as_many_seeds_as_it_asks_for_hold_a_slope_as_often_as_it_says(deviation, count, seed):
    widths = tuple(np.geomspace(64, 1024, count).round().astype(int).tolist())
    power, free = 0.8, 0.1
    seeds = seeds_needed(deviation, widths, free, 0.95, power)
    generator, x = np.random.default_rng(seed), np.log2(widths)
    held = 0
    for _ in range(100):
        # More seeds than a test has time for are those of their means.
        few = min(seeds, 4)
        noise = generator.normal(0, deviation / math.sqrt(seeds / few), (few, count))
        slope, interval = regress([(s, x[i], noise[s, i]) for s in range(few) for i in range(count)], 0.95)
        held += -free <= interval.low <= interval.high <= free
        assert interval.low <= slope <= interval.high
    # Three standard errors of a hundred tries below what it promises; the promise is of one side of the interval.
    assert held >= 100 * (2 * power - 1) - 3 * 5
