"""The table of parametrizations compared with the `mup` package, with itself, and with instantiated models."""

import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import mup
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from conftest import MODERN, TABLE, VOCABULARY, make_request
from mup_moe.model.initialize import initialize
from mup_moe.model.inventory import ModelShape, TensorSpec, model_size, tensors_of
from mup_moe.model.layers import weights_of
from mup_moe.model.metrics import METRICS
from mup_moe.model.scaling import attention_logit_scale, factors
from mup_moe.model.transformer import Transformer
from mup_moe.parametrization import ROLES, Parametrization, Rule
from mup_moe.training.trainer import Trainer

CPU = torch.device("cpu")


def shapes(request):
    return (
        ModelShape.of(request.cell, request.model, VOCABULARY),
        ModelShape.base_of(request.cell, request.model, VOCABULARY),
    )


def build(request, replicas=1):
    shape, base = shapes(request)
    model = Transformer(shape, request.model, replicas)
    table = initialize(model, base, [(request.parametrization, request.cell.seed)] * replicas)
    return model, table[0]


def train(tokens, **changes):
    trainer = Trainer([make_request(**changes)], tokens, tokens, VOCABULARY, CPU)
    trainer.run()
    return trainer.outcomes()[0].history_TM


@pytest.mark.parametrize(
    "changes", [{}, {"architecture": "dense", "experts": 1}, {"top_k": 2, "blocks": 3}, MODERN], ids=str
)
def test_at_the_base_width_all_parametrizations_train_the_same(tokens, changes):
    histories = {name: train(tokens, parametrization=name, **changes) for name in TABLE}
    for history in histories.values():
        np.testing.assert_array_equal(history, histories["sp"])


def test_away_from_the_base_shape_all_differ(tokens):
    shape = {"width": 32, "experts": 8, "granularity": 2, "top_k": 2, "fixed_sparsity": True}
    losses = {name: train(tokens, parametrization=name, **shape)[-1, METRICS.index("train_loss")] for name in TABLE}
    assert len(set(losses.values())) == len(TABLE)


def test_expert_fan_in_is_a_switch():
    def down_rate(granularity, switch):
        request = make_request(width=16, granularity=granularity, expert_fan_in=switch)
        rows = factors(request.parametrization, *shapes(request), request.model)
        return next(f.lr for name, f in rows.items() if name.endswith("down"))

    assert down_rate(4, "width") == down_rate(1, "width") == down_rate(1, "own") == 1 / 2
    assert down_rate(4, "own") == 4 / 2


class DenseReference(nn.Module):
    """Our dense model made from torch's and mup's own modules."""

    def __init__(self, width, model, base_head_size):
        super().__init__()
        self.heads = model.heads
        self.scale = base_head_size**0.5 / (width // model.heads)
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(model.sequence, width) if model.positions == "learned" else None
        rotary = LlamaConfig(hidden_size=width, num_attention_heads=model.heads, rope_theta=10_000.0)
        self.rotary = LlamaRotaryEmbedding(rotary) if model.positions == "rotary" else None
        self.activation = {"relu": F.relu, "silu": F.silu}[model.activation]
        norm = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[model.norm]
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention_norm": norm(width),
                    "qkv": nn.Linear(width, 3 * width, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "feed_forward_norm": norm(width),
                    "up": nn.Linear(width, 3 * width, bias=False),
                    "down": nn.Linear(3 * width, width, bias=False),
                }
                | ({"gate": nn.Linear(width, 3 * width, bias=False)} if model.gated else {})
            )
            for _ in range(model.blocks)
        )
        self.unembedding = mup.MuReadout(width, VOCABULARY, bias=False)

    def forward(self, tokens_BS):
        x = self.token(tokens_BS)
        if self.position is not None:
            x = x + self.position.weight[: tokens_BS.shape[1]]
        for block in self.blocks:
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for t in block["qkv"](block["attention_norm"](x)).chunk(3, -1)
            )
            if self.rotary is not None:
                q, k = apply_rotary_pos_emb(q, k, *self.rotary(x, torch.arange(tokens_BS.shape[1])[None]))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            x = x + block["out"](mixed.transpose(1, 2).flatten(2))
            y = block["feed_forward_norm"](x)
            gated = "gate" in block
            hidden = self.activation(block["gate"](y)) * block["up"](y) if gated else self.activation(block["up"](y))
            x = x + block["down"](hidden)
        return self.unembedding(x)

    def named_counterparts(self):
        """Yields (our name, parameter, transposed) for every tensor."""
        yield "token", self.token.weight, False
        if self.position is not None:
            yield "position", self.position.weight, False
        yield "unembedding", self.unembedding.weight, True
        for i, block in enumerate(self.blocks):
            for norm in ("attention_norm", "feed_forward_norm"):
                yield f"blocks.{i}.{norm}.gain", block[norm].weight, False
                if isinstance(block[norm], nn.LayerNorm):
                    yield f"blocks.{i}.{norm}.bias", block[norm].bias, False
            yield f"blocks.{i}.attention.qkv", block["qkv"].weight, True
            yield f"blocks.{i}.attention.out", block["out"].weight, True
            for matrix in ("up", "gate", "down"):
                if matrix in block:
                    yield f"blocks.{i}.feed_forward.{matrix}", block[matrix].weight, True


MODERN_DENSE = {"gated": True, "activation": "silu", "norm": "rmsnorm", "positions": "rotary"}


@pytest.mark.parametrize("changes", [{}, MODERN_DENSE], ids=str)
@pytest.mark.parametrize("width", [8, 16, 64])
def test_dense_mup_agrees_with_the_mup_package(width, changes):
    request = make_request(architecture="dense", experts=1, width=width, logit_multiplier=1.0, **changes)
    ours, table = build(request)
    head_size = request.model.base_width // request.model.heads
    reference, base, delta = (DenseReference(w, request.model, head_size) for w in (width, 8, 16))
    mup.set_base_shapes(reference, base, delta=delta)

    # Adam's learning rates.
    rate = 0.01
    groups = mup.MuAdamW(reference.parameters(), lr=rate).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    weights = weights_of(ours)
    counterparts = list(reference.named_counterparts())
    assert sorted(name for name, _, _ in counterparts) == sorted(weights)
    for name, parameter, _ in counterparts:
        assert rates[id(parameter)] == pytest.approx(rate * table[name].lr), name

    # Init variance: the factor by which mup scales a given standard deviation.
    base_table = build(replace(request, cell=replace(request.cell, width=8)))[1]
    for name, parameter, _ in counterparts:
        if parameter.ndim == 2:
            torch.manual_seed(0)
            drawn = torch.empty_like(parameter).normal_()
            torch.manual_seed(0)
            with torch.no_grad():
                mup.init.normal_(parameter, std=base_table[name].init_std)
            torch.testing.assert_close(parameter.data, drawn * table[name].init_std, msg=name)

    # The same weights give the same logits.
    with torch.no_grad():
        for name, parameter, transposed in counterparts:
            value = weights[name].value[0]
            parameter.copy_(value.T if transposed else value)
    token_ids = torch.randint(VOCABULARY, (3, request.model.sequence))
    logits_RNV = ours.predict(token_ids[None])
    torch.testing.assert_close(logits_RNV[0], reference(token_ids).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_the_model_with_mixtrals_settings_equals_mixtral():
    changes = {"gates": "softmax", "capacity_factor": "dropless", "width": 16, "base_width": 16}
    request = make_request(parametrization="sp", **MODERN | changes)
    ours, _ = build(request)
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=48,
            num_hidden_layers=request.model.blocks,
            num_attention_heads=request.model.heads,
            num_key_value_heads=request.model.heads,
            num_local_experts=4,
            num_experts_per_tok=2,
            rms_norm_eps=torch.finfo(torch.float32).eps,
            rope_theta=10_000.0,
            tie_word_embeddings=False,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    weights = {name: weight.value[0] for name, weight in weights_of(ours).items()}
    state = {
        "lm_head.weight": weights.pop("unembedding").T,
        "model.embed_tokens.weight": weights.pop("token"),
        "model.norm.weight": weights.pop("final_norm.gain"),
    }
    for block in range(request.model.blocks):
        mine, other = f"blocks.{block}", f"model.layers.{block}"
        q, k, v = weights.pop(f"{mine}.attention.qkv").chunk(3, -1)
        up = torch.cat([weights.pop(f"{mine}.feed_forward.{name}") for name in ("gate", "up")], -1)
        state |= {
            f"{other}.input_layernorm.weight": weights.pop(f"{mine}.attention_norm.gain"),
            f"{other}.post_attention_layernorm.weight": weights.pop(f"{mine}.feed_forward_norm.gain"),
            f"{other}.self_attn.q_proj.weight": q.T,
            f"{other}.self_attn.k_proj.weight": k.T,
            f"{other}.self_attn.v_proj.weight": v.T,
            f"{other}.self_attn.o_proj.weight": weights.pop(f"{mine}.attention.out").T,
            f"{other}.mlp.gate.weight": weights.pop(f"{mine}.feed_forward.router").T,
            f"{other}.mlp.experts.gate_up_proj": up.mT,
            f"{other}.mlp.experts.down_proj": weights.pop(f"{mine}.feed_forward.down").mT,
        }
    assert not weights
    theirs.load_state_dict(state)
    token_ids = torch.randint(VOCABULARY, (3, request.model.sequence))
    logits_RNV = ours.predict(token_ids[None])
    torch.testing.assert_close(logits_RNV[0], theirs(token_ids).logits.flatten(0, 1), rtol=1e-4, atol=1e-4)


# The rule [variance, multiplier, rate] is the rule [variance * c^2, multiplier / c, rate * c]: here c = 1/fan_in.
REWRITES = {
    "router": (["1", "1/fan_in", "1", "1"], ["fan_in^-2", "1", "1/fan_in", "1"]),
    "unembedding": (["1", "1/fan_in", "1", "1"], ["1/fan_in", "1/sqrt(fan_in)", "1/sqrt(fan_in)", "1"]),
    "expert_up": (["1/fan_in", "1", "1/fan_in", "1"], ["1", "1/sqrt(fan_in)", "1/sqrt(fan_in)", "1"]),
}


@pytest.mark.parametrize("role", REWRITES)
def test_two_forms_of_a_rule_by_abc_symmetry_train_the_same(tokens, role):
    # Clipping and weight decay depend on the parameters themselves, which the symmetry rescales.
    changes = {"width": 32, "clip_norm": None, "weight_decay": 0.0, "adam_eps": 1e-30, "steps": 12}
    one, other = (
        TABLE | {"mup": replace(TABLE["mup"], rules=dict(TABLE["mup"].rules) | {role: Rule.parse(factors)})}
        for factors in REWRITES[role]
    )
    column = METRICS.index("train_loss")
    first, second = (train(tokens, table=table, **changes)[:, column] for table in (one, other))
    np.testing.assert_allclose(first, second, rtol=2e-5)
    sp = train(tokens, table=TABLE, parametrization="sp", **changes)[:, column]
    assert np.abs(first - sp).max() > 10 * np.abs(first - second).max()


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("name", TABLE)
def test_instantiated_models_follow_the_table(name, width):
    request = make_request(parametrization=name, width=width, experts=4, init_scale=4.0)
    model, table = build(request)
    ratio = width / request.model.base_width
    by_role = defaultdict(list)
    for tensor, weight in weights_of(model).items():
        rule = request.parametrization.rules[weight.spec.role]
        # These sizes grow in proportion to the width here; the number of experts is fixed.
        expected = {
            factor: ratio
            ** sum(float(p) for v, p in getattr(rule, factor).exponents if v in ("fan_in", "width", "expert_size"))
            for factor in ("init_variance", "multiplier", "lr", "weight_decay")
        }
        got = table[tensor]
        assert (got.multiplier, got.lr, got.weight_decay) == pytest.approx(
            (expected["multiplier"], expected["lr"], expected["weight_decay"])
        )
        multiplier = 1.0 if weight.multiplier_R is None else weight.multiplier_R.item()
        assert multiplier == pytest.approx(expected["multiplier"])
        if weight.spec.fill is None:
            base_fan_in = 1 if weight.spec.role == "embedding" else weight.spec.fan_in / ratio
            residual = 1 / (2 * request.model.blocks) if weight.spec.into_residual else 1
            std = (4.0 / base_fan_in * residual * expected["init_variance"]) ** 0.5
            by_role[weight.spec.role].append((weight.value.detach() / std).flatten())
    for role, samples in by_role.items():
        sample = torch.cat(samples)
        # The standard deviation of n normal numbers is within 5 of its own standard errors.
        assert sample.std().item() == pytest.approx(1, abs=5 / (2 * len(sample)) ** 0.5), role
    assert set(by_role) == set(ROLES) - {"norm", "feed_forward"}


def test_attention_scale_follows_the_head_size():
    for name, power in {"sp": 0.5, "mup": 1.0}.items():
        request = make_request(parametrization=name, width=32)
        shape, base = shapes(request)
        expected = base.head_size**-0.5 * (base.head_size / shape.head_size) ** power
        assert attention_logit_scale(TABLE[name], shape, base) == pytest.approx(expected)


def test_a_tensor_without_a_role_is_refused():
    request = make_request()
    model, _ = build(request)
    model.stray = nn.Parameter(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="'stray' has no role"):
        weights_of(model)


def test_tensors_are_counted_and_scaled_without_torch():
    modules = ("mup_moe.model.inventory", "mup_moe.model.scaling", "mup_moe.training.memory")
    code = f"import sys; sys.modules['torch'] = None; import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role 'gate' is unknown"):
        TensorSpec(role="gate", shape=(2, 2), fan_in=2, fan_out=2)


def test_a_role_without_a_rule_is_refused():
    rules = {role: rule for role, rule in TABLE["mup"].rules.items() if role != "router"}
    with pytest.raises(ValueError, match="'router' has no rule"):
        factors(replace(TABLE["mup"], rules=rules), *shapes(make_request()), make_request().model)
    row = TABLE["mup"].as_row()
    del row["router"]
    with pytest.raises(ValueError, match="router` is missing"):
        Parametrization.parse("mine", row)


@given(
    width=st.sampled_from([8, 16, 64, 256]),
    experts=st.sampled_from([2, 8, 32]),
    granularity=st.sampled_from([1, 2, 4]),
    dense=st.booleans(),
    final_norm=st.booleans(),
    modern=st.booleans(),
    vocabulary=st.integers(257, 60_000),
)
@settings(max_examples=30)
def test_the_inventory_lists_the_tensors_of_the_model(
    width, experts, granularity, dense, final_norm, modern, vocabulary
):
    one = {"architecture": "dense", "experts": 1} if dense else {"experts": experts, "granularity": granularity}
    request = make_request(width=width, **one, **MODERN if modern else {"final_norm": final_norm})
    shape = ModelShape.of(request.cell, request.model, vocabulary)
    with torch.device("meta"):
        model = Transformer(shape, request.model)
    tensors = tensors_of(shape, request.model)
    assert list(tensors.items()) == [(name, weight.spec) for name, weight in weights_of(model).items()]
    assert {f"{name}.value": (1, *tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert model_size(shape, request.model).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"granularity": 2}, {"architecture": "dense", "experts": 1}, {"gated": True}], ids=str
)
def test_sizes_count_the_instantiated_tensors(changes):
    request = make_request(**changes)
    model, _ = build(request)
    size = model_size(model.shape, request.model)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    d, s, v, blocks = model.shape.width, request.model.sequence, VOCABULARY, request.model.blocks
    feed_forward = (3 if request.model.gated else 2) * d * 3 * d
    router = 0 if model.shape.dense else d * model.shape.total_experts
    per_block = 4 * d * d + feed_forward + router
    assert size.flops_per_token == 6 * (blocks * per_block + d * v) + 12 * blocks * d * s
    assert size.active_parameters == blocks * (per_block + 4 * d) + 2 * d * v + d * s


def test_draws_depend_only_on_seed_and_tensor():
    one, _ = build(make_request(parametrization="mup"))
    two, _ = build(make_request(parametrization="sp"), replicas=2)
    other, _ = build(make_request(seed=1))
    for name, weight in weights_of(one).items():
        twin = weights_of(two)[name].value
        assert torch.equal(weight.value[0], twin[0])
        assert torch.equal(twin[0], twin[1])
        if weight.spec.fill is None:
            assert not torch.equal(weight.value, weights_of(other)[name].value)
