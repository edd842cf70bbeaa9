"""The library on other people's models: plans, groups, initialization, and what is refused."""

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import mup
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import mup_moe
from conftest import TABLE, make_request
from mup_moe.__main__ import main
from mup_moe.config.roles import AXES, RoleEntry
from mup_moe.library.command import FORMATS, TRAINERS, for_trainer
from mup_moe.library.tables import roles_of, rules_of
from mup_moe.model.attention import Attention
from mup_moe.model.initialize import initialize
from mup_moe.model.layers import weights_of
from mup_moe.model.scaling import attention_logit_scale, factors
from mup_moe.model.transformer import Transformer
from mup_moe.parametrization import ROLES

VOCABULARY = 61
COMMON = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 16, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], "moe": True},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "mla": True},
    "gpt_oss": {"num_local_experts": 4, "pad_token_id": 0, "eos_token_id": 1},
    "gpt2": {"dense": True, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1},
}


def make(family: str, width: int, seed: int = 0, **changes: object) -> nn.Module:
    """Makes a tiny model of transformers with heads of constant size."""
    fields = FAMILIES[family] | COMMON
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 8, "head_dim": 8}
    sizes |= {"num_key_value_heads": width // 8}
    if fields.pop("moe", False) or "mla" in fields:
        sizes["moe_intermediate_size"] = width
    if fields.pop("mla", False):
        sizes |= {"q_lora_rank": width // 2, "kv_lora_rank": width // 2, "qk_nope_head_dim": 8, "v_head_dim": 8}
        sizes |= {"qk_rope_head_dim": 8}
        del sizes["head_dim"]
    if fields.pop("dense", False):
        sizes = {"n_embd": width, "n_head": width // 8, "n_layer": 2, "n_positions": 16}
        fields = {k: v for k, v in fields.items() if k not in COMMON} | {"vocab_size": VOCABULARY}
        fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(fields | sizes | changes)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> list[float]:
    """Takes a few steps on one batch; returns the losses."""
    tokens = torch.arange(24).view(2, 12) % VOCABULARY
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", ["sp", "mup"])
def test_the_groups_of_a_family_add_up_to_the_model(family, rules):
    model = make(family, 32)
    plan = mup_moe.parametrize(model, make(family, 16), rules)
    groups = plan.groups(lr=0.5, weight_decay=0.1)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{len(found)} parameters with {total:,} entries" in str(plan)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    router = next((p for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))), None)
    hidden = next(p for name, p in model.named_parameters() if name.endswith(("o_proj.weight", "attn.c_proj.weight")))
    assert rates[id(hidden)] == ((0.5, 0.1) if rules == "sp" else (0.25, 0.1))
    if router is not None:
        # The learning rate of an output weight includes its multiplier, and its decay per step stays the same.
        assert rates[id(router)] == ((0.5, 0.1) if rules == "sp" else (0.25, 0.2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["here", "meta"])
def test_at_the_base_width_nothing_changes(family, base):
    model = make(family, 16)
    before = copy.deepcopy(model.state_dict())
    with torch.device("meta" if base == "meta" else "cpu"):
        plan = mup_moe.parametrize(model, make(family, 16), "mup")
    plan.rescale_()
    torch.testing.assert_close(model.state_dict(), before, rtol=1e-6, atol=0.0)
    (group,) = plan.groups(lr=0.5, weight_decay=0.1)
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.5, 0.1, 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_init_is_rescaled_by_the_rules(family):
    model, own = make(family, 64), make(family, 64).state_dict()
    mup_moe.parametrize(model, make(family, 16), "mup").rescale_()
    for name, parameter in model.named_parameters():
        by = {"embed_tokens": 1.0, "wte": 1.0, "wpe": 1.0, "norm": 1.0, "ln_": 1.0, "bias": 1.0, "sinks": 1.0}
        by |= {"lm_head": 1 / 4, ".gate.weight": 1 / 4, "router.weight": 1 / 4}
        expected = next((factor for part, factor in by.items() if part in name), 1 / 2)
        torch.testing.assert_close(parameter.data, own[name] * expected, msg=name)


def test_an_init_that_follows_fan_in_is_rescaled_once():
    model, base = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(16, 16))
    roles = {"tensors": {"weight": {"feed_forward": "out in"}, "bias": {"norm": "out"}}}
    own = model[0].weight.detach().clone()
    plan = mup_moe.parametrize(model, base, "sp", roles)
    plan.rescale_(own="fan_in")
    torch.testing.assert_close(model[0].weight.data, own)
    with pytest.raises(mup_moe.UserError, match="this plan has already initialized the model"):
        plan.rescale_(own="fan_in")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_has_the_same_plan_and_takes_a_step(family):
    model, base = make(family, 32), make(family, 16)
    plain = mup_moe.parametrize(model, base, "mup")
    compiled = torch.compile(model, backend="eager")
    plan = mup_moe.parametrize(compiled, base, "mup", roles_of(None, family))
    assert plan.entries == plain.entries
    plan.initialize_(seed=1)
    (loss,) = train(compiled, torch.optim.AdamW(plan.groups(lr=2**-8, weight_decay=0.1)))
    assert math.isfinite(loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_run_continues_as_if_uninterrupted(family, tmp_path):
    def begin(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make(family, 32, seed)
        plan = mup_moe.parametrize(model, make(family, 16), "mup")
        plan.initialize_(seed)
        return model, torch.optim.AdamW(plan.groups(lr=2**-8, weight_decay=0.1))

    model, optimizer = begin(1)
    train(model, optimizer, 2)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    other, its = begin(2)
    of_model, of_optimizer = torch.load(tmp_path / "saved.pt")
    other.load_state_dict(of_model)
    its.load_state_dict(of_optimizer)
    assert train(other, its, 2) == train(model, optimizer, 2)


def shard_and_step(rank: int, family: str, file: str, out: str) -> None:
    """Runs in each of two processes: shards a model, initializes it and takes two steps."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = make(family, 32)
    for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
        fully_shard(layer)
    fully_shard(model)
    plan = mup_moe.parametrize(model, make(family, 16), "mup")
    plan.initialize_(seed=3)
    whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    losses = train(model, torch.optim.AdamW(plan.groups(lr=2**-8)), 2)
    if rank == 0:
        torch.save([whole, losses], out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_sharded_over_two_processes_starts_and_steps_like_a_whole_one(family, tmp_path):
    arguments = (family, str(tmp_path / "meet"), str(tmp_path / "out.pt"))
    torch.multiprocessing.spawn(shard_and_step, arguments, nprocs=2)
    model = make(family, 32)
    plan = mup_moe.parametrize(model, make(family, 16), "mup")
    plan.initialize_(seed=3)
    whole, losses = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(whole, dict(model.named_parameters()), rtol=0.0, atol=0.0)
    assert losses == pytest.approx(train(model, torch.optim.AdamW(plan.groups(lr=2**-8)), 2), rel=1e-5)


@pytest.mark.parametrize("rules", ["sp", "mup", "simplep"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_our_transformer_trains_through_the_library_as_it_does_built_in(rules, decay):
    request = make_request(width=32, head_size=4, heads=None, parametrization=rules, scale_residual_init=False)
    shape, base = request.shape(VOCABULARY), request.base(VOCABULARY)
    ours, theirs = Transformer(shape, request.model), Transformer(shape, request.model)
    (table,) = initialize(ours, base, [(TABLE[rules], 0)])
    plan = mup_moe.parametrize(theirs, Transformer(base, request.model), rules, "ours")
    scale = attention_logit_scale(TABLE[rules], shape, base)
    for module in theirs.modules():
        if isinstance(module, Attention):
            module.logit_scale_R.fill_(scale)
    with torch.no_grad():
        for name, weight in weights_of(theirs).items():
            entry = plan.entries[f"{name}.value"]
            assert entry.factors.init_std == pytest.approx(table[name].init_std * table[name].multiplier), name
            weight.value.copy_(weights_of(ours)[name].scaled())
    groups = [
        {"params": [weight.value], "lr": 0.01 * table[name].lr, "weight_decay": decay * table[name].weight_decay}
        for name, weight in weights_of(ours).items()
    ]
    optimizers = torch.optim.AdamW(groups), torch.optim.AdamW(plan.groups(lr=0.01, weight_decay=decay))
    tokens = torch.randint(VOCABULARY, (1, 4, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            found = model(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous())
            model.objective(found).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(found["train_loss"].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, weight in weights_of(theirs).items():
        torch.testing.assert_close(weight.value, weights_of(ours)[name].scaled(), rtol=1e-3, atol=1e-5, msg=name)
    assert factors(TABLE[rules], shape, base, request.model) == table


class Dense(nn.Module):
    """A layer of a dense GPT between its embedding and its output."""

    def __init__(self, width: int, readout: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.output = readout(width, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.output(x + self.down(self.up(x).relu()))


DENSE = {
    "tensors": {
        "embedding.weight": {"embedding": "row out"},
        "{up,down}.weight": {"feed_forward": "out in"},
        "{up,down}.bias": {"norm": "out", "fill": 0},
        "output.weight": {"unembedding": "out in"},
    },
    "sizes": {"head_size": "8"},
}


@pytest.mark.parametrize("width", [16, 64, 256])
def test_a_dense_model_is_initialized_and_trained_as_by_the_mup_package(width):
    tokens = torch.arange(VOCABULARY)[None]
    model, theirs = Dense(width), Dense(width, mup.MuReadout)
    plan = mup_moe.parametrize(model, Dense(16), "mup", DENSE, sizes={"head_size": 8}, base_sizes={"head_size": 8})
    base, delta = (Dense(at, mup.MuReadout) for at in (16, 32))
    mup.set_base_shapes(theirs, base, delta=delta, rescale_params=False)
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            entry, drawn = plan.entries[name], torch.randn(parameter.shape, generator=generator)
            # The package multiplies the output by 1 / width_mult; the plan includes that in the weight.
            output = theirs.output.width_mult() if name == "output.weight" else 1.0
            parameter.copy_(drawn)
            if entry.spec.fill is None:
                mup.init.normal_(parameter, std=entry.base.fan_in**-0.5)
                ratio = parameter.std().item() / output / entry.factors.init_std
                assert ratio == pytest.approx(1.0, abs=5 / parameter.numel() ** 0.5), name
            parameter.copy_(drawn * entry.factors.init_std * output)
            model.get_parameter(name).copy_(drawn * entry.factors.init_std)
    torch.testing.assert_close(model(tokens), theirs(tokens))
    mine = torch.optim.AdamW(plan.groups(lr=2**-6, weight_decay=0.0))
    other = mup.MuAdamW(theirs.parameters(), lr=2**-6, weight_decay=0.0)
    for _ in range(3):
        for of_one, optimizer in ((model, mine), (theirs, other)):
            nn.functional.cross_entropy(of_one(tokens)[0, :-1], tokens[0, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model(tokens), theirs(tokens), rtol=1e-3, atol=1e-4)


def quantised(model: Dense) -> Dense:
    whole = torch.zeros(model.embedding.weight.shape, dtype=torch.int8)
    model.embedding.weight = nn.Parameter(whole, requires_grad=False)
    return model


def entry_of(entry: dict[str, object]) -> RoleEntry:
    return roles_of({"tensors": {"w": entry}}).entries[0]


GPT2_TENSORS = roles_of("gpt2").as_data()["tensors"]


def without(pattern: str) -> dict[str, object]:
    return {"sizes": {"head_size": "n_embd/n_head"}, "tensors": {k: v for k, v in GPT2_TENSORS.items() if k != pattern}}


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (
            lambda: mup_moe.parametrize(make("gpt2", 32), make("gpt2", 16), "mup", without("lm_head.weight")),
            "`lm_head.weight` has no role in roles 'yours': add a pattern for it",
        ),
        (
            lambda: mup_moe.parametrize(
                make("gpt2", 32), make("gpt2", 16), "mup", {"like": "gpt2", "tensors": {"*.weight": {"norm": "out"}}}
            ),
            "`transformer.wte.weight` matches `*.weight` and `{wte,wpe}.weight` of roles 'yours'",
        ),
        (
            lambda: mup_moe.parametrize(
                make("gpt2", 32),
                make("gpt2", 16),
                "mup",
                {"like": "gpt2", "tensors": {"lm_head.weight": {"unembedding": "in"}}},
            ),
            "`lm_head.weight` has the shape (61, 32), but `lm_head.weight` describes 1 axes (in)",
        ),
        (
            lambda: mup_moe.parametrize(
                make("gpt2", 32, tie_word_embeddings=True), make("gpt2", 16, tie_word_embeddings=True), "mup"
            ),
            "`transformer.wte.weight` (embedding) and `lm_head.weight` (unembedding) are one tensor",
        ),
        (
            lambda: mup_moe.parametrize(make("gpt2", 32, n_layer=3), make("gpt2", 16), "mup"),
            "the base model has no parameter 'transformer.h.2.ln_1.weight'",
        ),
        (
            lambda: mup_moe.parametrize(make("mixtral", 32, head_dim=16), make("mixtral", 16), "mup"),
            "heads have size 16, but 8 in the base model, and mup scales attention logits by 1/head_size",
        ),
        (
            lambda: mup_moe.parametrize(Dense(32), Dense(16), "mup", DENSE | {"sizes": {}}),
            "the rules mup refer to head_size, which roles 'yours' do not find in the model's config",
        ),
        (
            lambda: mup_moe.parametrize(Dense(32), Dense(16), "mup"),
            "there is no role table for a model without a transformers config",
        ),
        (
            lambda: mup_moe.parametrize(make("mixtral", 32), None),
            "the base is of type NoneType but must be a torch.nn.Module",
        ),
        (
            lambda: mup_moe.parametrize(Dense(32), Dense(16), "mup", DENSE, sizes={"head_size": 0}),
            "sizes are {'head_size': 0} but must map names to whole numbers of at least 1",
        ),
        (
            lambda: mup_moe.parametrize(Dense(32), Dense(16), "mup", DENSE, sizes={"head_sise": 8}),
            "sizes has unknown names head_sise: choose from",
        ),
        (
            lambda: mup_moe.parametrize(quantised(Dense(32)), Dense(16), "mup", DENSE),
            "the parameter 'embedding.weight' has dtype torch.int8: make the plan before quantization",
        ),
        (
            lambda: mup_moe.parametrize(
                Dense(32), Dense(16), {"like": "mup", "unembedding": [1, "fan_in^9999", 1, 1]}, DENSE
            ),
            "give no finite number for `output.weight`: check their powers",
        ),
        (
            lambda: mup_moe.parametrize(make("deepseek_v3", 32, n_shared_experts=0), make("deepseek_v3", 16), "mup"),
            "which holds no entries: remove this parameter",
        ),
        (lambda: rules_of(None), "rules is of type NoneType: give a name from config.yaml, or your own mapping"),
        (lambda: roles_of(1), "roles is of type int: give a name from config.yaml, or your own mapping"),
        (
            lambda: entry_of({"router": "row out"}),
            "`w` has no axis `in`: mark the axis that the product with this matrix sums",
        ),
        (
            lambda: entry_of({"norm": "out", "fill": math.nan}),
            "`w`: `fill` must be a number, and `residual` must be true or false",
        ),
        (lambda: rules_of("mupp"), "there are no rules 'mupp': did you mean mup?"),
        (lambda: roles_of("mixtrall"), "there are no roles 'mixtrall': did you mean mixtral?"),
        (lambda: rules_of({"like": "mup", "rooter": [1, 1, 1, 1]}), "`parametrizations.yours.rooter` is not a role"),
    ],
)
def test_inputs_without_a_plan_are_refused_in_a_sentence(make_it, sentence):
    with pytest.raises(mup_moe.UserError) as caught:
        make_it()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def altered(plan: mup_moe.Plan, model: nn.Module) -> mup_moe.Plan:
    model.extra = nn.Linear(3, 3)
    return plan


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        (lambda plan, _: plan.groups(lr=math.nan), "lr is nan but must be a finite number of at least 0"),
        (
            lambda plan, _: plan.groups(lr=1.0, weight_decay=-1.0),
            "weight_decay is -1.0 but must be a finite number of at least 0",
        ),
        (
            lambda plan, _: plan.groups(lr=1.0, undecayed=["nrm"]),
            "undecayed has unknown roles nrm: choose from embedding",
        ),
        (
            lambda plan, _: plan.initialize_(scale=-1.0),
            "scale (of the variances) is -1.0 but must be a positive number",
        ),
        (
            lambda plan, model: altered(plan, model).groups(lr=1.0),
            "the model's parameter 'extra.bias' does not match the plan",
        ),
        (
            lambda plan, model: model.to("meta") and plan.initialize_(),
            "is on the meta device: call the model's `to_empty`",
        ),
    ],
)
def test_wrong_uses_of_a_plan_are_refused_in_a_sentence(use, sentence):
    model = make("mixtral", 32)
    plan = mup_moe.parametrize(model, make("mixtral", 16), "mup")
    with pytest.raises(mup_moe.UserError) as caught:
        use(plan, model)
    assert sentence in str(caught.value)


def test_only_the_undecayed_role_has_no_decay():
    plan = mup_moe.parametrize(make("mixtral", 32), make("mixtral", 16), "mup")
    groups = plan.groups(lr=1.0, weight_decay=0.1, undecayed="unembedding")
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    of_role = {entry.spec.role: decay[id(parameter)] for entry, parameter in plan._parameters()}
    assert of_role["unembedding"] == 0
    assert of_role["embedding"] == 0.1


def test_a_model_in_data_parallel_has_the_plan_of_the_model():
    plan = mup_moe.parametrize(nn.DataParallel(make("mixtral", 32)), make("mixtral", 16), "mup")
    assert str(plan) == str(mup_moe.parametrize(make("mixtral", 32), make("mixtral", 16), "mup"))


def test_a_scalar_parameter_has_a_role():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

    plan = mup_moe.parametrize(Scaled(), Scaled(), "sp", {"tensors": {"scale": {"norm": "", "fill": 1}}})
    plan.initialize_()
    assert [group["lr"] for group in plan.groups(lr=0.5)] == [0.5]


def test_logits_that_the_model_scales_itself_are_left_alone():
    made = make("mixtral", 32, head_dim=16), make("mixtral", 16)
    assert mup_moe.parametrize(*made, "mup", logits_scaled=True).entries
    assert mup_moe.parametrize(*made, "sp").entries


ENTRY = st.fixed_dictionaries(
    {}, optional={
        **{role: st.lists(st.sampled_from(AXES), max_size=3).map(" ".join) for role in ROLES[:4]},
        "fill": st.one_of(st.none(), st.floats(allow_nan=False), st.text(max_size=3)),
        "residual": st.one_of(st.booleans(), st.integers()),
    },
)  # fmt: skip
PATTERN = st.one_of(st.sampled_from(["weight", "*.bias", "{up,down}.weight", "**", "{", "up.{weight,bias}"]), st.text())


@given(st.dictionaries(PATTERN, st.one_of(ENTRY, st.none(), st.text(max_size=5)), max_size=4))
def test_any_role_table_ends_in_a_plan_or_a_sentence(tensors):
    model, base = (nn.ModuleDict({"up": nn.Linear(w, w), "down": nn.Linear(w, w)}) for w in (8, 4))
    try:
        plan = mup_moe.parametrize(model, base, "sp", {"tensors": tensors})
    except mup_moe.UserError:
        return
    assert len(plan.entries) == 4


def test_the_library_needs_only_torch_and_yaml():
    program = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"pandas", "snakemake", "pydantic", "transformers", "scipy"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
import mup_moe
import torch
model, base = torch.nn.Linear(8, 8), torch.nn.Linear(4, 4)
roles = {"tensors": {"weight": {"attention": "out in"}, "bias": {"norm": "out"}}}
plan = mup_moe.parametrize(model, base, "simplep", roles, logits_scaled=True)
print(json.dumps(sorted(group["lr"] for group in plan.groups(lr=1.0))))
try:
    mup_moe.coordinate_check
except mup_moe.UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rates, refused = done.stdout.splitlines()
    assert json.loads(rates) == [0.5, 1.0]
    assert refused.startswith("mup_moe.coordinate_check needs the package pandas: run pip install")


# Names of parameters in the code of the trainers, at the commits that config.yaml names.
EXPERTS = "layers.1.moe.routed_experts.inner_experts"
NAMES = {
    "automodel": {
        "attention": "model.layers.0.self_attn.q_proj.weight model.layers.0.self_attn.q_a_proj.weight"
        " model.layers.0.self_attn.kv_a_proj_with_mqa.weight model.layers.0.self_attn.o_proj.weight",
        "feed_forward": "model.layers.0.mlp.gate_proj.weight model.layers.1.mlp.shared_experts.down_proj.weight",
        "router": "model.layers.1.mlp.gate.weight",
        "expert_up": "model.layers.1.mlp.experts.gate_and_up_projs model.layers.1.mlp.experts.gate_up_linear.weight3",
        "expert_down": "model.layers.1.mlp.experts.down_projs model.layers.1.mlp.experts.down_linear.weight0",
        "unembedding": "lm_head.weight",
        "embedding": "model.embed_tokens.weight",
        "norm": "model.norm.weight model.layers.0.input_layernorm.weight model.layers.0.self_attn.q_a_layernorm.weight",
    },
    "torchtitan": {
        "attention": "layers.0.attention.qkv_linear.wqkv.weight layers.0.attention.qkv_linear.wq.weight"
        " layers.0.attention.wkv_a.weight layers.0.attention.wq_b.weight layers.0.attention.wo.weight",
        "feed_forward": "layers.0.feed_forward.w1.weight layers.1.moe.shared_experts.w2.weight"
        " mtp_layers.0.eh_proj.weight",
        "router": "layers.1.moe.router.gate.weight",
        "expert_up": f"{EXPERTS}.w1_EFD {EXPERTS}.w3_EFD {EXPERTS}.mlp1_weight_EGD",
        "expert_down": f"{EXPERTS}.w2_EDF {EXPERTS}.mlp2_weight_EDF",
        "unembedding": "lm_head.weight",
        "embedding": "tok_embeddings.weight",
        "norm": "norm.weight layers.0.attention_norm.weight layers.0.ffn_norm.weight layers.0.attention.q_norm.weight"
        f" layers.0.attention.qkv_linear.wqkv.bias layers.0.attention.wo.bias layers.0.attention.sinks"
        f" layers.1.moe.router.gate.bias {EXPERTS}.mlp1_bias_EG {EXPERTS}.mlp2_bias_ED mtp_layers.0.hnorm.weight",
    },
    "megatron": {
        "attention": "decoder.layers.0.self_attention.linear_qkv.weight"
        " decoder.layers.0.self_attention.linear_qkv_down_proj.weight"
        " decoder.layers.0.self_attention.linear_proj.weight"
        " module.module.decoder.layers.0.self_attention.linear_q_up_proj.weight",
        "feed_forward": "decoder.layers.0.mlp.linear_fc1.weight decoder.layers.1.mlp.shared_experts.linear_fc2.weight"
        " mtp.layers.0.eh_proj.weight",
        "router": "decoder.layers.1.mlp.router.weight decoder.layers.1.mlp.shared_experts.gate_weight",
        "expert_up": "decoder.layers.1.mlp.experts.linear_fc1.weight12"
        " decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight",
        "expert_down": "decoder.layers.1.mlp.experts.linear_fc2.weight0"
        " decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight",
        "unembedding": "output_layer.weight",
        "embedding": "embedding.word_embeddings.weight",
        "norm": "decoder.final_layernorm.weight decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
        " decoder.layers.1.pre_mlp_layernorm.weight decoder.layers.0.self_attention.q_layernorm.weight",
    },
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_name_in_a_trainers_models_has_its_role(trainer):
    table = roles_of(trainer)
    assert set(NAMES[trainer]) == set(ROLES)
    for role, names in NAMES[trainer].items():
        assert {table.entry(name).role for name in names.split()} == {role}


@dataclass(frozen=True)
class Predicate:
    """Megatron's ParamWithNamePredicate."""

    name: str
    fn: Callable[[object, str], bool] = field(compare=False)


BASE = {"lr": 2.0, "betas": (0.9, 0.95), "weight_decay": 3.0, "eps": 5.0}
Factors = tuple[float, float, float]


def taken_by(trainer: str, text: str, min_lr: float | None = 7.0) -> list[tuple[Callable[[str], object], Factors]]:
    """Returns what a trainer reads from the text: functions that match names, and factors; the first match counts."""
    if trainer == "automodel":
        overrides = yaml.safe_load(text)["optimizer"]["param_group_overrides"]
        return [(re.compile(of["pattern"]).search, (of["lr_mult"], of["wd_mult"], None)) for of in overrides]
    config = SimpleNamespace(lr=BASE["lr"], min_lr=min_lr, adam_eps=BASE["eps"])
    names: dict[str, Any] = {"re": re, "config": config, "base": BASE, "ParamGroupConfig": SimpleNamespace}
    names |= {"ParamKey": lambda with_name_predicate: with_name_predicate, "ParamWithNamePredicate": Predicate}
    names |= {"ParamGroupOverride": dict, "get_standard_config_overrides": lambda _: {}}
    exec(text, names)
    if trainer == "torchtitan":
        groups = [(of.pattern, of.optimizer_kwargs) for of in names["param_groups"]]
        assert all(of["betas"] == BASE["betas"] for _, of in groups)
        return [
            (re.compile(pattern).search, tuple(of[key] / BASE[key] for key in ("lr", "weight_decay", "eps")))
            for pattern, of in groups
        ]
    overrides = names["overrides"]
    assert {of["min_lr"] / min_lr == of["max_lr"] / config.lr if min_lr else "min_lr" not in of
            for of in overrides.values()} <= {True}  # fmt: skip
    return [
        (partial(key.fn, None), (of["max_lr"] / config.lr, of["wd_mult"], of["eps"] / config.adam_eps))
        for key, of in overrides.items()
    ]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("rules", ["sp", "simplep", "mup"])
def test_a_trainer_multiplies_by_the_factors_of_the_plan_for_a_role(family, trainer, rules):
    plan = mup_moe.parametrize(make(family, 48), make(family, 16), rules)
    taken = taken_by(trainer, for_trainer(plan, trainer))
    for entry in plan.entries.values():
        expected = (entry.factors.lr, entry.factors.weight_decay, entry.eps)
        for name in NAMES[trainer][entry.spec.role].split():
            found = [of for matches, of in taken if matches(name)]
            # torchtitan refuses a parameter that no pattern matches.
            assert len(found) == 1 or (not found and expected == (1, 1, 1) and trainer != "torchtitan"), name
            assert (found or [(1, 1, 1)])[0][:2] == pytest.approx(expected[:2]), name
            assert not found or found[0][2] in (None, pytest.approx(expected[2])), name


def test_megatron_without_a_minimum_learning_rate_gets_none():
    plan = mup_moe.parametrize(make("mixtral", 32), make("mixtral", 16), "mup")
    assert len(taken_by("megatron", for_trainer(plan, "megatron"), min_lr=None)) == 2


def test_a_role_with_several_learning_rates_is_refused_in_a_sentence():
    plan = mup_moe.parametrize(make("deepseek_v3", 32, q_lora_rank=8), make("deepseek_v3", 16, q_lora_rank=8), "mup")
    with pytest.raises(mup_moe.UserError, match="tensors of the role attention have different multipliers, such as"):
        for_trainer(plan, "megatron")


HUB = {"model_type": "mixtral", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
HUB |= {
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_plan_of_a_hub_config_is_printed(form, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    assert main(["roles", str(tmp_path / "config.json"), "--base-width", "64", "--as", form]) == 0
    said = capsys.readouterr().out
    if form == "table":
        assert re.search(r"mlp\.gate\.weight +router +8 x 256 +64 -> 256 +0\.03125 +0\.25 +4 +4 +2\n", said)
    elif form == "yaml":
        (output,) = [entry for entry in yaml.safe_load(said) if entry["role"] == "unembedding"]
        assert (output["init_rescale"], output["lr"], output["weight_decay"]) == (0.25, 0.25, 4.0)
    else:
        assert "0.25" in said


def test_a_field_under_its_other_name_also_follows_the_width(tmp_path, capsys):
    fields = {"model_type": "gpt2", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1}
    fields |= {"tie_word_embeddings": False, "attn_implementation": "nothing_that_is_here"}
    (tmp_path / "config").write_text(json.dumps(fields))
    assert main(["roles", str(tmp_path / "config"), "--base-width", "16"]) == 0
    assert re.search(r"lm_head\.weight +unembedding +\S+ x 64 +16 -> 64 +0\.0625 +0\.25 ", capsys.readouterr().out)


def test_a_role_table_can_be_read_from_a_file(tmp_path, capsys):
    fields = {"model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    fields |= {"num_hidden_layers": 1, "num_experts": 4, "attention_bias": True, "moe_intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    roles = {"like": "qwen3-moe", "tensors": {"self_attn.{q,k,v,o}_proj.bias": {"norm": "out", "fill": 0}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(roles))
    command = ["roles", str(tmp_path / "config.json"), "--base-width", "32"]
    assert main(command) == 1
    assert "q_proj.bias` has no role in roles 'qwen3-moe': add a pattern for it" in capsys.readouterr().err
    assert main([*command, "--roles", str(tmp_path / "mine.yaml")]) == 0
    assert re.search(r"q_proj\.bias +norm ", capsys.readouterr().out)


@pytest.mark.parametrize("text", ["", "[]", "{", "nonsense: 1"])
def test_a_file_that_is_not_a_config_is_refused_in_a_sentence(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert main(["roles", str(tmp_path / "config.json"), "--base-width", "16"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("give the config.json of a transformers model")


@pytest.mark.parametrize(
    ("changes", "width", "sentence"),
    [
        (
            {"num_attention_heads": 7},
            64,
            "`head_size` is 36.5714 by roles 'mixtral' but must be a whole number of at least 1",
        ),
        ({"head_dim": 0}, 64, "`head_size` is 0 by roles 'mixtral' but must be a whole number of at least 1"),
        ({}, -64, "--base-width is -64 but must be positive: give the width where you tune learning rates"),
        ({}, 40, "`num_attention_heads` is 8 at width 256 but not a whole number at width 40: choose another"),
        ({"model_type": None}, 64, "has no `model_type`: give the config.json of a transformers model"),
        ({"model_type": "llama"}, 64, "there is no role table for the model type 'llama': choose `roles` from"),
        ({"num_attention_heads": "eight"}, 64, "transformers cannot make a model of type 'mixtral' from its fields"),
    ],
)
def test_a_hub_config_without_a_plan_is_refused_in_a_sentence(changes, width, sentence, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(HUB | changes))
    assert main(["roles", str(tmp_path / "config.json"), "--base-width", str(width)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
