"""Training on a GPU compared with the CPU: eager, compiled and captured, in lockstep and alone.

Needs only torch, numpy, PyYAML and pytest. To run it without Snakemake and the rest: make gpu-check.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

from mup_moe.config.cell import Cell, LearningRate  # noqa: E402
from mup_moe.config.settings import ModelSettings, TrainingSettings  # noqa: E402
from mup_moe.model.metrics import METRICS  # noqa: E402
from mup_moe.ops.device import claim_device  # noqa: E402
from mup_moe.parametrization import parse_table  # noqa: E402
from mup_moe.training.device import precision_on  # noqa: E402
from mup_moe.training.request import TrainingRequest  # noqa: E402
from mup_moe.training.trainer import Outcome, Trainer  # noqa: E402

VOCABULARY = 97
CPU = torch.device("cpu")
LOSS = METRICS.index("train_loss")
# Metrics that rounding changes a little, and metrics that jump when a token goes to another expert.
SMOOTH = [METRICS.index(name) for name in ("train_loss", "z_loss", "gradient_norm")]
ROUTED = [METRICS.index(name) for name in ("balance_loss", "dropped_fraction", "max_expert_load")]
SHAPES: list[dict[str, Any]] = [
    {},
    {"architecture": "dense", "experts": 1},
    {"top_k": 2, "granularity": 2},
    {"capacity_factor": "dropless", "final_norm": True},
    {"gated": True, "activation": "silu", "norm": "rmsnorm", "positions": "rotary", "gates": "sigmoid", "top_k": 2},
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]


def make_request(**changes: Any) -> TrainingRequest:
    """Makes a small request from config.yaml, read without validation, since GPU machines may lack what that needs."""
    document = yaml.safe_load((ROOT / "config.yaml").read_text())
    setup = document["setups"]["small"]
    training = setup["training"] | {"adam_betas": tuple(setup["training"]["adam_betas"])}
    parts: dict[str, Any] = {
        "cell": Cell("small", "moe", "mup", 32, 8, 1, LearningRate("2^-6"), 0),
        "model": ModelSettings(**(setup["model"] | {"base_width": 16})),
        "training": replace(TrainingSettings(**training), steps=50, precision="float32", validation_batches=2),
    }
    for name, part in parts.items():
        mine = {key: changes.pop(key) for key in list(changes) if hasattr(part, key)}
        parts[name] = replace(part, **mine)
    assert not changes, f"no part of a request has {changes}"
    return TrainingRequest(
        **parts, parametrization=parse_table(document["parametrizations"])[parts["cell"].parametrization]
    )


@pytest.fixture(scope="module")
def gpu():
    with claim_device("cuda") as device:
        yield device


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    generator = np.random.default_rng(0)
    steps = generator.choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=50_000)
    return (np.cumsum(steps) % VOCABULARY).astype(np.uint16)


def trainer_of(tokens: np.ndarray, device: torch.device, step: str, *requests: TrainingRequest) -> Trainer:
    return Trainer(requests, tokens, tokens[:5000], VOCABULARY, device, step)


def outcomes_of(
    tokens: np.ndarray, device: torch.device, step: str, *requests: TrainingRequest
) -> tuple[Trainer, list[Outcome]]:
    trainer = trainer_of(tokens, device, step, *requests)
    trainer.run()
    return trainer, trainer.outcomes()


def assert_alike(found_TM: np.ndarray, expected_TM: np.ndarray) -> None:
    """Asserts that two histories differ only by rounding."""
    np.testing.assert_allclose(found_TM[:, SMOOTH], expected_TM[:, SMOOTH], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(found_TM[:, ROUTED], expected_TM[:, ROUTED], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("step", ["eager", "compiled", "graph"])
def test_float32_follows_the_cpu(tokens, gpu, changes, step):
    requests = [make_request(**changes, seed=seed, parametrization=rule) for seed, rule in ((0, "mup"), (1, "sp"))]
    _, expected = outcomes_of(tokens, CPU, "eager", *requests)
    _, found = outcomes_of(tokens, gpu, step, *requests)
    for ours, theirs in zip(found, expected, strict=True):
        # Rounding grows with the steps: compare the first ones closely, and the whole run only by its loss.
        assert_alike(ours.history_TM[:10], theirs.history_TM[:10])
        np.testing.assert_allclose(ours.history_TM[:, LOSS], theirs.history_TM[:, LOSS], rtol=2e-2)
        assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-2)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_bfloat16_follows_float32(tokens, gpu, changes):
    (_, (expected,)) = outcomes_of(tokens, gpu, "eager", make_request(**changes))
    (_, (found,)) = outcomes_of(tokens, gpu, "graph", make_request(**changes, precision="bfloat16"))
    assert found.train_loss == pytest.approx(expected.train_loss, rel=0.03)
    assert precision_on(gpu, make_request(precision="auto").training) == "bfloat16"


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("step", ["compiled", "graph"])
def test_a_replica_in_lockstep_equals_its_solo_run(tokens, gpu, changes, step):
    changes = changes | {"divergence_span": 0.1}
    requests = [
        make_request(**changes, learning_rate=LearningRate("2^-6"), seed=0),
        make_request(**changes, learning_rate=LearningRate(1e6), seed=1),
        make_request(**changes, learning_rate=LearningRate("2^-8"), seed=1, parametrization="sp"),
    ]
    _, together = outcomes_of(tokens, gpu, step, *requests)
    assert [outcome.status for outcome in together] == ["finished", "diverged", "finished"]
    for request, outcome in zip(requests, together, strict=True):
        _, (alone,) = outcomes_of(tokens, gpu, step, request)
        # A diverging cell amplifies rounding from its first update on.
        rows = slice(0, 10) if outcome.status == "finished" else slice(0, 1)
        assert_alike(outcome.history_TM[rows], alone.history_TM[rows])
        if outcome.status == "finished":
            assert outcome.train_loss == pytest.approx(alone.train_loss, rel=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", ["eager", "compiled", "graph"])
@pytest.mark.parametrize("stop", [1, 17, 20, 33])
def test_resuming_gives_the_same_bits(tokens, gpu, precision, step, stop):
    requests = [make_request(precision=precision, seed=seed) for seed in (0, 1)]
    _, whole = outcomes_of(tokens, gpu, step, *requests)
    part = trainer_of(tokens, gpu, step, *requests)
    part.run(stop)
    states = {replica: {n: t.cpu() for n, t in state.items()} for replica, state in part.states().items()}
    rest = trainer_of(tokens, gpu, step, *requests)
    rest.load_states(stop, list(states.values()))
    rest.run()
    for ours, theirs in zip(rest.outcomes(), whole, strict=True):
        np.testing.assert_array_equal(ours.history_TM, theirs.history_TM)
        assert ours.valid_loss == theirs.valid_loss


def test_captured_steps_never_wait_for_the_device(tokens, gpu):
    trainer = trainer_of(tokens, gpu, "graph", make_request(steps=40))
    trainer.run(22)
    # torch raises an error for anything that would wait for the device.
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer._stack.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_run_gives_the_same_bits(tokens, gpu):
    requests = [make_request(precision="bfloat16", seed=seed) for seed in (0, 1)]
    runs = [outcomes_of(tokens, gpu, "graph", *requests)[1] for _ in range(2)]
    for ours, theirs in zip(*runs, strict=True):
        np.testing.assert_array_equal(ours.history_TM, theirs.history_TM)


@pytest.mark.usefixtures("gpu")
def test_steps_can_be_captured_on_a_gpu_without_an_index(tokens):
    _, (outcome,) = outcomes_of(tokens, torch.device("cuda"), "graph", make_request())
    assert outcome.status == "finished"


def test_replicas_that_diverged_leave_the_graph(tokens, gpu):
    rates = [LearningRate(1e6), LearningRate(1e7), LearningRate("2^-6")]
    requests = [
        make_request(learning_rate=rate, divergence_span=0.1, seed=seed)
        for rate, seed in zip(rates, (0, 1, 1), strict=True)
    ]
    trainer, found = outcomes_of(tokens, gpu, "graph", *requests)
    assert [outcome.status for outcome in found] == ["diverged", "diverged", "finished"]
    assert trainer.model.replicas == 1
    _, (alone,) = outcomes_of(tokens, gpu, "graph", requests[2])
    assert_alike(found[2].history_TM[:10], alone.history_TM[:10])
