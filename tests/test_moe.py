"""The MoE layer compared with a per-token loop and with transformers, and its own invariants."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from conftest import MODERN, VOCABULARY, make_request
from mup_moe.config.settings import DROPLESS
from mup_moe.model import operators, products
from mup_moe.model.dispatch import assign_rows, capacity, combine, dispatch, gather_outputs
from mup_moe.model.inventory import ModelShape, model_size
from mup_moe.model.layers import weights_of
from mup_moe.model.metrics import balance, dropped, max_load, router_z
from mup_moe.model.moe import MoE, Routed
from mup_moe.model.operators import lookup
from mup_moe.model.router import choose


def route(logits_RNE: torch.Tensor, top_k: int, rows: int, ragged: bool = False, **how) -> Routed:
    choice = choose(logits_RNE, top_k, **how)
    return Routed(choice, assign_rows(choice, rows, ragged))


def make_layer(replicas: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> MoE:
    request = make_request(**changes)
    layer = MoE(ModelShape.of(request.cell, request.model, VOCABULARY), request.model, replicas).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights_of(layer).values():
            weight.value.copy_(torch.randn(weight.value.shape, generator=generator, dtype=torch.float64) / 2)
    return layer


activation_of = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}


def naive(layer: MoE, x_ND: torch.Tensor, replica: int) -> torch.Tensor:
    """Computes the layer token by token, as the paper describes it; [N, D] to [N, D]."""
    router, up, down = (w.value[replica] for w in (layer.router, layer.up, layer.down))
    gate = None if layer.gate is None else layer.gate.value[replica]
    activation = activation_of[layer.settings.activation]

    def feed_forward(x, expert):
        if gate is None:
            return activation(x @ up[expert]) @ down[expert]
        return (activation(x @ gate[expert]) * (x @ up[expert])) @ down[expert]

    slots = capacity(len(x_ND), layer.shape, layer.settings.capacity_factor)
    score = {
        "softmax": lambda logits: torch.softmax(logits, -1),
        "sigmoid": lambda logits: 1 / (1 + torch.exp(-logits)),
    }
    score["sqrt"] = score["softmax"]
    scores = [score[layer.settings.gates](x @ router) for x in x_ND]
    ranked = [torch.argsort(s, descending=True)[: layer.shape.active_experts].tolist() for s in scores]
    taken = [0] * layer.shape.total_experts
    outputs = [torch.zeros_like(x) for x in x_ND]
    for k in range(layer.shape.active_experts):
        for n, x in enumerate(x_ND):
            expert = ranked[n][k]
            if taken[expert] == slots:
                continue
            taken[expert] += 1
            weight = scores[n][expert]
            if layer.settings.renormalize_gates:
                weight = weight / sum(scores[n][e] for e in ranked[n])
            if layer.settings.gates == "sqrt":
                weight = weight**0.5
            outputs[n] = outputs[n] + weight * feed_forward(x, expert)
    return torch.stack(outputs)


VARIANTS = [
    {},
    {"capacity_factor": 0.5},
    {"capacity_factor": DROPLESS},
    {"top_k": 2, "capacity_factor": 1.25},
    {"top_k": 2, "granularity": 2, "renormalize_gates": True},
    {"granularity": 4, "activation": "gelu", "experts": 2},
    {"experts": 1, "activation": "silu"},
    {"gated": True, "activation": "silu"},
    {"gated": True, "granularity": 2, "top_k": 2},
    {"gates": "sigmoid"},
    {"gates": "sigmoid", "top_k": 2, "renormalize_gates": True, "capacity_factor": DROPLESS},
    {"gates": "sqrt", "top_k": 2, "granularity": 2, "renormalize_gates": True},
    {"fixed_sparsity": True, "top_k": 1, "experts": 8, "capacity_factor": 1.5},
    MODERN,
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("how", ["padded, float64", "ragged, by torch", "ragged, by numpy"])
def test_layer_equals_a_loop_over_tokens_forward_and_backward(changes, replicas, how, monkeypatch):
    exact = how.endswith("float64")
    monkeypatch.setattr(products, "numpy_is_faster", lambda: how.endswith("numpy"))
    dtype = torch.float64 if exact else torch.float32
    layer = make_layer(replicas, dtype=dtype, **changes)
    x_RND = torch.randn(replicas, 24, 8, dtype=dtype, requires_grad=True)
    upstream_RND = torch.randn_like(x_RND)

    def gradients(y_RND):
        return torch.autograd.grad((y_RND * upstream_RND).sum(), [x_RND, *layer.parameters()])

    y_RND, _ = layer(x_RND)
    expected_RND = torch.stack([naive(layer, x_RND[r], r) for r in range(replicas)])
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(y_RND, expected_RND, **tolerance)
    for ours, theirs in zip(gradients(y_RND), gradients(expected_RND), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    factor=st.one_of(st.just(DROPLESS), st.floats(0.1, 3)),
    seed=st.integers(0, 2**31),
    ragged=st.booleans(),
)
@settings(max_examples=200)
def test_rows_are_filled_in_order_and_never_twice(tokens, experts, top_k, factor, seed, ragged):
    top_k = min(top_k, experts)
    request = make_request(experts=experts, top_k=top_k, capacity_factor=factor, granularity=1)
    rows = capacity(tokens, ModelShape.of(request.cell, request.model, VOCABULARY), factor)
    logits = torch.randn(2, tokens, experts, generator=torch.Generator().manual_seed(seed)) * 3
    routed = route(logits, top_k, rows, ragged)
    routing = routed.routing
    chosen = logits.softmax(-1).topk(top_k).indices
    # For each replica and expert in turn, the assignments that get a row.
    queues = [
        [r * top_k * tokens + k * tokens + n for k in range(top_k) for n in range(tokens) if chosen[r, n, k] == expert][
            :rows
        ]
        for r in range(2)
        for expert in range(experts)
    ]
    ends = [rows * (g + 1) for g in range(2 * experts)] if routing.ends_G is None else routing.ends_G.tolist()
    starts = [0, *ends[:-1]]
    filled = torch.ones(ends[-1], dtype=torch.bool) if routing.filled_M is None else routing.filled_M
    assert ragged == (routing.filled_M is None) == (routing.ends_G is not None)
    seated = [
        routing.assignment_M[start:end][filled[start:end]].tolist() for start, end in zip(starts, ends, strict=True)
    ]
    assert seated == queues
    kept = sorted(assignment for queue in queues for assignment in queue)
    assert routing.kept_RKN.flatten().nonzero().flatten().tolist() == kept
    for start, queue in zip(starts, queues, strict=True):
        for position, assignment in enumerate(queue):
            assert routing.row_RKN.flatten()[assignment] == start + position
    assert dropped(routed).mean() == pytest.approx(1 - len(kept) / (2 * top_k * tokens), abs=1e-6)
    if factor == DROPLESS:
        assert routing.kept_RKN.all()


@pytest.mark.parametrize("ragged", [False, True])
def test_dispatch_then_combine_is_the_gated_identity(ragged):
    x_RND = torch.randn(2, 30, 4)
    routing = route(torch.randn(2, 30, 5), 2, 30, ragged).routing
    expected = x_RND * routing.gates_RKN.sum(1)[..., None]
    torch.testing.assert_close(combine(gather_outputs(dispatch(x_RND, routing), routing), routing.gates_RKN), expected)


@pytest.mark.parametrize("width", [8, 24])
def test_the_layer_with_mixtrals_settings_equals_mixtrals(width):
    request = make_request(width=width, **MODERN | {"gates": "softmax", "capacity_factor": DROPLESS})
    # In float32, the rounding of large sums can exceed any meaningful tolerance.
    layer = MoE(ModelShape.of(request.cell, request.model, VOCABULARY), request.model, 1).double()
    mixtral = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_local_experts=4,
            num_experts_per_tok=2,
            hidden_act="silu",
            experts_implementation="eager",
        )
    ).double()
    with torch.no_grad():
        for weight in weights_of(layer).values():
            weight.value.normal_()
        mixtral.gate.weight.copy_(layer.router.value[0].T)
        mixtral.experts.gate_up_proj.copy_(torch.cat([layer.gate.value[0], layer.up.value[0]], -1).mT)
        mixtral.experts.down_proj.copy_(layer.down.value[0].mT)
    x_RND = torch.randn(1, 20, width, dtype=torch.float64)
    torch.testing.assert_close(layer(x_RND)[0], mixtral(x_RND), rtol=1e-4, atol=1e-4)


def test_sigmoid_gates_are_balanced_by_their_shares():
    logits_NE = torch.randn(50, 6, dtype=torch.float64) * 2
    routed = route(logits_NE[None], 2, 50, gates="sigmoid")
    # DeepSeek-V3, eqs. 17 to 20: the sum over experts of f_i P_i.
    scores_NE = 1 / (1 + torch.exp(-logits_NE))
    chosen = scores_NE.argsort(-1, descending=True)[:, :2]
    f = [6 / (2 * 50) * (chosen == expert).sum() for expert in range(6)]
    p = [(scores_NE[:, expert] / scores_NE.sum(-1)).mean() for expert in range(6)]
    torch.testing.assert_close(balance(routed)[0], sum(a * b for a, b in zip(f, p, strict=True)), check_dtype=False)
    assert balance(route(torch.zeros(1, 20, 4), 4, 20, gates="sigmoid")).item() == pytest.approx(1)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_losses_equal_those_of_transformers(top_k):
    logits_NE = torch.randn(50, 6) * 2
    routed = route(logits_NE[None], top_k, 50)
    # Mixtral's balance loss sums over a token's experts; ours averages.
    theirs = load_balancing_loss_func((logits_NE,), num_experts=6, top_k=top_k) / top_k
    torch.testing.assert_close(balance(routed)[0], theirs)
    torch.testing.assert_close(router_z(routed)[0], router_z_loss_func(logits_NE[None]))


def test_balance_is_one_when_balanced_and_experts_when_collapsed():
    balanced = torch.eye(4).repeat(5, 1)[None] * 1e-3
    collapsed = torch.tensor([100.0, 0, 0, 0]).expand(1, 20, 4)
    assert balance(route(balanced, 1, 20)).item() == pytest.approx(1, abs=1e-4)
    assert balance(route(collapsed, 1, 20)).item() == pytest.approx(4)
    assert max_load(route(collapsed, 1, 20)).item() == pytest.approx(4)


def test_capacity_is_the_expected_load_times_the_factor():
    request = make_request(experts=8)
    shape = ModelShape.of(request.cell, request.model, VOCABULARY)
    assert capacity(1024, shape, 1.0) == 128
    assert capacity(1024, shape, 1.25) == 160
    assert capacity(80, shape, 1.1) == 11
    assert capacity(10, shape, 1.0) == math.ceil(10 / 8)
    assert capacity(10, shape, 100.0) == capacity(10, shape, DROPLESS) == 10


def test_a_dropped_token_gets_no_output_and_no_gradient():
    layer = make_layer(capacity_factor=0.25, experts=2)
    x = torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True)
    y, routed = layer(x)
    without = (y == 0).all(-1)
    assert dropped(routed)[0] == pytest.approx(without.double().mean().item())
    assert without.any()
    y.sum().backward()
    assert (x.grad[without] == 0).all()


def test_router_stays_in_float32_under_autocast():
    layer = make_layer().float()
    x = torch.randn(1, 64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer.router.logits(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x @ layer.router.value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", [1, 2, 4, 8])
def test_granularity_keeps_parameters_and_flops_except_those_of_the_router(granularity):
    def expert_entries(g):
        request = make_request(granularity=g)
        shape = ModelShape.of(request.cell, request.model, VOCABULARY)
        size = model_size(shape, request.model)
        router = request.model.blocks * shape.width * shape.total_experts
        return size.parameters - router, size.active_parameters - router, size.flops_per_token - 6 * router

    assert expert_entries(granularity) == expert_entries(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["padded", "ragged"])
@pytest.mark.parametrize("broken", [0, 1])
def test_replicas_do_not_affect_each_other(dtype, broken):
    layer = make_layer(2, dtype=dtype, capacity_factor=0.5)
    x = torch.randn(2, 24, 8, dtype=dtype)

    def of_whole(x):
        x = x.clone().requires_grad_()
        y, _ = layer(x)
        y.sum().backward()
        whole = 1 - broken
        return y[whole].detach(), x.grad[whole], [weight.value.grad[whole] for weight in weights_of(layer).values()]

    expected = of_whole(x)
    layer.zero_grad()
    x[broken] = float("nan")
    torch.testing.assert_close(of_whole(x), expected, rtol=0, atol=0)


# ---------------------------------------------------------------- the two forms of routing, and of the lookup


@given(
    seed=st.integers(0, 2**32),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    tokens=st.integers(1, 20),
    slots=st.integers(1, 20),
    renormalize=st.booleans(),
    gates=st.sampled_from(["softmax", "sigmoid"]),
)
def test_routing_without_sorting_equals_routing_by_sorting(seed, experts, top_k, tokens, slots, renormalize, gates):
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, tokens, experts, generator=generator)
    weights = torch.rand(2, top_k, tokens, generator=generator)
    made = []
    for dense in (False, True):
        mine = logits.clone().requires_grad_()
        with patch.object(operators, "prefers_dense", lambda _device, dense=dense: dense):
            routed = route(mine, top_k, min(slots, tokens), renormalize=renormalize, gates=gates)
        metrics = [metric(routed) for metric in (balance, router_z, dropped, max_load)]
        ((routed.routing.gates_RKN * weights).sum() + metrics[0].sum() + metrics[1].sum()).backward()
        made.append((routed.routing, metrics, mine.grad))
    (ours, our_metrics, our_gradient), (theirs, their_metrics, their_gradient) = made
    torch.testing.assert_close(ours.gates_RKN, theirs.gates_RKN)
    torch.testing.assert_close(our_gradient, their_gradient)
    assert torch.equal(ours.kept_RKN, theirs.kept_RKN)
    assert torch.equal(ours.filled_M, theirs.filled_M)
    # Where nothing is kept or filled, the index is arbitrary.
    assert torch.equal(ours.row_RKN[ours.kept_RKN], theirs.row_RKN[theirs.kept_RKN])
    assert torch.equal(ours.assignment_M[ours.filled_M], theirs.assignment_M[theirs.filled_M])
    torch.testing.assert_close(our_metrics, their_metrics)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("top_k", [1, 3])
def test_routing_without_sorting_stays_in_bounds_for_any_logits(value, top_k):
    logits = torch.full((2, 7, 4), value)
    with patch.object(operators, "prefers_dense", lambda _device: True):
        routing = route(logits, top_k, 5).routing
    for index, end in ((routing.row_RKN, 2 * 4 * 5), (routing.assignment_M, 2 * top_k * 7)):
        assert ((index >= 0) & (index < end)).all()
    kept = routing.row_RKN[routing.kept_RKN]
    assert len(kept) == len(kept.unique()), "a row holds one assignment"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_one_hot_gradient_of_the_lookup_equals_torchs(dtype):
    generator = torch.Generator().manual_seed(0)
    table, index = torch.randn(2, 11, 3, generator=generator), torch.randint(0, 11, (2, 40), generator=generator)
    weights = torch.randn(2, 40, 3, generator=generator)
    gradients = []
    for dense in (False, True):
        mine = table.clone().requires_grad_()
        with (
            patch.object(operators, "prefers_dense", lambda _device, dense=dense: dense),
            torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16),
        ):
            rows = lookup(mine, index)
        for replica in range(2):
            assert torch.equal(rows[replica], table[replica][index[replica]])
        (rows * weights).sum().backward()
        gradients.append(mine.grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance)
