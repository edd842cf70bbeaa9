import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CONFIG, VOCABULARY, make_request, run_step, write_tokens
from mup_moe.analysis.runs import read_rows
from mup_moe.analysis.slopes import Slope, slopes
from mup_moe.analysis.transfer import regress
from mup_moe.config.settings import ProbeSettings
from mup_moe.model.layers import OBSERVED
from mup_moe.ops import probe
from mup_moe.training.probe import COVARIANCE, activations, covariance, measure, observe
from mup_moe.training.trainer import Trainer
from mup_moe.training.version import VERSION

CPU = torch.device("cpu")


def make_trainer(tokens, **changes) -> Trainer:
    return Trainer([make_request(**changes)], tokens, tokens[:2000], VOCABULARY, CPU)


def test_measuring_changes_nothing(tokens):
    measured, quiet = make_trainer(tokens), make_trainer(tokens)
    for step in (0, 3, 7):
        measured.run(until=step)
        observe(measured, measured.training_batch(0))
    measured.run()
    quiet.run()
    for name, tensor in quiet.states()[0].items():
        assert torch.equal(measured.states()[0][name], tensor), name


@pytest.mark.parametrize("granularity", [1, 2])
def test_the_gradient_of_a_gate_is_the_inner_product_of_expert_and_gradient(tokens, granularity):
    trainer = make_trainer(tokens, granularity=granularity)
    trainer.run(until=3)
    seen = observe(trainer, trainer.training_batch(0))
    values = covariance(seen, {path: tensor.detach() for path, tensor in seen.items()})
    for block in "01":
        layer = f"blocks.{block}"
        experts_RKND = seen[f"{layer}.feed_forward.expert_outputs"].detach()
        gradient_RND = seen[f"{layer}.feed_forward_output"].grad * experts_RKND.shape[2]
        inner_RKN = (experts_RKND * gradient_RND[:, None]).sum(-1)
        kept_RKN = seen[f"{layer}.feed_forward.gates"] != 0
        expected = inner_RKN[kept_RKN].square().mean().sqrt()
        assert values["inner product", block] == pytest.approx(float(expected), rel=1e-4)
        cosine_RKN = torch.cosine_similarity(experts_RKND, gradient_RND[:, None], dim=-1, eps=0)
        expected = cosine_RKN[kept_RKN].square().mean().sqrt()
        assert values["cosine", block] == pytest.approx(float(expected), rel=1e-4)
        assert values["router-logit change", block] == 0
    assert {quantity for quantity, _ in values} == set(COVARIANCE)


def test_the_gradient_of_router_logits_agrees_with_finite_differences(tokens):
    trainer = make_trainer(tokens, balance_loss=0.5, capacity_factor="dropless")
    batch = trainer.training_batch(0)
    seen = observe(trainer, batch)
    path = "blocks.1.feed_forward.logits"
    gradient = seen[path].grad
    flat = int(gradient.abs().argmax())
    tap = trainer.model.get_submodule(path)
    losses = []
    for nudge in (-1e-2, 1e-2):
        change = torch.zeros_like(gradient)
        change.view(-1)[flat] = nudge
        handle = tap.register_forward_hook(lambda _m, _i, output, change=change: output + change)
        with torch.no_grad():
            losses.append(float(trainer.losses(batch)["train_loss"]))
        handle.remove()
    assert (losses[1] - losses[0]) / 2e-2 == pytest.approx(float(gradient.view(-1)[flat]), rel=0.05)


def test_activations_are_measured_in_every_layer(tokens):
    trainer = make_trainer(tokens, width=64, base_width=64, experts=4, granularity=1, embedding_multiplier=3.0)
    seen = observe(trainer, trainer.training_batch(0))
    values = activations(seen)
    # Token and position have variance 1 each: the mean of |x| is sqrt(2 * 2 / pi), times the multiplier.
    assert values["embedding", ""] == pytest.approx(3 * math.sqrt(4 / math.pi), rel=0.05)
    logits = seen["logits"].detach()
    assert values["output logits", ""] == pytest.approx(float(logits.abs().mean()))
    assert {quantity for quantity, _ in values} == set(OBSERVED.values())
    assert {block for quantity, block in values if quantity == "attention"} == {"0", "1"}


@pytest.mark.parametrize(
    ("parametrization", "expected"), [("mup", -0.5), ("simplep", 0.0), ("sp", 0.0), ("experts-only", 0.5)]
)
def test_router_logits_at_initialization_follow_their_rule(tokens, parametrization, expected):
    rows = []
    corpus = SimpleNamespace(train=tokens, valid=tokens[:2000], vocabulary=VOCABULARY)
    for width in (8, 16, 32, 64, 128):
        for seed in range(3):
            request = make_request(parametrization=parametrization, width=width, base_width=8, seed=seed)
            for step, ((quantity, block), value) in measure(request, "covariance", [0], corpus, CPU):
                rows.append([parametrization, width, seed, step, quantity, block, value])
    table = pd.DataFrame(rows, columns=["parametrization", "width", "seed", "step", "quantity", "block", "value"])
    found = {(s.quantity, s.block): s for s in slopes(table, 0.95)}
    for block in "01":
        assert found["router logits", block].slope == pytest.approx(expected, abs=0.12)
        # Expert and gradient are independent at initialization.
        assert found["cosine", block].slope == pytest.approx(-0.5, abs=0.15)
        assert math.isnan(found["router-logit change", block].slope)
        assert found["router-logit change", block].points == 0


@pytest.fixture
def config():
    """A config with a probe of two tiny models per width."""
    request = make_request()
    setup = replace(CONFIG.setups["probe"], model=request.model, training=request.training)
    axes = replace(CONFIG.probes["lemma_b1"].axes, parametrization=("mup",), width=(8, 16, 32), seed=(0, 1))
    checked = ProbeSettings(
        setup="probe", measure="activations", steps=(0, 2), axes=replace(axes, experts=(request.cell.experts,))
    )
    drawn = CONFIG.probes | {"coordinate_check": checked}
    return replace(CONFIG, setups=CONFIG.setups | {"probe": setup}, probes=drawn)


@pytest.fixture
def probe_command(config, tokens, tmp_path):
    """Returns a function that runs a step of the pipeline on the probe of `config`, with its tokens."""
    folder = tmp_path / "data" / config.setups["probe"].corpus
    folder.mkdir(parents=True)
    write_tokens(folder, tokens)
    device = {"probe": ["--device", "cpu"]}
    return lambda step: run_step(step, "coordinate_check", *device.get(step, []), config=config, results=tmp_path)


def test_the_command_measures_everything_that_was_requested(config, probe_command, tmp_path):
    assert probe_command("probe") == 0
    values = tmp_path / "coordinate_check"
    table = pd.read_csv(values / "values.csv", dtype={"block": str})
    assert len(table) == 3 * 2 * 2 * (2 + 3 * 2)
    cells = [cell.id for cell in config.probes["coordinate_check"].cells()]
    assert sorted(json.loads((values / "values.json").read_text())["requests"]) == sorted(cells)
    assert probe_command("slopes") == 0
    found = read_rows(tmp_path / "coordinate_check.csv", Slope)
    assert found
    assert all(slope.points == slope.models == 6 for slope in found)


@pytest.mark.parametrize("version", [VERSION, VERSION + 1])
def test_a_killed_probe_measures_only_what_is_left(config, probe_command, tmp_path, monkeypatch, version):
    models = sorted(config.probes["coordinate_check"].cells(), key=lambda cell: cell.width)
    assert probe_command("probe") == 0
    values, kept = tmp_path / "coordinate_check/values.csv", tmp_path / "coordinate_check/measured.jsonl"
    whole = values.read_bytes()
    assert not kept.exists()
    values.unlink()
    measured = []

    def killed_at_the_fifth(request, *rest):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(request.cell)
        return measure(request, *rest)

    monkeypatch.setattr(probe, "measure", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        probe_command("probe")
    assert not values.exists()
    with kept.open("a") as file:
        file.write('damaged\n{"half a li')
    again = []
    monkeypatch.setattr(probe, "measure", lambda request, *rest: again.append(request.cell) or measure(request, *rest))
    # Another version of the training measures other values.
    monkeypatch.setattr(probe, "VERSION", version)
    assert probe_command("probe") == 0
    assert again == (models[4:] if version == VERSION else models)
    assert values.read_bytes() == whole


# ---------------------------------------------------------------- slopes


@settings(max_examples=50)
@given(st.floats(-2, 2), st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.booleans(), st.integers(0, 2**31))
def test_a_slope_and_its_interval_are_those_of_ordinary_least_squares(slope, intercepts, shared, noise_seed):
    from scipy import stats

    generator = np.random.default_rng(noise_seed)
    noise = generator.normal(0, 0.3, (3, 5))
    if shared:  # a deviation from the line that all seeds have in common
        noise = 0.1 * noise + generator.normal(0, 1, 5)
    points = [(s, float(x), slope * x + intercepts[s] + noise[s, x]) for s in range(3) for x in range(5)]
    found, interval = regress(points, 0.9)
    # The same model spelled out: a dummy per seed, and x.
    design = np.array([[*(seed == s for s in range(3)), x] for seed, x, _ in points], dtype=float)
    y = np.array([point[2] for point in points])
    solution, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(points) - 4
    error = math.sqrt(residual[0] / freedom * np.linalg.inv(design.T @ design)[3, 3])
    of_points = error * stats.t.ppf(0.95, freedom)
    means = stats.linregress(range(5), y.reshape(3, 5).mean(0))
    of_means = means.stderr * stats.t.ppf(0.95, 3)
    margin = max(of_points, of_means)
    assert found == pytest.approx(solution[3], abs=1e-9)
    assert (interval.low, interval.high) == (
        pytest.approx(solution[3] - margin, abs=1e-9),
        pytest.approx(solution[3] + margin, abs=1e-9),
    )


def test_more_seeds_do_not_shrink_a_deviation_that_they_share():
    bent = [0.0, 0.3, 0.1, 0.9]
    few, many = ([(s, float(x), bent[x] + 0.001 * s * x) for s in range(n) for x in range(4)] for n in (2, 40))
    intervals = [regress(points, 0.95)[1] for points in (few, many)]
    widths = [interval.high - interval.low for interval in intervals]
    assert widths[1] > 0.9 * widths[0]


def test_values_that_are_zero_or_not_finite_are_left_out_and_counted():
    values = [1.0, 2.0, 4.0, 0.0, math.nan, math.inf]
    table = pd.DataFrame(
        {"parametrization": "mup", "width": [2, 4, 8, 16, 32, 64], "seed": 0, "step": 1}
        | {"quantity": "logits", "block": "", "value": values}
    )
    (found,) = slopes(table, 0.95)
    assert found.slope == pytest.approx(1.0)
    assert (found.points, found.models) == (3, 6)
