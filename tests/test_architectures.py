"""Models of transformers as cells of a sweep, compared with transformers itself."""

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from conftest import CONFIG, TABLE, VOCABULARY, run_step
from mup_moe.config.architecture import SHARED_SETTINGS
from mup_moe.config.cell import Cell, LearningRate
from mup_moe.config.load import validate
from mup_moe.config.settings import Config, ModelSettings
from mup_moe.files import UserError
from mup_moe.model.build import build
from mup_moe.model.hub import make
from mup_moe.model.initialize import initialize
from mup_moe.model.inventory import model_size
from mup_moe.model.layers import OBSERVED, weights_of
from mup_moe.sweep import Sweep
from mup_moe.training.probe import activations, observe
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import Trainer

ARCHITECTURES = tuple(CONFIG.architectures)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 2000).astype(np.uint16)


def request_of(architecture: str, width: int = 64, config: Config = CONFIG, **training: object) -> TrainingRequest:
    """A request for a few short steps."""
    cell = Cell("mixtral", architecture, "mup", width, 8, 1, LearningRate("2^-6"), 0)
    request = Sweep(config).request(cell)
    short = {"steps": 6, "batch_size": 2, "warmup_steps": 1, "final_loss_steps": 2, "validation_batches": 1}
    return replace(request, training=replace(request.training, precision="float32", **(short | training)))


def trainer_of(request: TrainingRequest) -> Trainer:
    return Trainer([request], TOKENS, TOKENS, VOCABULARY, torch.device("cpu"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cell_computes_what_transformers_computes(architecture):
    request = request_of(architecture)
    shape = request.shape(VOCABULARY)
    model, theirs = build(shape, request.model), make(shape.hub)
    (factors,) = initialize(model, request.base(VOCABULARY), [(request.rules, 0)])
    router = next(name for name in factors if name.endswith("gate.weight"))
    assert factors[router].multiplier == pytest.approx(1 / 2)
    theirs.load_state_dict({name: weight.scaled()[0] for name, weight in weights_of(model).items()}, strict=False)
    windows = torch.from_numpy(TOKENS[:34].astype(np.int64)).view(1, 2, 17)
    tokens, targets = windows[..., :-1].contiguous(), windows[..., 1:].contiguous()
    found = model(tokens, targets)
    output = theirs(tokens[0], output_router_logits=True, use_cache=False)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found["train_loss"][0], expected)
    if architecture != "deepseek-v3":  # which has no such loss there
        # Theirs is over the tokens of all layers at once, and sums over the experts of a token.
        each = [load_balancing_loss_func((of_layer,), 8, 2) / 2 for of_layer in output.router_logits]
        torch.testing.assert_close(found["balance_loss"][0], torch.stack(each).mean())
    assert found["dropped_fraction"].item() == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tensors_of_a_shape_are_those_of_transformers(architecture):
    request = request_of(architecture)
    shape = request.shape(VOCABULARY)
    assert model_size(shape, request.model).parameters == sum(p.numel() for p in make(shape.hub).parameters())
    assert (shape.width, shape.head_size * shape.heads > 0) == (64, True)


# Another value for each setting of the model.
OTHERS: dict[str, object] = {
    "base_width": 64, "base_experts": 4, "blocks": 1, "heads": 2, "head_size": 4, "sequence": 8, "ffn_ratio": 1,
    "top_k": 1, "capacity_factor": 4.0, "activation": "relu", "renormalize_gates": False, "final_norm": False,
    "balance_loss": 0.5, "z_loss": 0.5, "init": "constant", "init_scale": 0.5, "embedding_multiplier": 2.0,
    "logit_multiplier": 2.0, "scale_residual_init": False, "expert_fan_in": "width", "gated": False,
    "norm": "layernorm", "positions": "learned", "gates": "sigmoid", "balance_loss_times_top_k": True,
    "experts_start_alike": True, "fixed_sparsity": True,
}  # fmt: skip


@pytest.mark.parametrize("setting", OTHERS)
def test_exactly_the_settings_shared_with_our_model_change_a_cell(setting):
    # No other rule depends on the number of experts.
    request = replace(request_of("mixtral"), parametrization=TABLE["mup-lr-by-experts"])
    cell = replace(request.cell, experts=4) if setting == "fixed_sparsity" else request.cell
    changes = {setting: OTHERS[setting]} | ({"heads": None} if setting == "head_size" else {})
    histories = []
    for model in (request.model, replace(request.model, **changes)):
        trainer = trainer_of(replace(request, cell=cell, model=model))
        trainer.run()
        histories.append(trainer.outcomes()[0].history_TM[:, 0].tolist())
    assert (histories[0] != histories[1]) == (setting in SHARED_SETTINGS)


def test_every_setting_of_the_model_has_another_value_here():
    assert list(OTHERS) == [field.name for field in fields(ModelSettings)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cell_continues_from_its_state_to_the_bit(architecture):
    request = request_of(architecture, 32)
    whole, first, second = trainer_of(request), trainer_of(request), trainer_of(request)
    whole.run()
    first.run(until=3)
    state = first.states()[0]
    second.load_states(3, [{name: tensor.clone() for name, tensor in state.items()}])
    second.run()
    (expected,), (found,) = whole.outcomes(), second.outcomes()
    assert found.status == "finished"
    np.testing.assert_array_equal(found.history_TM, expected.history_TM)
    assert found.valid_loss == expected.valid_loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_probe_sees_every_quantity_of_an_architecture(architecture):
    trainer = trainer_of(request_of(architecture, 32))
    values = activations(observe(trainer, trainer.training_batch(0)))
    assert {quantity for quantity, _ in values} == set(OBSERVED.values())
    assert {block for quantity, block in values if quantity == "router logits"} == {"0", "1"}
    assert all(value > 0 for value in values.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_request_includes_its_architecture(architecture):
    request = request_of(architecture)
    assert Cell.parse(request.cell.id) == request.cell
    again = TrainingRequest.from_json(request.to_json())
    assert again == request
    assert again.digest == request.digest
    ours = replace(request, cell=replace(request.cell, architecture="moe"), architecture=None)
    assert "architecture" not in json.loads(ours.to_json())


def test_an_architecture_of_ones_own_is_an_entry_of_the_config(tmp_path):
    document = asdict(CONFIG)
    document["architectures"] = {"mine": {"like": "theirs", "fields": {"sliding_window": 8}}}
    document["architectures"]["theirs"] = CONFIG.architectures["mixtral"]
    config = validate(json.loads(json.dumps(document)))
    request = request_of("mine", config=config)
    assert json.loads(request.shape(VOCABULARY).hub.fields)["sliding_window"] == 8
    trainer = trainer_of(request)
    trainer.run()
    assert trainer.outcomes()[0].status == "finished"
    # There is no corpus here: the error is about that, not about the cell.
    assert run_step("train", request.cell.id, config=config, results=tmp_path / "results") == 1


def changed(**entry: object) -> Config:
    return replace(CONFIG, architectures={"mine": CONFIG.architectures["mixtral"] | entry})


FIELDS = CONFIG.architectures["mixtral"]["fields"]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"model_type": None}, "`architectures.mine.model_type` is None but must be a model type of transformers"),
        ({"roles": "mixtrall"}, "`architectures.mine.roles` is 'mixtrall', which `roles` does not list"),
        ({"feilds": {}}, "`architectures.mine.feilds` is not a known key: the keys are model_type, roles, fields"),
        (
            {"fields": FIELDS | {"hidden_size": "width*depth"}},
            "`architectures.mine.fields.hidden_size` refers to depth",
        ),
        ({"fields": FIELDS | {"hidden_size": "width/0"}}, "'width/0' divides by 0"),
        ({"fields": FIELDS | {"num_attention_heads": "width/48"}}, "is width/48 = 1.33333 at width 64 but must be a"),
        ({"fields": FIELDS | {"head_dim": "width/4"}}, "has heads of size 16 at width 64 and 8 at `base_width`"),
        (
            {"fields": {k: v for k, v in FIELDS.items() if k != "num_local_experts"}},
            "do not determine the total_experts",
        ),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused_by_its_key(entry, sentence):
    with pytest.raises((ValueError, UserError)) as caught:
        request_of("mine", config=changed(**entry))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"fields": FIELDS | {"hiden_size": 3}}, "transformers configs of type 'mixtral' have no field hiden_size"),
        ({"model_type": "mixtrall"}, "transformers cannot make a model of type 'mixtrall' from its fields"),
        ({"roles": {**CONFIG.roles["mixtral"], "tensors": {"norm.weight": {"norm": "out"}}}},
         "`model.embed_tokens.weight` has no role in roles 'mine'"),
    ],
)  # fmt: skip
def test_errors_of_transformers_are_reported_in_a_sentence(entry, sentence):
    with pytest.raises(UserError) as caught:
        trainer_of(request_of("mine", config=changed(**entry)))
    assert sentence in str(caught.value)


def test_an_architecture_that_is_not_listed_is_refused():
    with pytest.raises(UserError, match="`architectures` does not list 'llama': add an entry"):
        request_of("llama")
