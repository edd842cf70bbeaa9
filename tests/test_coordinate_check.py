"""The coordinate check finds what is wrong with the parametrization of a user's model."""

import pandas as pd
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import mup_moe
from mup_moe.library.tables import roles_of

WIDTHS = (64, 128, 256, 512)
# The same batch at each step, so that a few steps show what training does.
BATCHES = [torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))] * 5


def make(width: int) -> MixtralForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": width // 16}
    sizes |= {"num_key_value_heads": width // 32, "num_hidden_layers": 1, "num_local_experts": 4, "vocab_size": 97}
    return MixtralForCausalLM(MixtralConfig(**sizes))


def slopes_of(rules: object = "mup", roles: object = "mixtral") -> "pd.Series[float]":
    """Returns the slope of each quantity after the last step."""
    check = mup_moe.coordinate_check(make, WIDTHS, BATCHES, rules, roles, seeds=(0, 1))
    table = check.table()
    return table[table["step"] == len(BATCHES)].set_index("quantity")["slope"]


@pytest.fixture(scope="module")
def right() -> "pd.Series[float]":
    return slopes_of()


def test_under_mup_no_activation_grows_or_vanishes_with_the_width(right):
    assert set(right.index) == {"embedding", "attention", "feed-forward", "router logits", "output logits"}
    assert right.abs().max() < 0.3


def test_an_unscaled_router_is_detected(right):
    # Neither its init nor its learning rate falls with the width: its logits grow.
    found = slopes_of({"like": "mup", "router": [1, 1, 1, 1]})
    assert found["router logits"] > right["router logits"] + 0.4


def test_an_expert_matrix_with_a_constant_axis_as_fan_in_is_detected(right):
    # The first axis of down_proj [E, D, F] is the number of experts: with it as fan_in, no factor falls.
    entry = {"expert_down": "in expert expert", "residual": True}
    roles = {"like": "mixtral", "tensors": {"layers.*.mlp.experts.down_proj": entry}}
    found = slopes_of(roles=roles)
    assert found["feed-forward"] > right["feed-forward"] + 0.4


def test_swapping_two_axes_that_both_grow_is_not_detected(right):
    roles = {"like": "mixtral", "tensors": {"layers.*.mlp.experts.down_proj": {"expert_down": "expert in out"}}}
    assert slopes_of(roles=roles)["feed-forward"] == pytest.approx(right["feed-forward"], abs=0.2)


def test_an_unscaled_learning_rate_is_detected(right):
    rules = {"like": "mup", "expert_up": ["1/fan_in", 1, 1, 1], "expert_down": ["1/fan_in", 1, 1, 1]}
    assert slopes_of(rules)["feed-forward"] > right["feed-forward"] + 0.4


def test_the_check_gives_a_table_and_a_figure(tmp_path):
    check = mup_moe.coordinate_check(make, (32, 64), BATCHES[:1], seeds=(0, 1))
    assert "mup: router logits, block 0" in str(check)
    assert set(check.table()["points"]) == {4}
    check.save(tmp_path / "check")
    assert (tmp_path / "check.png").stat().st_size > 1000
    assert (tmp_path / "check.pdf").exists()


def test_a_repeated_seed_counts_once_and_dropout_is_reproducible():
    def make_with_dropout(width: int) -> MixtralForCausalLM:
        model = make(width)
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return model.train()

    first, again = (mup_moe.coordinate_check(make_with_dropout, (32, 64), BATCHES[:1], seeds=(0, 0)) for _ in range(2))
    pd.testing.assert_frame_equal(first.values, again.values)
    assert set(first.table()["points"]) == {2}
    assert "no interval" in str(first)


def test_a_model_that_returns_only_logits_needs_no_loss():
    class Bare(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(97, width), torch.nn.Linear(width, 97, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(tokens))

    tensors = {"embed.weight": {"embedding": "row out"}, "head.weight": {"unembedding": "out in"}}
    roles = {"tensors": tensors, "observe": {"embedding": "embed", "output logits": "head"}}
    batches = torch.stack(BATCHES[:1])
    check = mup_moe.coordinate_check(Bare, (32, 64), batches, "mup", roles, logits_scaled=True)
    assert set(check.table()["quantity"]) == {"embedding", "output logits"}


TWICE = {"like": "mixtral", "observe": {"attention": "self_attn.{q,k}_proj"}}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (((32,), BATCHES), "needs at least two positive widths"),
        (((32, 64), BATCHES, "mup", TWICE), "observes 2 modules as attention"),
        (
            ((32, 64), BATCHES, "mup", {"like": "mixtral", "observe": {"attention": "model"}}),
            "returns a MoeModelOutput",
        ),
        (((32, 64), []), "a batch for each step"),
        (
            ((32, 64), BATCHES, "mup", roles_of("mixtral").as_data() | {"observe": {}}),
            "observes no module of the model",
        ),
    ],
)
def test_a_check_that_measures_nothing_is_refused(arguments, sentence):
    with pytest.raises(mup_moe.UserError, match=sentence):
        mup_moe.coordinate_check(make, *arguments)
