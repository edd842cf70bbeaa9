"""The training step of a stack: losses, attention, lockstep, and no waiting for the host."""

import contextlib
import gc
import math
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import CONFIG, MODERN, VOCABULARY, make_request
from mup_moe.config.cell import AXES, Cell, LearningRate
from mup_moe.config.jobs import jobs
from mup_moe.config.optimizers import OPTIMIZERS, OptimizerEntry
from mup_moe.files import UserError
from mup_moe.model import operators, products
from mup_moe.model.attention import causal_attention
from mup_moe.model.inventory import ModelShape, size_of
from mup_moe.model.layers import weights_of
from mup_moe.model.metrics import METRICS
from mup_moe.model.operators import cross_entropy, linear_cross_entropy
from mup_moe.model.products import grouped_product, product
from mup_moe.model.scaling import factors
from mup_moe.training import optimizer
from mup_moe.training import stack as stack_module
from mup_moe.training.adamw import StackedAdamW
from mup_moe.training.device import indexed
from mup_moe.training.memory import memory_mb
from mup_moe.training.optimizer import StackedOptimizer
from mup_moe.training.stack import Stack
from mup_moe.training.trainer import BLOCK_STEPS, Trainer, learning_rate

CPU = torch.device("cpu")
DENSE = {"architecture": "dense", "experts": 1}
SHAPES = [{}, DENSE, {"top_k": 2, "width": 16}, {"granularity": 4, "experts": 8, "final_norm": True}, MODERN]
HOW = {"precision": "float32", "block_steps": BLOCK_STEPS}


def make_trainer(tokens, *requests, step_mode="eager"):
    return Trainer(requests, tokens, tokens[:2000], VOCABULARY, CPU, step_mode)


# ---------------------------------------------------------------- cross-entropy and attention, against torch's


@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]), rows=st.integers(1, 9))
@pytest.mark.parametrize("dense", [False, True])
def test_cross_entropy_and_its_gradient_equal_torchs(dense, seed, scale, rows):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, 11, generator=generator) * scale
    targets = torch.randint(0, 11, (2, rows), generator=generator)
    weights = torch.rand(2, rows, generator=generator)
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    losses = cross_entropy(mine, targets)
    expected = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="none").view(2, rows)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5 * max(scale, 1))
    with patch.object(operators, "prefers_dense", lambda _device: dense):
        (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_bfloat16_logits_is_float32_and_not_finite_where_they_are_not():
    logits = torch.randn(1, 5, 11).bfloat16()
    targets = torch.arange(5)[None]
    losses = cross_entropy(logits, targets)
    expected = F.cross_entropy(logits[0].float(), targets[0], reduction="none")
    torch.testing.assert_close(losses[0], expected, rtol=1e-6, atol=1e-6)
    assert not cross_entropy(torch.full((1, 1, 3), float("nan")), torch.zeros(1, 1, dtype=torch.long)).isfinite()


@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.0, 1.0, 1e3]),
    tokens=st.integers(1, 9),
    piece=st.sampled_from([1, 22, 50, 2**20]),
    by_numpy=st.booleans(),
)
def test_cross_entropy_in_pieces_equals_that_of_whole_logits(seed, scale, tokens, piece, by_numpy):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, tokens, 8, generator=generator), torch.randn(3, 8, 11, generator=generator) * scale
    targets = torch.randint(0, 11, (3, tokens), generator=generator)
    of_replica = torch.rand(3, generator=generator)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in (x, weight)] for _ in range(2))
    with (
        patch.multiple(operators, _CACHED=piece, _LEAST_ROWS=2),
        patch.object(products, "numpy_is_faster", lambda: by_numpy),
    ):
        mean, losses = linear_cross_entropy(*ours, targets)
        with torch.no_grad():
            unwatched = linear_cross_entropy(x, weight, targets)
    expected = cross_entropy(theirs[0] @ theirs[1], targets)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * max(scale, 1)}
    torch.testing.assert_close(losses, expected, **tolerance)
    torch.testing.assert_close((mean, losses), unwatched)
    torch.testing.assert_close(mean, expected.mean(1), **tolerance)
    assert not losses.requires_grad
    (mean * of_replica).sum().backward()
    (expected.mean(1) * of_replica).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **tolerance)


def test_cross_entropy_in_pieces_multiplies_in_the_precision_of_autocast():
    x, weight, targets = torch.randn(2, 6, 8), torch.randn(2, 8, 11), torch.randint(0, 11, (2, 6))
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in (x, weight)] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16), patch.multiple(operators, _CACHED=1, _LEAST_ROWS=6):
        mean, losses = linear_cross_entropy(*ours, targets)
        expected = cross_entropy(theirs[0] @ theirs[1], targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    mean.sum().backward()
    expected.mean(1).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-2, atol=1e-4)


@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    inputs=st.sampled_from([1, 3, 8]),
    outputs=st.sampled_from([1, 4, 5]),
)
def test_products_by_numpy_equal_torchs_with_their_gradients(seed, sizes, inputs, outputs):
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (
        torch.randn(sum(sizes), inputs, generator=generator),
        torch.randn(6, inputs, outputs, generator=generator),
    )
    # Layouts that occur: a part of longer rows, and swapped last axes.
    part = torch.randn(6, 7, inputs + 2, generator=generator)[..., 1:-1]
    turned = torch.randn(6, inputs, 7, generator=generator).mT
    ends = torch.tensor(sizes).cumsum(0)

    def run(x, times):
        mine, matrices = x.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()
        y = times(mine, matrices)
        (y.square().sum() + y.sum()).backward()
        return y, mine.grad, matrices.grad

    def each(x, matrices):
        return torch.cat([part @ matrix for part, matrix in zip(x.split(sizes), matrices, strict=True)])

    with patch.object(products, "numpy_is_faster", lambda: True):
        made = [run(x, product) for x in (part, turned)]
        made.append(run(rows, lambda x, matrices: grouped_product(x, matrices, ends)))
    wanted = [*(run(x, torch.matmul) for x in (part, turned)), run(rows, each)]
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def test_cross_entropy_refuses_a_second_backward_pass():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(1, 3, dtype=torch.long)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("positions", [1, 7, 64])
def test_attention_of_narrow_heads_equals_torchs(positions):
    generator = torch.Generator().manual_seed(positions)
    ours, theirs = (
        [torch.randn(3, 2, positions, 8, generator=generator.manual_seed(n)).requires_grad_() for n in range(3)]
        for _ in range(2)
    )
    mixed = causal_attention(*ours)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True, scale=1.0)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    mixed.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 7, 64])
def test_attention_in_bfloat16_follows_torchs_in_float32_and_is_causal(positions):
    generator = torch.Generator().manual_seed(positions)
    q, k, v = (torch.randn(3, 2, positions, 8, generator=generator).div(2).bfloat16() for _ in range(3))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mixed = causal_attention(q, k, v)
    wide = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True, scale=1.0)
    torch.testing.assert_close(mixed.float(), expected, rtol=2e-2, atol=2e-2)
    mixed.sum().backward()
    expected.sum().backward()
    for narrow, exact in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(narrow.grad.float(), exact.grad, rtol=5e-2, atol=1e-1)
    later = k.detach().clone()
    later[:, :, -1] += 5
    assert torch.equal(causal_attention(q, later, v)[:, :, :-1], mixed[:, :, :-1])


# ---------------------------------------------------------------- lockstep


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_a_replica_in_lockstep_equals_its_solo_run(tokens, changes):
    changes = changes | {"divergence_span": 5 / 50, "steps": 50}
    requests = [
        make_request(**changes, learning_rate=LearningRate("2^-6"), seed=0),
        make_request(**changes, learning_rate=LearningRate(1e6), seed=1),
        make_request(**changes, learning_rate=LearningRate("2^-8"), seed=1, parametrization="sp"),
        make_request(**changes, learning_rate=LearningRate("2^-7"), seed=0, parametrization="simplep"),
    ]
    together = make_trainer(tokens, *requests)
    together.run()
    outcomes = together.outcomes()
    assert [outcome.status for outcome in outcomes] == ["finished", "diverged", "finished", "finished"]
    for request, outcome in zip(requests, outcomes, strict=True):
        alone = make_trainer(tokens, request)
        alone.run()
        (expected,) = alone.outcomes()
        assert expected.status == outcome.status
        # A diverging cell amplifies rounding: only its first steps must agree.
        rows = slice(None) if expected.status == "finished" else slice(0, 2)
        np.testing.assert_allclose(outcome.history_TM[rows], expected.history_TM[rows], rtol=1e-3, atol=1e-4)
        if expected.status == "finished":
            assert outcome.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
            assert outcome.valid_loss == pytest.approx(expected.valid_loss, rel=1e-5)
    # The diverged replica no longer takes part.
    assert together.model.replicas == 3
    assert set(together.ended) == {1}
    assert set(together.states()) == {0, 2, 3}


@pytest.mark.parametrize("seeds", [(0, 1, 0), (0, 1, 1), (1, 0, 2)])
def test_remaining_replicas_keep_their_batches_when_another_leaves(tokens, seeds):
    rates = [LearningRate(1e6), LearningRate("2^-6"), LearningRate("2^-7")]
    requests = [
        make_request(steps=60, divergence_span=5 / 60, learning_rate=rate, seed=seed)
        for rate, seed in zip(rates, seeds, strict=True)
    ]
    together = make_trainer(tokens, *requests)
    together.run()
    assert set(together.ended) == {0}
    for request, outcome in zip(requests[1:], together.outcomes()[1:], strict=True):
        alone = make_trainer(tokens, request)
        alone.run()
        np.testing.assert_allclose(outcome.history_TM, alone.outcomes()[0].history_TM, rtol=1e-3, atol=1e-4)


def test_training_ends_when_all_replicas_have_diverged(tokens):
    rates = [LearningRate(1e6), LearningRate(1e7)]
    requests = [make_request(steps=200, divergence_span=5 / 200, learning_rate=rate) for rate in rates]
    trainer = make_trainer(tokens, *requests)
    trainer.run()
    assert trainer.step % BLOCK_STEPS == 0
    assert trainer.step < 200
    assert [outcome.status for outcome in trainer.outcomes()] == ["diverged", "diverged"]


def test_bfloat16_follows_float32(tokens):
    runs = {}
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(tokens, make_request(precision=precision, steps=60, width=16))
        trainer.run()
        runs[precision] = trainer.outcomes()[0]
    assert runs["bfloat16"].train_loss == pytest.approx(runs["float32"].train_loss, rel=0.02)
    assert not np.array_equal(runs["bfloat16"].history_TM, runs["float32"].history_TM)


def test_cells_of_different_shapes_are_not_trained_in_lockstep(tokens):
    with pytest.raises(ValueError, match="lockstep"):
        make_trainer(tokens, make_request(), make_request(width=16))


# ---------------------------------------------------------------- a step that compiles and never waits


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_losses_compile_as_one_graph_with_the_same_gradients(tokens, changes, precision):
    # All cases compile the same function, and torch stops recompiling it after a few.
    torch._dynamo.reset()
    requests = [make_request(**changes, precision=precision, seed=seed) for seed in (0, 1)]
    trainer = make_trainer(tokens, *requests)
    windows = trainer.training_batch(0)
    gradients = []
    for losses in (trainer.losses, torch.compile(trainer.losses, fullgraph=True, backend="aot_eager")):
        trainer.model.zero_grad()
        trainer.model.objective(losses(windows)).backward()
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    for name, gradient in gradients[0].items():
        tolerance = 1e-5 if precision == "float32" else 2e-2
        torch.testing.assert_close(gradients[1][name], gradient, rtol=tolerance, atol=tolerance)


def test_a_compiled_run_equals_the_eager_one(tokens):
    requests = [make_request(learning_rate=LearningRate(rate)) for rate in ("2^-6", "2^-7")]
    eager, compiled = (make_trainer(tokens, *requests, step_mode=mode) for mode in ("eager", "compiled"))
    for trainer in (eager, compiled):
        trainer.run()
    for ours, theirs in zip(compiled.outcomes(), eager.outcomes(), strict=True):
        np.testing.assert_allclose(ours.history_TM, theirs.history_TM, rtol=1e-3, atol=1e-4)
        assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-4)


class Operators(TorchDispatchMode):
    """Records the name of every operator that runs and the devices of the tensors that it makes."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = [], set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        self.names.append(function.overloadpacket._qualified_op_name)
        self.devices |= {tensor.device.type for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)}
        return made


def step_on(device, monkeypatch, **changes):
    """Runs a step of two seeds on a device; returns its operators. Meta tensors take the same path as GPU tensors."""
    # autocast does not support meta tensors.
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: contextlib.nullcontext())
    requests = [make_request(**changes, seed=seed) for seed in (0, 1, 1)]
    shape = ModelShape.of(requests[0].cell, requests[0].model, VOCABULARY)
    stack = Stack(
        requests,
        shape,
        torch.device(device),
        precision="float32",
        step_mode="eager",
        seeds=[0, 1],
        block_steps=BLOCK_STEPS,
    )
    settings = requests[0].training
    windows = torch.zeros(BLOCK_STEPS, 2, settings.batch_size, requests[0].model.sequence + 1, dtype=torch.long)
    stack.load_block(windows, torch.ones(BLOCK_STEPS), 0)
    with Operators() as seen:
        stack.advance()
    return seen


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_a_step_stays_on_its_device_and_reads_no_value(changes, monkeypatch):
    # Meta tensors have no values to read and do not mix with others: a step that runs on them can be captured.
    assert step_on("meta", monkeypatch, **changes).devices == {"meta"}


# Operators that a GPU runs in several launches or in no fixed order.
SLOW_ON_A_GPU = re.compile(
    r"\bsort|topk|scatter|index_put|index_add|index_copy|embedding_dense_backward|nonzero|unique"
)


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_a_step_on_a_gpu_neither_sorts_nor_scatters(changes, monkeypatch):
    slow = {
        device: [name for name in step_on(device, monkeypatch, **changes).names if SLOW_ON_A_GPU.search(name)]
        for device in ("meta", "cpu")
    }
    assert slow["meta"] == []
    assert slow["cpu"], "the pattern must find the slow operators of the CPU's path"


@pytest.mark.parametrize("changes", [*SHAPES, {"clip_norm": None, "weight_decay": 0.3}], ids=str)
def test_the_gpu_path_gives_the_numbers_of_the_cpu_path(tokens, changes, monkeypatch):
    requests = [
        make_request(**{"width": 16} | changes, seed=seed, learning_rate=LearningRate(rate), parametrization=rules)
        for seed, rate, rules in ((0, "2^-6", "mup"), (1, "2^-7", "sp"), (0, "2^-5", "simplep"))
    ]
    runs = []
    for dense in (False, True):
        monkeypatch.setattr(operators, "prefers_dense", lambda _device, dense=dense: dense)
        trainer = make_trainer(tokens, *requests)
        trainer.run()
        runs.append(trainer)
    for ours, theirs in zip(*(trainer.outcomes() for trainer in runs), strict=True):
        np.testing.assert_allclose(ours.history_TM, theirs.history_TM, rtol=1e-5, atol=1e-5)
        assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-5)


def test_a_run_resumes_to_the_bit_on_the_gpu_path(tokens, monkeypatch):
    monkeypatch.setattr(operators, "prefers_dense", lambda _device: True)
    requests = [make_request(seed=seed) for seed in (0, 1)]
    whole, part, rest = (make_trainer(tokens, *requests) for _ in range(3))
    whole.run()
    part.run(7)
    rest.load_states(7, list(part.states().values()))
    rest.run()
    for ours, theirs in zip(rest.outcomes(), whole.outcomes(), strict=True):
        np.testing.assert_array_equal(ours.history_TM, theirs.history_TM)


@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 4),
    clip=st.sampled_from([None, 0.5]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.95)]),
)
@settings(max_examples=30)
def test_the_stacked_update_equals_torchs_adamw_for_each_replica(seed, steps, clip, betas):
    generator = torch.Generator().manual_seed(seed)
    rates, decays = torch.rand(2, 2, 3, generator=generator)
    start = [torch.randn(3, 5, generator=generator), torch.randn(3, 2, 4, generator=generator)]
    gradients = [[torch.randn(t.shape, generator=generator) for t in start] for _ in range(steps)]
    how = replace(make_request().training, clip_norm=clip, adam_betas=betas)
    stacked = [tensor.clone() for tensor in start]
    states = [{name: torch.zeros_like(tensor) for name in ("exp_avg", "exp_avg_sq")} for tensor in start]
    taken = torch.zeros(())
    update = StackedAdamW.update
    norms = [optimizer._clip_and_update(update, stacked, g, states, rates, decays, taken, how) for g in gradients]
    for replica in range(3):
        alone = [nn.Parameter(tensor[replica].clone()) for tensor in start]
        groups = [
            {"params": [parameter], "lr": float(rates[row, replica]), "weight_decay": float(decays[row, replica])}
            for row, parameter in enumerate(alone)
        ]
        torchs = torch.optim.AdamW(groups, betas=betas, eps=how.adam_eps)
        for step, gradient in enumerate(gradients):
            for parameter, whole in zip(alone, gradient, strict=True):
                parameter.grad = whole[replica].clone()
            norm = torch.nn.utils.clip_grad_norm_(alone, clip if clip is not None else math.inf)
            torch.testing.assert_close(norms[step][replica], norm)
            torchs.step()
        for ours, theirs in zip(stacked, alone, strict=True):
            torch.testing.assert_close(ours[replica], theirs.detach(), rtol=1e-5, atol=1e-6)


class Lion(StackedOptimizer):
    """Lion (Chen et al., 2023, algorithm 2), as an example of an added optimizer."""

    @staticmethod
    def update(tensor, gradient, state, rate, decay, taken, settings):  # noqa: ARG004
        """See `StackedOptimizer`."""
        beta1, beta2 = settings.adam_betas
        step = torch.lerp(gradient, state["momentum"], beta1).sign()
        tensor.mul_(1 - rate * decay).sub_(rate * step)
        state["momentum"].lerp_(gradient, 1 - beta2)


@pytest.fixture
def lion(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lion", OptimizerEntry(state=("momentum",), made_by=f"{__name__}:Lion"))


@pytest.mark.usefixtures("lion")
def test_another_optimizer_takes_a_class_and_a_line_of_the_registry(tokens):
    changes = {"optimizer": "lion", "steps": BLOCK_STEPS + 7, "width": 16}
    requests = [
        make_request(learning_rate=LearningRate(rate), parametrization=rules, **changes)
        for rate, rules in (("2^-9", "mup"), ("2^-8", "sp"))
    ]
    whole, first, rest = (make_trainer(tokens, *requests) for _ in range(3))
    whole.run()
    first.run(until=BLOCK_STEPS + 3)
    rest.load_states(BLOCK_STEPS + 3, list(first.states().values()))
    rest.run()
    for ours, theirs in zip(rest.outcomes(), whole.outcomes(), strict=True):
        np.testing.assert_array_equal(ours.history_TM, theirs.history_TM)
        assert ours.history_TM[-1, 0] < ours.history_TM[0, 0]
    names = {name.partition("/")[0] for name in whole.states()[0]}
    assert names == {"parameter", "momentum", "history"}
    # Every entry moves by the tensor's own learning rate.
    alone = make_trainer(tokens, *requests)
    before = [weight.value.detach().clone() for weight in weights_of(alone.model).values()]
    alone.run(until=1)
    shape = ModelShape.of(requests[0].cell, requests[0].model, VOCABULARY)
    base = ModelShape.base_of(requests[0].cell, requests[0].model, VOCABULARY)
    for replica, request in enumerate(requests):
        table = factors(request.parametrization, shape, base, request.model)
        for (name, weight), old in zip(weights_of(alone.model).items(), before, strict=True):
            rate = learning_rate(request, 0) * table[name].lr
            kept = 1 - rate * request.training.weight_decay * table[name].weight_decay
            moved = (weight.value[replica] - old[replica] * kept).detach().abs()
            assert ((moved - rate).abs().lt(1e-5) | moved.lt(1e-6)).all(), name


@pytest.mark.usefixtures("lion")
def test_the_memory_estimate_follows_the_state_of_the_optimizer():
    large = {"width": 512, "experts": 32}
    adamw, lion = make_request(**large), make_request(optimizer="lion", **large)
    parameters = size_of(lion.cell, lion.model, VOCABULARY).parameters
    for device, copies in {"cpu": 4, "cuda": 3}.items():
        mb = [memory_mb([request], VOCABULARY, device, "1") for request in (adamw, lion)]
        # 4 bytes per parameter, and a quarter more as a margin.
        assert mb[0] - mb[1] == pytest.approx(1.25 * copies * 4 * parameters / 1e6, abs=1)
    with pytest.raises(ValueError, match="`optimizer` is 'muon' but must be one of adamw, lion"):
        make_request(optimizer="muon")


def test_the_initial_weights_of_a_seed_are_drawn_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(torch, "randn", lambda *args, randn=torch.randn, **how: drawn.append(1) or randn(*args, **how))
    requests = [
        make_request(seed=seed, learning_rate=LearningRate(rate)) for seed in (0, 1) for rate in ("2^-6", "2^-7")
    ]
    shape = ModelShape.of(requests[0].cell, requests[0].model, VOCABULARY)
    stack = Stack(requests, shape, CPU, step_mode="eager", seeds=[0, 1], **HOW)
    random = [weight for weight in weights_of(stack.model).values() if weight.spec.fill is None]
    assert len(drawn) == 2 * len(random)
    for weight in random:
        assert torch.equal(weight.value[0], weight.value[1])
        assert not torch.equal(weight.value[0], weight.value[2])


# ---------------------------------------------------------------- when a step mode is not available


class BrokenError(RuntimeError):
    """Raised by a compiler without its tools."""


@pytest.fixture
def broken_compiler(monkeypatch):
    def fail(*_args):
        raise BrokenError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(torch, "compile", lambda _function, **_options: fail)


@pytest.mark.usefixtures("broken_compiler")
def test_without_a_compiler_a_step_falls_back_to_eager_and_says_so(tokens, capsys):
    requests = [make_request(seed=seed) for seed in (0, 1)]
    fallen = Trainer(requests, tokens, tokens[:2000], VOCABULARY, CPU, "compiled", may_fall_back=True)
    eager = make_trainer(tokens, *requests)
    for trainer in (fallen, eager):
        trainer.run()
    assert fallen.step_mode == "eager"
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "cannot be compiled here (BrokenError: Failed to find C compiler. Please specify one.)" in said[0]
    for ours, theirs in zip(fallen.outcomes(), eager.outcomes(), strict=True):
        np.testing.assert_array_equal(ours.history_TM, theirs.history_TM)


@pytest.mark.usefixtures("broken_compiler")
def test_a_requested_compiled_step_fails_in_one_sentence_without_a_compiler(tokens):
    with pytest.raises(UserError, match=r"cannot be compiled here .*install a C\+\+ compiler") as caught:
        make_trainer(tokens, make_request(), step_mode="compiled").run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: lost"), RuntimeError),
    ],
)
def test_neither_memory_nor_a_lost_gpu_is_mistaken_for_a_broken_compiler(tokens, error, kind, monkeypatch):
    def fail(*_args):
        raise ValueError("in the compiler") from error

    def fail_plainly(*_args):
        raise error

    failing = fail if kind is torch.OutOfMemoryError else fail_plainly
    monkeypatch.setattr(torch, "compile", lambda _function, **_options: failing)
    with pytest.raises(kind, match=r"in the compiler|lost"):
        Trainer([make_request()], tokens, tokens, VOCABULARY, CPU, "compiled", may_fall_back=True).run()


class NoGraph(contextlib.nullcontext):
    """A capture that fails and, like torch's, runs nothing."""

    def __init__(self, *_args, **_options):
        super().__init__()

    def __enter__(self):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("auto", [True, False])
def test_a_step_that_cannot_be_captured_is_compiled(tokens, auto, monkeypatch, capsys):
    # Imitate a GPU on a CPU: streams that do nothing, a compiler that changes nothing.
    stream = SimpleNamespace(wait_stream=lambda _other: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_args: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", NoGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    left = []
    monkeypatch.setattr(torch.cuda, "set_stream", lambda to: left.append(to is stream))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *where: left.append(where), raising=False)
    trainer = Trainer([make_request()], tokens, tokens[:2000], VOCABULARY, CPU, "graph", may_fall_back=auto)
    if not auto:
        with pytest.raises(UserError, match="cannot be captured as a CUDA graph here"):
            trainer.run()
        return
    trainer.run()
    assert left == [True, (0, (0, 1))], "stream and memory must be those from before the capture"
    assert trainer.step_mode == "compiled"
    assert "it is compiled instead" in capsys.readouterr().err


def test_an_operator_without_a_deterministic_kernel_is_used_anyway(tokens, monkeypatch, capsys):
    losses, tried = Stack.losses, []

    def refuse(self, *args):
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            tried.append(1)
            raise RuntimeError("some_cuda does not have a deterministic implementation, but you set ...")
        return losses(self, *args)

    monkeypatch.setattr(Stack, "losses", refuse)
    torch.use_deterministic_algorithms(True)
    try:
        trainer = make_trainer(tokens, make_request())
        trainer.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(tried) == 1
    assert trainer.step == trainer.settings.steps
    assert "will differ in their last bits" in capsys.readouterr().err


def test_validation_that_does_not_fit_is_done_in_parts(tokens, monkeypatch):
    requests = [
        make_request(seed=seed, width=16, parametrization=rules) for seed, rules in ((0, "mup"), (1, "sp"), (2, "mup"))
    ]
    trainers = [make_trainer(tokens, *requests) for _ in range(2)]
    for trainer in trainers:
        trainer.run()
    expected = trainers[0].outcomes()
    losses, seen = Stack.losses, []

    def small_memory(self, windows, places=None):
        seen.append(len(windows))
        if len(windows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, windows, places)

    monkeypatch.setattr(Stack, "losses", small_memory)
    for ours, theirs in zip(trainers[1].outcomes(), expected, strict=True):
        assert ours.valid_loss == pytest.approx(theirs.valid_loss, rel=1e-6)
    assert seen[0] == 3
    monkeypatch.setattr(Stack, "losses", lambda *_args: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        trainers[1].outcomes()


def test_a_captured_graph_is_released_before_validation(tokens, monkeypatch):
    trainer = make_trainer(tokens, make_request())
    trainer.run()
    trainer._stack._graph = object()
    losses, held = Stack.losses, []
    monkeypatch.setattr(Stack, "losses", lambda self, *args: held.append(self._graph) or losses(self, *args))
    trainer.outcomes()
    assert set(held) == {None}


def test_an_unused_stack_releases_its_memory_at_once():
    request = make_request()
    shape = ModelShape.of(request.cell, request.model, VOCABULARY)
    gc.disable()
    try:
        stack = Stack([request], shape, CPU, step_mode="eager", seeds=[0], **HOW)
        model = weakref.ref(stack.model)
        del stack
        assert model() is None
    finally:
        gc.enable()


def test_a_gpu_without_an_index_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert indexed(torch.device("cuda")) == torch.device("cuda", 3)
    assert indexed(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert indexed(CPU) == CPU
    # A stack puts its tensors on that GPU, whichever way its device is named.
    default = []
    monkeypatch.setattr(stack_module, "build", lambda *_args: default.append(torch.get_default_device()))
    request = make_request()
    shape = ModelShape.of(request.cell, request.model, VOCABULARY)
    with pytest.raises(AttributeError):  # the model is None
        Stack(
            [request],
            shape,
            torch.device("cuda"),
            precision="float32",
            step_mode="graph",
            seeds=[0],
            block_steps=BLOCK_STEPS,
        )
    assert default == [torch.device("cuda", 3)]


# ---------------------------------------------------------------- jobs: which cells share a process


def cells_over(**axes):
    figure = CONFIG.figures["figure1"]
    return [cell for cell in figure.cells() if all(getattr(cell, axis) in values for axis, values in axes.items())]


figures = st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from(cells_over()), unique=True), max_size=3)
shared = st.sets(st.sampled_from(["learning_rate", "seed", "parametrization"]))


@given(figures=figures, lockstep=shared)
def test_every_cell_is_in_one_job_with_cells_of_its_shape_and_its_figures(figures, lockstep):
    found = jobs(figures, lockstep)
    # The jobs and their names do not depend on the order of the figures; only the order of the jobs follows it.
    assert jobs(dict(reversed(figures.items())), lockstep) == found
    first = [next(name for name in figures if set(cells) & set(figures[name])) for cells in found.values()]
    assert first == sorted(first, key=list(figures).index)
    placed = [cell for cells in found.values() for cell in cells]
    assert len(placed) == len(set(placed))
    assert set(placed) == {cell for cells in figures.values() for cell in cells}
    for cells in found.values():
        for cell in cells:
            assert all(getattr(cell, axis) == getattr(cells[0], axis) for axis in AXES if axis not in lockstep)
            assert [name for name in figures if cell in figures[name]] == [
                name for name in figures if cells[0] in figures[name]
            ]
    # There are as few jobs as that allows.
    keys = {(cell.name(without=lockstep), tuple(name for name in figures if cell in figures[name])) for cell in placed}
    assert len(found) == len(keys)


@given(figures=figures, lockstep=shared.filter(bool), least=st.integers(1, 20))
def test_jobs_put_together_have_enough_cells_of_one_row_and_the_same_figures(figures, lockstep, least):
    curves, found = jobs(figures, lockstep), jobs(figures, lockstep, least)
    assert sorted(cell for cells in found.values() for cell in cells) == sorted(
        cell for cells in curves.values() for cell in cells
    )

    def alike(cells):
        rows = {cell.parametrization for cell in cells} if "parametrization" not in lockstep else {""}
        return {(row, tuple(name for name in figures if cell in figures[name])) for cell in cells for row in rows}

    for cells in found.values():
        assert len(alike(cells)) == 1
    # A job with too few cells has no other job left to join.
    for cells in found.values():
        others = [other for other in found.values() if other is not cells and alike(other) == alike(cells)]
        assert len(cells) >= least or not others
    # A curve is never split.
    for curve in curves.values():
        assert sum(set(curve) <= set(cells) for cells in found.values()) == 1


@given(figures=figures, lockstep=shared, least=st.integers(1, 6), most=st.integers(6, 8))
def test_no_job_has_more_cells_than_a_process_takes(figures, lockstep, least, most):
    # The curves drawn here are short, so use a small limit that splits them.
    with patch("mup_moe.config.jobs.MOST_CELLS_PER_JOB", most):
        found = jobs(figures, lockstep, least)
        assert jobs(dict(reversed(figures.items())), lockstep, least) == found
    placed = sorted(cell for cells in found.values() for cell in cells)
    assert placed == sorted({cell for cells in figures.values() for cell in cells})
    assert all(1 <= len(cells) <= most for cells in found.values())
    whole = jobs(figures, lockstep)
    if all(len(cells) <= most for cells in whole.values()) and least == 1:
        assert found == whole


def test_a_long_curve_is_split_evenly_and_an_added_seed_joins_the_last_part():
    figure = CONFIG.figures["figure1"]
    axes = replace(figure.axes, parametrization=("mup",), width=(32,))

    def curve(seeds):
        return jobs(
            {"a": replace(figure, axes=replace(axes, seed=tuple(range(seeds)))).cells()}, ["learning_rate", "seed"]
        )

    rates = len(axes.learning_rate)
    found, later = curve(180), curve(181)
    assert [len(cells) for cells in found.values()] == [180 * rates // 3] * 3
    name = "mixtral_moe_mup_w32_e8_g1"
    assert list(found) == list(later) == [name, f"{name}~2", f"{name}~3"]
    new = [job for job, cells in later.items() if any(cell.seed == 180 for cell in cells)]
    assert new == [f"{name}~3"]


def test_jobs_are_named_after_what_their_cells_share():
    cells = cells_over(parametrization=["mup"], width=[32, 64])
    found = jobs({"a": cells, "b": cells[:2]}, ["learning_rate", "seed"])
    assert list(found) == ["mixtral_moe_mup_w32_e8_g1", "mixtral_moe_mup_w32_e8_g1~2", "mixtral_moe_mup_w64_e8_g1"]
    assert all(isinstance(cell, Cell) for cells in found.values() for cell in cells)
    assert list(jobs({"a": cells}, ["learning_rate", "seed"], 12)) == ["mixtral_moe_mup_e8_g1"]
    assert len(jobs({"a": cells}, [])) == len(cells)
    assert math.prod(len(cells) for cells in jobs({"a": cells}, AXES[:1] + AXES[2:]).values()) > 1


def test_metrics_are_finite_at_every_step(tokens):
    trainer = make_trainer(tokens, make_request(steps=47), make_request(steps=47, seed=3))
    trainer.run(33)
    trainer.run()
    for outcome in trainer.outcomes():
        assert outcome.history_TM.shape == (47, len(METRICS))
        assert np.isfinite(outcome.history_TM).all()
        assert (outcome.history_TM[:, METRICS.index("gradient_norm")] > 0).all()
