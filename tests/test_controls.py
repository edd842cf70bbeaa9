"""Rows that are wrong on purpose, learning rates of groups of roles, and what a sweep can detect with them."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from conftest import CONFIG, TABLE, VOCABULARY, make_request, run_step
from mup_moe.__main__ import main
from mup_moe.analysis.attribution import AttributionRow
from mup_moe.analysis.curve import Curve
from mup_moe.analysis.excess import over_lowest, over_rule
from mup_moe.analysis.power import Spread, seeds_needed, spreads
from mup_moe.analysis.runs import read_rows
from mup_moe.analysis.sensitivity import SensitivityRow, lost_at, seen
from mup_moe.analysis.slopes import columns_over, read_values
from mup_moe.analysis.transfer import regress
from mup_moe.config.cell import Cell, GroupRate, LearningRate
from mup_moe.config.document import ConfigError
from mup_moe.config.load import validate
from mup_moe.config.settings import Config, FigureSettings, SlopeTest
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
    with pytest.raises(ValueError, match=r"learning rate|canonical"):
        Cell("small", "moe", "mup", 64, 8, 1, LearningRate("2^-4"), 0, text)


@given(groups, octaves, st.sampled_from([8, 16, 32]))
def test_a_group_rate_multiplies_only_the_learning_rates_of_its_group(group, factor, width):
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


def test_a_group_rate_trains_like_the_equivalent_row(tokens):
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


def test_factors_are_tried_one_group_at_a_time_next_to_none():
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


@given(vertices, st.floats(-1.2, 1.2), losses, losses)
def test_the_excess_is_over_the_lowest_measured_loss_of_any_row(far, moved, own, best):
    base = far + moved  # within the window of the far curve's parabola
    panels = {"a": {32: parabola(base, 4), 128: parabola(far, own)}, "b": {128: parabola(-4, best)}}
    found = over_lowest(panels, "a", 32, CONFIG.analysis)
    lowest = min(curves[128].losses.min() for curves in panels.values())
    assert found.nats == pytest.approx(max(own + 0.1 * (base - far) ** 2 - lowest, 0), abs=1e-6)
    assert found.low == found.nats == found.high


@given(st.lists(st.floats(2, 6), min_size=8, max_size=8), st.integers(0, 7), st.floats(0, 3))
def test_a_worse_loss_of_another_row_does_not_raise_an_excess(losses, at, more):
    of_other = Curve(RATES, np.array([losses]))
    worse = Curve(RATES, of_other.losses + more * (np.arange(8) == at))
    own = {32: parabola(-4, 4), 128: parabola(-5, 4)}
    before, after = (
        over_lowest({"a": own, "b": {128: curve}}, "a", 32, CONFIG.analysis).nats for curve in (of_other, worse)
    )
    assert after <= before


def test_the_excess_of_seeds_has_students_interval():
    generator = np.random.default_rng(0)
    panels = {
        "a": {32: parabola(-4, 4, 4), 128: parabola(-4, 3.2, 4, 0.01, generator)},
        "b": {32: parabola(-4, 4, 4), 128: parabola(-4, 3.0, 4, 0.01, generator)},
    }
    differences = panels["a"][128].losses.min(axis=1) - panels["b"][128].losses.min(axis=1)
    interval = stats.t.interval(0.95, 3, differences.mean(), stats.sem(differences))
    for found in (
        over_lowest(panels, "a", 32, CONFIG.analysis),
        over_rule(panels["a"], panels["b"], 32, CONFIG.analysis),
    ):
        assert (found.low, found.high) == pytest.approx(interval)


def test_a_control_can_be_better_than_its_rule():
    rule, control = ({32: parabola(-4, 4), 128: parabola(-4, lowest)} for lowest in (3.2, 3.0))
    assert over_rule(control, rule, 32, CONFIG.analysis).nats == pytest.approx(-0.2)


def test_a_control_is_not_compared_where_its_rule_was_not_measured():
    rule, control = ({32: parabola(-4, 4), width: parabola(-4, 3)} for width in (64, 128))
    assert math.isnan(over_rule(control, rule, 32, CONFIG.analysis).nats)


def test_an_excess_beyond_the_converged_rates_has_no_upper_bound():
    far = parabola(-7, 3)
    far.losses[0, -5:] = np.nan
    panels = {"a": {32: parabola(-3, 4), 128: far}}
    found = over_lowest(panels, "a", 32, CONFIG.analysis)
    assert found.at_least
    assert found.high == math.inf
    assert found.nats == pytest.approx(0.1 * (RATES[2] + 7) ** 2, abs=1e-6)
    # So it is unknown how much worse than this rule another row is.
    assert over_rule({32: parabola(-3, 4), 128: parabola(-3, 9)}, panels["a"], 32, CONFIG.analysis).low == -math.inf


def test_with_the_base_in_the_middle_the_end_that_speaks_against_the_row_counts():
    def lost(low_end, high_end):
        curves = {2: low_end, 8: parabola(-4, 3), 32: high_end}
        rule = {value: parabola(-4, 3) for value in curves}
        return over_lowest({"a": curves}, "a", 8, CONFIG.analysis), over_rule(curves, rule, 8, CONFIG.analysis)

    for found in (*lost(parabola(-4, 3), parabola(-2, 3)), *lost(parabola(-2, 3), parabola(-3, 3))):
        assert found.nats == pytest.approx(0.4)
    next_to_divergence = parabola(-5, 3)
    next_to_divergence.losses[0, 4:] = np.nan
    assert lost(next_to_divergence, parabola(-2, 3))[0].high == math.inf
    assert math.isnan(over_lowest({"a": {2: parabola(-4, 3)}}, "a", 64, CONFIG.analysis).nats)


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
    """A loss lowest at 2^-4; a group's factor costs the square of its octaves, and the router diverges at 2^4."""
    loss = 4 + 0.1 * cell.seed + (math.log2(cell.learning_rate) + 4) ** 2
    if not cell.learning_rate_of:
        return loss
    group, factor = GroupRate.parse(cell.learning_rate_of)
    return None if (group, factor) == ("router", 16) else loss + STEEP[group] * math.log2(factor) ** 2


def test_sensitivity_is_the_cost_of_a_factor_at_the_best_learning_rate(tmp_path):
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


def test_seeds_that_lack_a_cell_do_not_count(tmp_path, capsys):
    config = sensitivity_config()
    write_losses(tmp_path, config, loss_of)
    runs = tmp_path / "sensitivity/runs.csv"
    # Seed 0 has lower losses; remove its cell that the others are compared with.
    lines = runs.read_text().splitlines(keepends=True)
    runs.write_text("".join(line for line in lines if not line.startswith("mixtral_moe_mup_w32_e8_g1_lr2^-4_s0,")))
    assert len(runs.read_text().splitlines()) == len(lines) - 1
    assert run_step("sensitivity", "sensitivity", config=config, results=tmp_path) == 1
    assert "the runs lack cell mixtral_moe_mup_w32_e8_g1_lr2^-4_s0" in capsys.readouterr().err
    config = replace(config, analysis=replace(config.analysis, foreign_cells="leave_out"))
    assert run_step("sensitivity", "sensitivity", config=config, results=tmp_path) == 0
    rows = read_rows(tmp_path / "sensitivity/sensitivity.csv", SensitivityRow)
    lost = {(row.group, row.log2_factor): row.lost for row in rows}
    assert lost["unembedding", 2] == pytest.approx(0.2)


def test_the_bill_says_which_groups_a_sweep_will_see(tmp_path, capsys):
    config = sensitivity_config()
    assert run_step("plan", config=config, results=tmp_path) == 0
    assert "figure1: which roles it can see is not measured for the set-up" in capsys.readouterr().out
    write_losses(tmp_path, config, loss_of)
    assert run_step("sensitivity", "sensitivity", config=config, results=tmp_path) == 0
    assert run_step("plan", config=config, results=tmp_path) == 0
    reported = "figure1, 2 octaves of width, will see: unembedding; not: experts, router (0.1 nats or more)."
    assert reported in capsys.readouterr().out
    assert reported in (tmp_path / "plan.md").read_text()
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
    """Writes runs and optima of a figure over widths, with drifting vertices and rows that lose more when wide."""
    rows = []
    for cell in config.figures[name].cells():
        doublings = math.log2(cell.width / 32)
        # These vertices are not on a line, so that the drift has an interval.
        best = -4.5 + drifts[cell.parametrization] * doublings + (0.02 if cell.width in (64, 96) else 0)
        level = 3 + levels.get(cell.parametrization, 0) * doublings / 2
        loss = level + 0.1 * (math.log2(cell.learning_rate) - best) ** 2
        rows.append([cell.id, "finished", loss, loss, tokens])
    write_csv(folder / name / "runs.csv", ["cell", "status", "train_loss", "valid_loss", "tokens"], rows)
    assert run_step("optima", name, config=config, results=folder) == 0


def test_attribution_shows_what_each_group_contributes(tmp_path):
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


def judged(folder, controls, drifts=DRIFTS, levels=LEVELS, figure="attribution", **axes) -> pd.Series:
    """Judges the claim that muP keeps its best learning rate with these controls of figure attribution.

    figure: the one with the rule's curves; axes: its axes, if it is not attribution itself.
    """
    config = attribution_config()
    if figure != "attribution":
        other = replace(config.figures[figure], axes=replace(config.figures[figure].axes, **axes))
        config = replace(config, figures=config.figures | {figure: other})
    drift = {"figure": figure, "panel": "mup", "expect": "keeps"}
    if controls:
        drift["controls"] = {"figure": "attribution", "panels": controls}
    table = {"C9": {"says": "It.", "decided_by": "more", "drifts": [drift], "slopes": []}}
    document = asdict(config) | {"claims": asdict(CONFIG.claims) | {"table": table}}
    config = validate(json.loads(json.dumps(document)))
    for name in {figure, "attribution"}:
        write_figure(folder, config, name, drifts, levels)
    assert run_step("claims", config=config, results=folder) == 0
    return pd.read_csv(folder / "claims.csv", keep_default_na=False).iloc[0]


def test_a_sweep_that_a_wrong_rule_passes_is_inconclusive(tmp_path):
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


def test_one_passing_control_leaves_a_claim_open(tmp_path):
    row = judged(tmp_path, ["mup-without-experts", "mup-only-experts"], DRIFTS | {"mup-only-experts": 0.0})
    assert row["verdict"] == "inconclusive"
    assert row["controls"] == "mup-without-experts fails; mup-only-experts passes"


def test_a_control_near_the_margin_leaves_a_claim_open(tmp_path):
    row = judged(tmp_path, ["mup-without-experts"], DRIFTS | {"mup-without-experts": -0.3}, {})
    assert row["verdict"] == "inconclusive"
    assert row["controls"] == "mup-without-experts undecided"
    assert "its control μP without experts is inconclusive" in (tmp_path / "claims.md").read_text()


def test_without_a_control_a_claim_stays_open(tmp_path):
    assert judged(tmp_path, [])["verdict"] == "inconclusive"
    assert "no control shows whether a wrong rule would pass" in (tmp_path / "claims.md").read_text()


def test_a_rule_with_rising_losses_does_not_transfer_even_if_its_optimum_stays(tmp_path):
    row = judged(tmp_path, ["mup-without-experts"], levels={"mup": 0.3, "mup-without-experts": 0.3})
    assert row["verdict"] == "inconclusive"
    report = (tmp_path / "claims.md").read_text()
    assert "too small a sweep to refute it" in report
    assert "the excess speaks against the claim" in report
    assert pd.read_csv(tmp_path / "claims/tests.csv")["excess"][0] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("mup", [0.0, 0.4])
@pytest.mark.parametrize("axes", [{"width": (32, 64, 96, 128, 512)}, {"width": (32, 48, 64, 128), "seed": (0, 1)}])
def test_controls_with_other_ends_or_seeds_than_their_rule_are_undecided(tmp_path, axes, mup):
    doublings = math.log2(max(axes["width"]) / 32)
    levels = {"mup": 2 * mup / doublings, "mup-without-experts": 0.5}
    axes = {"parametrization": ("mup", "sp"), **axes}
    row = judged(tmp_path, ["mup-without-experts"], levels=levels, figure="figure1", **axes)
    assert row["verdict"] == "inconclusive"
    assert row["controls"] == "mup-without-experts undecided"
    tests = pd.read_csv(tmp_path / "claims/tests.csv")
    assert tests["excess"][0] == pytest.approx(mup, abs=0.02)
    assert tests["reason"][1] == "attribution has other seeds or ends than figure1"
    assert row["rests_on"] == "figure1; attribution"


def test_controls_with_fewer_widths_in_between_are_compared_at_the_far_end(tmp_path):
    axes = {"parametrization": ("mup", "sp"), "width": (32, 48, 64, 96, 128)}
    row = judged(tmp_path, ["mup-without-experts"], figure="figure1", **axes)
    assert (row["verdict"], row["controls"]) == ("replicated", "mup-without-experts fails")


def test_a_control_is_judged_by_its_excess_over_its_rule_whatever_other_rows_reach(tmp_path):
    levels = {"mup": 0.05, "mup-without-experts": 0.12}
    row = judged(tmp_path, ["mup-without-experts"], levels=levels)
    assert (row["verdict"], row["controls"]) == ("inconclusive", "mup-without-experts passes")
    excess = pd.read_csv(tmp_path / "claims/tests.csv")["excess"].tolist()
    assert excess == pytest.approx([0.05, 0.07], abs=0.02)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"controls": {"figure": "figure4", "panels": ["mup-without-experts"]}}, "which has another `setup` than"),
        ({"controls": {"figure": "figure2a", "panels": ["mup"]}}, "which has another `curve` than"),
        ({"controls": {"figure": "attribution", "panels": []}}, "`panels` of `controls` is empty"),
        ({"controls": {"figure": "attribution", "panels": ["mup-without-x"]}}, "does not list"),
        (
            {"expect": "falls", "controls": {"figure": "attribution", "panels": ["mup"]}},
            "`controls` are only for `expect` keeps",
        ),
    ],
)
def test_controls_are_checked(changes, sentence):
    drift = {"figure": "figure1", "panel": "mup", "expect": "keeps"} | changes
    table = {"C9": {"says": "It.", "decided_by": "more", "drifts": [drift], "slopes": []}}
    attribution = CONFIG.figures["attribution"]
    three = replace(attribution, axes=replace(attribution.axes, seed=(0, 1, 2)))
    document = asdict(replace(CONFIG, figures=CONFIG.figures | {"three": three})) | {
        "claims": asdict(CONFIG.claims) | {"table": table}
    }
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
    (tmp_path / "of/seeing").mkdir(parents=True)
    (tmp_path / "of/seeing/claims.csv").write_bytes((tmp_path / "seeing/claims.csv").read_bytes())
    assert main(["verdicts", str(tmp_path / "seeing"), str(tmp_path / "of/seeing")]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "| C9 | replicated | replicated |"


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


NOISE, SHARED = 0.4, 0.03
WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)


def pilot_rows(generator, seeds, slope=0.0, widths=WIDTHS, block="0"):
    """Yields values with logarithms that deviate from a line by noise and by a deviation that all seeds share."""
    shared = generator.normal(0, SHARED, len(widths))
    for seed in range(seeds):
        offset = generator.normal()
        for width, bend in zip(widths, shared, strict=True):
            value = 2 ** (slope * math.log2(width) + offset + bend + generator.normal(0, NOISE))
            yield ["mup", width, seed, 2, "inner product", block, value]


TEST = SlopeTest(probe="lemma_b1", parametrization="mup", quantity="inner product", step=2, slope=0.0)


def test_a_pilot_separates_noise_from_what_seeds_share():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(200):
        rows = pd.DataFrame(pilot_rows(generator, 30), columns=columns_over("width"))
        found.append(spreads(rows, TEST)["0"])
    assert np.mean([spread.noise for spread in found]) == pytest.approx(NOISE, rel=0.03)
    # Each pilot subtracts the part that noise explains, but not below 0, so the average can be too high by that part.
    about_line = [spread.shared**2 for spread in found]
    assert SHARED**2 <= np.mean(about_line) <= SHARED**2 + NOISE**2 / 30


@pytest.mark.parametrize("spread", [Spread(0.4, 0.0), Spread(0.1, 0.03), Spread(0.6, 0.05)])
def test_the_seeds_that_it_asks_for_give_the_promised_power(spread):
    power, free, tries = 0.8, 0.1, 400
    seeds = seeds_needed(spread, WIDTHS, free, 0.95, power)
    generator, x = np.random.default_rng(0), np.log2(WIDTHS)

    def held(count):
        """Returns how often the interval is within the margin, for means over this many seeds."""
        inside = 0
        for _ in range(tries):
            deviation = math.sqrt(spread.noise**2 / count + spread.shared**2)
            means = generator.normal(0, deviation, len(x))
            _, interval = regress([(0, at, mean) for at, mean in zip(x, means, strict=True)], 0.95)
            inside += -free <= interval.low <= interval.high <= free
        return inside / tries

    error = 3 * math.sqrt(power * (1 - power) / tries)
    assert held(seeds) >= 2 * power - 1 - error  # the promise is about one end of the interval
    if seeds > 2:
        # Nor does it ask for far more seeds than necessary.
        assert held(seeds / 4) < power


def test_no_number_of_seeds_removes_what_all_of_them_share():
    assert seeds_needed(Spread(0.1, 0.5), WIDTHS, 0.1, 0.95, 0.9) is None


def power_command(folder, rows, *options) -> int:
    write_csv(folder / "pilot.csv", columns_over("width"), rows)
    return main(["power", "lemma_b1_slopes", "--pilot", str(folder / "pilot.csv"), *options])


def test_the_command_reports_the_seeds_that_the_tests_of_claims_need(tmp_path, capsys):
    generator = np.random.default_rng(0)
    assert power_command(tmp_path, list(pilot_rows(generator, 30))) == 0
    table = capsys.readouterr().out.splitlines()
    widths = CONFIG.probes["lemma_b1_slopes"].axes.width
    (spread,) = spreads(read_values(tmp_path / "pilot.csv"), TEST).values()
    expected = seeds_needed(spread, widths, CONFIG.claims.slope_margin * 2 / 3, 0.95, 0.9)
    assert table[2] == f"| inner product | 2 | 0 | {spread.noise:.3f} | {spread.shared:.3f} | {expected} |"
    assert (
        table[-1]
        == f"{expected} seeds over {len(widths)} values of width decide 1 of 1 tests with a power of 0.9 each."
    )


@pytest.mark.parametrize(
    ("quantity", "seeds", "options", "sentence"),
    [
        ("cosine", 3, [], "no claim tests a slope of"),
        ("inner product", 1, [], "the pilot is too small"),
        ("inner product", 3, ["--off", "1"], "argument --off: 1 must be at least 0 and less than 1"),
        ("inner product", 3, ["--power", "1.2"], "argument --power: 1.2 must be at least 0 and less than 1"),
    ],
)
def test_a_pilot_or_an_option_that_decides_nothing_is_refused(tmp_path, capsys, quantity, seeds, options, sentence):
    rows = [[*row[:4], quantity, *row[5:]] for row in pilot_rows(np.random.default_rng(0), seeds)]
    if options:
        with pytest.raises(SystemExit):
            power_command(tmp_path, rows, *options)
    else:
        assert power_command(tmp_path, rows) == 1
    assert sentence in capsys.readouterr().err
