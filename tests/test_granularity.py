"""Granularity: its rules, what an MoE layer adds, the experts' own learning rate, and rules side by side."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from conftest import ROOT, VOCABULARY, make_request, run_step, write_tokens
from mup_moe.analysis.comparison import ComparisonRow
from mup_moe.analysis.optima import OptimumRow
from mup_moe.analysis.runs import read_rows
from mup_moe.analysis.slopes import Slope, columns_over, slopes
from mup_moe.config.cell import GroupRate, LearningRate
from mup_moe.config.document import ConfigError, read_document
from mup_moe.config.like import overlay
from mup_moe.config.load import read_preset, validate
from mup_moe.config.settings import ComparedRule
from mup_moe.figures import comparison, contributions, transfer
from mup_moe.figures.style import drawing_style, save
from mup_moe.files import write_csv
from mup_moe.model.metrics import METRICS
from mup_moe.model.scaling import factors
from mup_moe.training.probe import CHANGES, layers_of, measure
from mup_moe.training.probe import contributions as contributions_of
from mup_moe.training.trainer import Trainer
from test_parametrization import CPU, build, shapes, train

PRESET = validate(overlay(read_document(ROOT / "config.yaml"), read_preset(ROOT / "presets", "granularity")))

# ---------------------------------------------------------------- the rules


def down(name, **changes):
    """Returns the factors of expert_down under a row."""
    request = make_request(parametrization=name, base_width=8, base_experts=8, top_k=2, **{"experts": 8, **changes})
    table = factors(request.parametrization, *shapes(request), request.model)
    return table["blocks.0.feed_forward.down"]


widths, granularities = st.sampled_from([8, 16, 64]), st.sampled_from([1, 2, 4, 8])


@given(widths, granularities)
def test_rows_that_are_said_to_agree_over_granularity_agree(width, granularity):
    at = {"width": width, "granularity": granularity}
    for one, other in (("granular", "longcat"), ("granular", "complete-mue"), ("jiang", "mssp")):
        assert asdict(down(one, **at)) == pytest.approx(asdict(down(other, **at)))
    # The two groups are equal by the symmetry of multiplier, init and learning rate under Adam.
    one, other = down("granular", **at), down("jiang", **at)
    assert one.init_std * one.multiplier == pytest.approx(other.init_std * other.multiplier)
    assert one.lr * one.multiplier == pytest.approx(other.lr * other.multiplier)


@given(widths, granularities)
def test_the_row_of_the_authors_equals_their_switch(width, granularity):
    at = {"width": width, "granularity": granularity}
    assert down("g-blind", **at) == down("simplep", expert_fan_in="width", **at)


@given(st.sampled_from([8, 16, 32]), granularities)
def test_rules_follow_their_sources(experts, granularity):
    """Variance, multiplier and learning rate of expert_down relative to those at the base, at fixed width and k/E."""
    share = experts // 8
    at = {"experts": experts, "granularity": granularity, "fixed_sparsity": True}
    base = down("simplep").init_std
    G = granularity
    expected = {
        "simplep": (G, 1, G),
        "g-blind": (1, 1, 1),
        "granular": (1, G, 1),
        "jiang": (G**2, 1, G),
        "mssp": (share * G * G, 1, G),
        "complete-mue": (1 / share, share * G, 1 / share),
        "sqrt-gate": (G, 1, G / math.sqrt(share * G)),
    }
    for name, numbers in expected.items():
        found = down(name, **at)
        assert ((found.init_std / base) ** 2, found.multiplier, found.lr) == pytest.approx(numbers), name


def test_two_forms_of_a_rule_train_the_same(tokens):
    # Clipping, weight decay and eps depend on the parameters themselves.
    changes = {"granularity": 4, "clip_norm": None, "weight_decay": 0.0, "adam_eps": 1e-30, "expert_fan_in": "width"}
    column = METRICS.index("train_loss")
    rules = ("granular", "jiang", "g-blind")
    one, other, blind = (train(tokens, parametrization=name, **changes)[:, column] for name in rules)
    np.testing.assert_allclose(one, other, rtol=2e-5)
    assert np.abs(one - blind).max() > 10 * np.abs(one - other).max()


def test_experts_can_start_alike():
    model, _ = build(
        make_request(experts_start_alike=True, top_k=2, renormalize_gates=True, capacity_factor="dropless")
    )
    moe = model.blocks[0].feed_forward
    for weight in (moe.up, moe.down):
        assert torch.equal(weight.value[0], weight.value[0, :1].expand_as(weight.value[0]))
    assert len(set(moe.router.value[0, 0].tolist())) == moe.shape.total_experts
    # The gates sum to 1, so the choice of the router does not matter.
    x_RND = torch.randn(1, 20, 8)
    before, _ = moe(x_RND)
    with torch.no_grad():
        moe.router.value.neg_()
    torch.testing.assert_close(moe(x_RND)[0], before)
    # Another block starts from other numbers.
    assert not torch.equal(moe.up.value, model.blocks[1].feed_forward.up.value)


def test_with_a_fixed_sparsity_top_k_follows_the_experts():
    for experts, granularity, active in ((4, 1, 2), (8, 1, 4), (8, 2, 8), (2, 1, 1)):
        request = make_request(experts=experts, granularity=granularity, top_k=2, fixed_sparsity=True)
        assert shapes(request)[0].active_experts == active
        assert shapes(request)[1].active_experts == 2
    with pytest.raises(ValueError, match="`top_k` 1 times `experts` 6 is not divisible by `base_experts` 4"):
        shapes(make_request(experts=6, top_k=1, fixed_sparsity=True))


@pytest.mark.parametrize(("top_k", "granularity"), [(1, 1), (2, 1), (2, 2)])
def test_a_balance_loss_times_top_k_is_that_of_the_authors(tokens, top_k, granularity):
    def objective(**changes):
        request = make_request(top_k=top_k, granularity=granularity, **changes)
        trainer = Trainer([request], tokens, tokens, VOCABULARY, CPU)
        losses = trainer.losses(trainer.training_batch(0))
        return trainer.model.objective(losses).item(), losses["balance_loss"].item()

    plain, balance = objective(balance_loss=0.5)
    times, _ = objective(balance_loss=0.5, balance_loss_times_top_k=True)
    assert times - plain == pytest.approx(0.5 * balance * (top_k * granularity - 1), abs=1e-5)


def test_square_roots_of_gates_need_gates_that_sum_to_1():
    with pytest.raises(ValueError, match="`gates` sqrt normalizes over the chosen experts only"):
        make_request(gates="sqrt")


# ---------------------------------------------------------------- what a layer adds


def test_contributions_equal_those_of_a_layer_with_restored_tensors(tokens):
    request = make_request(width=16, top_k=2, renormalize_gates=True, capacity_factor="dropless")
    trainer = Trainer([request], tokens, tokens, VOCABULARY, CPU)
    windows = trainer.training_batch(0)
    first = layers_of(trainer, windows)
    start = contributions_of(first)
    assert {quantity for quantity, _ in start} == {"output", *CHANGES}
    assert all(value == 0 for (quantity, _), value in start.items() if quantity != "output")
    trainer.run(until=4)
    found = contributions_of(first)
    for block, layer in first.items():
        before, moe = layer.parameters, layer.moe
        after = {name: parameter.detach().clone() for name, parameter in moe.named_parameters()}

        def output(parameters, moe=moe, layer=layer):
            for name, parameter in moe.named_parameters():
                parameter.data.copy_(parameters[name])
            return moe(layer.x_RND)[0].detach()

        rms = lambda x: float(x.square().mean().sqrt())  # noqa: E731
        # The output is linear in expert_down.
        change = before | {"down.value": after["down.value"] - before["down.value"]}
        assert found["change by expert_down", block] == pytest.approx(rms(output(change)), rel=1e-4)
        routed = before | {"router.value": after["router.value"]}
        assert found["change by router", block] == pytest.approx(rms(output(routed) - output(before)), rel=1e-4)
        experts = after | {"router.value": before["router.value"]}
        assert found["change by experts", block] == pytest.approx(rms(output(experts) - output(before)), rel=1e-4)
        assert found["change", block] == pytest.approx(rms(output(after) - output(before)), rel=1e-4)
        assert found["output", block] == pytest.approx(rms(output(after)), rel=1e-4)
        output(after)
    trainer.run(until=5)  # and training continues with its own tensors


@pytest.mark.parametrize(
    ("name", "expected"), [("g-blind", -1.0), ("simplep", -0.5), ("granular", 0.0), ("jiang", 0.0)]
)
def test_the_output_at_initialization_follows_granularity_as_predicted(tokens, name, expected):
    corpus = SimpleNamespace(train=tokens, valid=tokens[:2000], vocabulary=VOCABULARY)
    rows = []
    for granularity in (1, 2, 4, 8):
        for seed in range(3):
            request = make_request(
                parametrization=name,
                width=32,
                base_width=32,
                granularity=granularity,
                seed=seed,
                capacity_factor="dropless",
            )
            for step, ((quantity, block), value) in measure(request, "contributions", [0], corpus, CPU):
                rows.append([name, granularity, seed, step, quantity, block, value])
    table = pd.DataFrame(rows, columns=columns_over("granularity"))
    found = {(s.quantity, s.block): s for s in slopes(table, 0.95)}
    for block in "01":
        assert found["output", block].slope == pytest.approx(expected, abs=0.2)
        assert (found["output", block].lowest, found["output", block].highest) == (1, 8)


def test_a_probe_can_measure_over_granularity(tokens, tmp_path):
    request = make_request(top_k=2, renormalize_gates=True)
    setup = replace(PRESET.setups["probe-mixtral"], model=request.model, training=request.training)
    probe = PRESET.probes["contributions"]
    axes = replace(probe.axes, width=(8,), experts=(4,), granularity=(1, 2, 4), seed=(0, 1))
    config = replace(
        PRESET,
        setups=PRESET.setups | {"probe-mixtral": setup},
        probes=PRESET.probes | {"contributions": replace(probe, axes=axes, steps=(0, 1, 5))},
    )
    folder = tmp_path / "data" / setup.corpus
    folder.mkdir(parents=True)
    write_tokens(folder, tokens)
    assert run_step("probe", "contributions", "--device", "cpu", config=config, results=tmp_path) == 0
    table = pd.read_csv(tmp_path / "contributions/values.csv")
    assert sorted(set(table["granularity"])) == [1, 2, 4]
    assert "width" not in table
    assert run_step("slopes", "contributions", config=config, results=tmp_path) == 0
    found = read_rows(tmp_path / "contributions.csv", Slope)
    assert {(row.lowest, row.highest) for row in found} == {(1, 4)}
    picture(contributions.draw(config, "contributions", tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"granularity": (1,)}, "`axes.granularity` needs at least two values"),
        ({"width": (8, 16)}, "`axes.width` of a probe must have one value"),
        ({"architecture": ("dense",)}, "`measure` contributions needs experts"),
    ],
)
def test_a_probe_over_granularity_is_checked(changes, sentence):
    probe = PRESET.probes["contributions"]
    with pytest.raises(ValueError, match=sentence):
        replace(probe, axes=replace(probe.axes, **changes))


def test_lemma_b1_is_measured_over_width():
    with pytest.raises(ValueError, match=r"`measure` covariance tests Lemma B\.1, which is about width"):
        replace(PRESET.probes["contributions"], measure="covariance")


def picture(figure, folder):
    """Saves a figure and asserts that it shows something."""
    with drawing_style():
        save(figure, folder / "shown")
    assert len(Image.open(folder / "shown.png").convert("L").getcolors()) > 2


# ---------------------------------------------------------------- the experts' own learning rate

RISES = {"g-blind": 1.0, "simplep": 0.25, "granular": 0.0}


def write_runs(folder, config, name, loss):
    rows = [[cell.id, "finished", loss(cell), loss(cell), 10**9] for cell in config.figures[name].cells()]
    write_csv(folder / name / "runs.csv", ["cell", "status", "train_loss", "valid_loss", "tokens"], rows)
    assert run_step("optima", name, config=config, results=folder) == 0


def loss_of_experts(cell):
    """The experts' best factor is 2^-2 at granularity 1 and rises with it as `RISES` says, shifted a little by seed."""
    factor = math.log2(GroupRate.parse(cell.learning_rate_of).factor) if cell.learning_rate_of else 0
    best = -2 + RISES[cell.parametrization] * math.log2(cell.granularity) + 0.01 * (cell.seed - 1)
    return 4 + 0.01 * cell.seed + 0.1 * (factor - best) ** 2


def test_a_figure_can_tune_the_learning_rate_of_a_group(tmp_path):
    write_runs(tmp_path, PRESET, "expert_rate", loss_of_experts)
    rows = read_rows(tmp_path / "expert_rate/optima.csv", OptimumRow)
    for row in rows:
        rise = RISES[row.panel]
        assert row.log2_lr == pytest.approx(-2 + rise * math.log2(row.value))
        assert row.drift == pytest.approx(rise)
        assert row.points == 9
    with drawing_style():
        figure = transfer.draw(PRESET, "expert_rate", tmp_path)
        labels = {axes.get_xlabel() for axes in figure.axes}
    assert "factor on the learning rate of experts" in labels


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reference": "a.csv"}, "`reference` has global learning rates"),
        ({"tunes": "router"}, "`tunes` is 'router': give `axes.learning_rate_of` factors for it"),
        ({"kind": "attribution"}, "`tunes` is only for kind transfer, not for attribution"),
    ],
)
def test_what_a_figure_tunes_is_checked(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(PRESET.figures["expert_rate"], **changes)


def test_a_figure_that_tunes_a_group_has_one_global_learning_rate():
    figure = PRESET.figures["expert_rate"]
    rates = (LearningRate("2^-6"), LearningRate("2^-5"))
    with pytest.raises(ValueError, match="`learning_rate` has 2 values but is neither panel nor curve"):
        replace(figure, axes=replace(figure.axes, learning_rate=rates))


@pytest.mark.parametrize(
    ("rule", "drift", "verdict"),
    [
        ("g-blind", 1.0, "replicated"),
        ("simplep", 0.25, "replicated"),
        ("simplep", 1.0, "not replicated"),
        ("g-blind", 0.5, "not replicated"),
    ],
)
def test_a_predicted_drift_is_judged_around_the_prediction(tmp_path, rule, drift, verdict):
    write_runs(tmp_path, PRESET, "expert_rate", loss_of_experts)
    test = {"figure": "expert_rate", "panel": rule, "expect": "drifts", "drift": drift}
    claim = {"says": "It.", "decided_by": "more", "drifts": [test], "slopes": []}
    document = asdict(PRESET)
    document["claims"] = document["claims"] | {"table": {"G": claim}}
    config = validate(plain(document))
    assert run_step("claims", config=config, results=tmp_path) == 0
    assert pd.read_csv(tmp_path / "claims.csv").loc[0, "verdict"] == verdict
    assert f"drifts by {drift:+.2f}" in (tmp_path / "claims.md").read_text()


def plain(document):
    return json.loads(json.dumps(document))


@pytest.mark.parametrize("test", [{"expect": "drifts"}, {"expect": "keeps", "drift": 1.0}])
def test_only_a_test_that_drifts_predicts_a_drift(test):
    document = plain(asdict(PRESET))
    document["claims"]["table"]["G1"]["drifts"] = [{"figure": "expert_rate", "panel": "g-blind"} | test]
    with pytest.raises(ConfigError, match="`drift` is the expected drift of a test with `expect` drifts"):
        validate(document)


def test_a_preset_can_leave_out_claims():
    assert list(PRESET.claims.table) == ["G1", "G2", "G3"]


# ---------------------------------------------------------------- rules side by side

BEST, COST = {"g-blind": 0.25, "simplep": 0.1}, {"g-blind": 0.05, "simplep": -0.02}


def loss_of_rule(cell):
    """The best global learning rate rises by BEST, and the lowest loss changes by COST, per octave of granularity."""
    octaves, noise = math.log2(cell.granularity), 0.001 * ((1 + cell.seed) * cell.granularity % 7)
    best = -5 + BEST.get(cell.parametrization, 0) * octaves
    lowest = 4 + COST.get(cell.parametrization, 0) * octaves + noise
    return lowest + 0.1 * (math.log2(cell.learning_rate) - best) ** 2


def compare(folder, loss=loss_of_rule, **changes):
    rules = {
        title: ComparedRule(figure="granularity-rows", panel=panel, source="a | b")
        for title, panel in (("own", "simplep"), ("width", "g-blind"), ("times G", "granular"))
    }
    figure = PRESET.figures["granularity-rows"]
    figure = replace(figure, axes=replace(figure.axes, **changes))
    config = replace(PRESET, comparisons={"figure6": rules}, figures=PRESET.figures | {"granularity-rows": figure})
    write_runs(folder, config, "granularity-rows", loss)
    assert run_step("comparison", "figure6", config=config, results=folder) == 0
    return config, {row.panel: row for row in read_rows(folder / "figure6/comparison.csv", ComparisonRow)}


def test_a_comparison_has_drift_regret_and_losses_of_every_rule(tmp_path):
    config, rows = compare(tmp_path)
    cells = config.figures["granularity-rows"].cells()
    for panel, row in rows.items():
        moved = 4 * BEST.get(panel, 0)
        assert row.drift == pytest.approx(BEST.get(panel, 0))
        assert row.regret == pytest.approx(0.1 * moved**2, abs=1e-6)
        at = {
            (c.granularity, c.seed): loss_of_rule(c)
            for c in cells
            if (c.parametrization, c.learning_rate) == (panel, 2**-5)
        }
        changes = np.array([at[16, seed] - at[1, seed] for seed in range(3)])
        assert row.change == pytest.approx(changes.mean())
        interval = stats.t.interval(0.95, 2, changes.mean(), stats.sem(changes))
        assert (row.change_low, row.change_high) == pytest.approx(interval)
        assert row.loss == pytest.approx(np.mean([at[16, seed] for seed in range(3)]))
        if panel != "simplep":
            assert row.over_first == pytest.approx(row.loss - rows["simplep"].loss)
    assert math.isnan(rows["simplep"].over_first)
    assert not any(row.at_edge or row.missing for row in rows.values())
    page = (tmp_path / "figure6/comparison.md").read_text()
    assert "a \\| b" in page
    assert page.count("\n| ") >= 3
    with drawing_style():
        figure = comparison.draw(config, "figure6", tmp_path)
    picture(figure, tmp_path)


def test_one_seed_has_no_interval(tmp_path):
    _, rows = compare(tmp_path, seed=(0,))
    assert all(math.isnan(bound) for row in rows.values() for bound in (row.regret_low, row.change_high))
    page = (tmp_path / "figure6/comparison.md").read_text()
    assert "one seed, no interval" in page
    assert "nan" not in page


def test_a_loss_beyond_the_converged_rates_is_a_bound(tmp_path):
    def loss(cell):
        diverged = cell.parametrization == "simplep" and cell.granularity == 16 and cell.learning_rate > 2**-6
        return math.nan if diverged else loss_of_rule(cell)

    config, rows = compare(tmp_path, loss)
    first, other = rows["simplep"], rows["granular"]
    assert first.change_high == first.regret_high == math.inf
    assert (other.over_first_low, math.isfinite(other.over_first_high)) == (-math.inf, True)
    assert first.at_edge
    page = (tmp_path / "figure6/comparison.md").read_text()
    assert "own (not bracketed)" in page
    assert "\N{GREATER-THAN OR EQUAL TO} +" in page
    assert "\N{LESS-THAN OR EQUAL TO} " in page
    with drawing_style():
        figure = comparison.draw(config, "figure6", tmp_path)
    picture(figure, tmp_path)


def test_a_rule_may_have_a_name_that_mathtext_cannot_read(tmp_path):
    config, _ = compare(tmp_path)
    table = (tmp_path / "figure6/comparison.csv").read_text().replace("times G", "times $\\frac{G$")
    (tmp_path / "figure6/comparison.csv").write_text(table)
    with drawing_style():
        figure = comparison.draw(config, "figure6", tmp_path)
    picture(figure, tmp_path)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"figure": "granularity-rows", "panel": "sp"}, "names 'sp', which is not a panel of 'granularity-rows'"),
        ({"figure": "nothing", "panel": "sp"}, "names 'nothing', which `figures` does not list"),
        ({"figure": "experts-rows", "panel": "simplep"}, "compares .* which has another `curve`"),
        ({"figure": "figure2b", "panel": "simplep"}, "compares .* which has another `axes.width`"),
        ({"figure": "figure2a", "panel": "simplep"}, "must have the base 8 as its smallest value, and larger ones"),
    ],
)
def test_what_is_compared_is_checked(rule, sentence):
    document = plain(asdict(PRESET))
    document["comparisons"]["figure6"]["another"] = rule | {"source": ""}
    with pytest.raises(ConfigError, match=sentence):
        validate(document)


def test_a_comparison_of_nothing_is_refused():
    document = plain(asdict(PRESET)) | {"comparisons": {"figure6": {}}}
    with pytest.raises(ConfigError, match=r"`comparisons\.figure6` is empty"):
        validate(document)
