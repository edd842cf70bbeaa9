import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, TABLE, read_config
from mup_moe.config.cell import ARCHITECTURES, Cell, LearningRate, grid
from mup_moe.config.document import ConfigError
from mup_moe.config.kinds import KINDS
from mup_moe.config.load import validate
from mup_moe.parametrization import VARIABLES, Parametrization, Power, Rule

DOCUMENT = yaml.safe_load((ROOT / "config.yaml").read_text())


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_config_saved_by_a_windows_editor_is_the_same_config(tmp_path, mark, end):
    data = (ROOT / "config.yaml").read_text().encode(mark)
    (tmp_path / "config.yaml").write_bytes(data.replace(b"\n", end))
    assert read_config(tmp_path / "config.yaml") == read_config(ROOT / "config.yaml")


names = st.from_regex(r"[a-z0-9]{1,6}(-[a-z0-9]{1,6}){0,2}", fullmatch=True)
rates = st.floats(min_value=1e-12, max_value=1e3, exclude_min=True).map(LearningRate)
sizes = st.integers(1, 10**6)


@st.composite
def cells(draw: st.DrawFn) -> Cell:
    architecture = draw(st.sampled_from(ARCHITECTURES))
    experts, granularity = (draw(sizes), draw(sizes)) if architecture == "moe" else (1, 1)
    return Cell(
        draw(names),
        architecture,
        draw(names),
        draw(sizes),
        experts,
        granularity,
        draw(rates),
        draw(st.integers(0, 10**9)),
    )


@given(cells())
def test_a_cell_round_trips_through_its_id(cell):
    assert Cell.parse(cell.id) == cell
    assert "/" not in cell.id


@given(cells(), cells())
def test_different_cells_have_different_ids(one, other):
    assert (one.id == other.id) == (one == other)


@pytest.mark.parametrize("text", ["", "small", "small_moe_mup_w08_e4_g1_lr2^-6_s0", "small_moe_mup_w8_e4_g1_lr0.25_s0"])
def test_only_a_canonical_id_is_accepted(text):
    with pytest.raises(ValueError, match="is not a cell's id"):
        Cell.parse(text)


def test_the_error_for_a_bad_id_shows_the_form_of_an_id():
    with pytest.raises(ValueError, match="_wWIDTH_eEXPERTS_gGRANULARITY_lrRATE_sSEED"):
        Cell.parse("small_mup_w64")


@given(rates)
def test_a_learning_rate_round_trips_exactly_through_its_text(rate):
    assert float(LearningRate(str(rate))) == float(rate)


@given(st.integers(-80, 20))
def test_quarter_octaves_are_spelled_as_powers(quarters):
    assert str(LearningRate(2.0 ** (quarters / 4))).startswith("2^")
    assert LearningRate(str(LearningRate(2.0 ** (quarters / 4)))) == 2.0 ** (quarters / 4)


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "nan", "inf", "2^", "2^99999"])
def test_text_that_is_not_a_learning_rate_is_refused(text):
    with pytest.raises(ValueError, match="learning rate"):
        LearningRate(text)


@given(st.dictionaries(st.sampled_from(VARIABLES), st.fractions(-3, 3, max_denominator=4)))
def test_a_power_round_trips_through_its_text(exponents):
    power = Power(tuple(sorted((k, v) for k, v in exponents.items() if v)))
    assert Power.parse(str(power)) == power


def test_powers_read_as_arithmetic():
    sizes, base = {"fan_in": 64, "total_experts": 8}, {"fan_in": 16, "total_experts": 2}
    for text, expected in {
        "1": 1,
        1: 1,
        "1/fan_in": 1 / 4,
        "1/sqrt(fan_in)": 1 / 2,
        "fan_in^-0.5": 1 / 2,
        "total_experts/fan_in*total_experts": 4.0,
        "fan_in^1/2": 2,
    }.items():
        assert Power.parse(text).ratio(sizes, base) == pytest.approx(expected, rel=1e-12)


def test_all_spellings_of_one_are_read_as_1():
    for one in (1, 1.0, "1", "1.", "1.0", "1e0", "1E+00"):
        assert str(Power.parse(one)) == "1"
        assert str(Power.parse(f"{one}/fan_in")) == "1/fan_in"


def test_factors_may_be_named_and_those_left_out_are_1():
    assert Rule.parse({"multiplier": "1/fan_in"}) == Rule.parse([1, "1/fan_in", 1, 1])
    assert Rule.parse({}) == Rule.parse([1, 1, 1, 1])
    assert Rule.parse({"lr": "1/fan_in", "init_variance": 1.0}).as_row() == ["1", "1", "1/fan_in", "1"]
    with pytest.raises(ValueError, match="'adam_lr' is not a factor: the factors are init_variance, multiplier, lr"):
        Rule.parse({"adam_lr": 1})


@pytest.mark.parametrize(
    "text", ["", "2", "0", "10", "1.5", "1e1", "fan", "fan_in+1", "1/", "__import__('os')", None, [1], "fan_in^"]
)
def test_a_value_that_is_not_a_factor_is_refused(text):
    with pytest.raises(ValueError, match="is not an expression"):
        Power.parse(text)


def test_a_row_round_trips_through_plain_data():
    for name, row in TABLE.items():
        assert Parametrization.parse(name, row.as_row()) == row


def test_simplep_and_mup_differ_only_in_the_router():
    different = {role for role, rule in TABLE["mup"].rules.items() if rule != TABLE["simplep"].rules[role]}
    assert different == {"router"}


def _set(document, path, value):
    *parents, last = path.split(".")
    for key in parents:
        document = document[int(key) if isinstance(document, list) else key]
    if value is ...:
        del document[last]
    else:
        document[last] = value


AXES = "figures.figure1.axes"
MODEL = "setups.small.model"
BAD = [
    (f"{MODEL}.blcks", 2, "did you mean `blocks`"),
    ("figure", {}, "`figure` is not a known key: did you mean `figures`?"),
    ("parametrization", {}, "did you mean `parametrizations`?"),
    ("corpora.python.lik", "python", "did you mean `like`?"),
    ("claims.table.C1.drifts.0.figur", "figure1", "did you mean `figure`?"),
    ("execution.precision", "float32", "not a known key here: it belongs to `setups.NAME.training`"),
    (f"{MODEL}.learning_rate", 64, "it belongs to `figures.NAME.axes` or `probes.NAME.axes`"),
    ("execution.figures", {}, "it belongs to the top level"),
    ("execution.xyzzy", 1, "`execution.xyzzy` is not a known key: remove it"),
    (f"{MODEL}.blocks", "2", f"{MODEL}.blocks"),
    (f"{MODEL}.blocks", 2.5, f"{MODEL}.blocks"),
    (f"{MODEL}.blocks", True, f"{MODEL}.blocks"),
    (f"{MODEL}.blocks", None, f"{MODEL}.blocks"),
    (f"{MODEL}.blocks", 0, "`blocks` is 0"),
    (f"{MODEL}.blocks", ..., f"`{MODEL}.blocks` is missing"),
    (f"{MODEL}.heads", 5, "`width` 32 is not divisible by `heads` 5"),
    (f"{MODEL}.heads", None, "either `heads` or `head_size`"),
    (f"{MODEL}.capacity_factor", "none", "capacity_factor"),
    (f"{MODEL}.capacity_factor", float("nan"), "capacity_factor"),
    (f"{MODEL}.top_k", 9, "`top_k` 9 is more than `experts` 8"),
    (f"{AXES}.width", [], "`width` is empty"),
    (f"{AXES}.width", 32, f"{AXES}.width"),
    (f"{AXES}.width", [64, 128], "lacks the base width 32"),
    (f"{AXES}.width", [32, 30], "`width` 30 is not divisible"),
    (f"{AXES}.granularity", [5], "`granularity` 5 does not divide"),
    (f"{AXES}.learning_rate", [], "`learning_rate` is empty"),
    (f"{AXES}.learning_rate", ["2^-3", 0.125], "2^-3 more than once"),
    (f"{AXES}.learning_rate", ["fast"], "'fast' is not a learning rate"),
    (f"{AXES}.learning_rate", [True], f"{AXES}.learning_rate"),
    (f"{AXES}.parametrization", ["ntk"], "names 'ntk'"),
    (f"{AXES}.architecture", ["dense"], "a dense cell has no experts"),
    (f"{AXES}.seed", [-1], "seed is -1"),
    (f"{AXES}.experts", [8, 16], "neither panel nor curve"),
    ("figures.figure1.setup", "big", "which `setups` does not list"),
    ("figures.figure1.curve", "parametrization", "figures.figure1.curve"),
    ("figures.a b", DOCUMENT["figures"]["figure1"], "figures.a b"),
    ("setups.small.corpus", "pile", "which `corpora` does not list"),
    ("setups.small.training.warmup_steps", 301, "`warmup_steps` 301"),
    ("setups.small.training.adam_betas", [0.9], "adam_betas"),
    ("setups.small.training.adam_betas", [0.9, 1.0], "adam_betas"),
    ("corpora.python.source", "pile", "corpora.python.source"),
    ("corpora.python.vocabulary", None, "tokenizer bpe needs `vocabulary`"),
    ("corpora.python.validation_fraction", 0.0, "validation_fraction"),
    ("corpora.python", {"source": "c4", "tokenizer": "gpt2", "validation_fraction": 0.1}, "needs `max_bytes`"),
    ("parametrizations.mup.rooter", [1, 1, 1, 1], "parametrizations.mup.rooter"),
    ("parametrizations.mup.router", [1, 1], "init_variance"),
    (
        "parametrizations.mup.router",
        [1, "1/fanin", 1, 1],
        "`parametrizations.mup.router`: '1/fanin' is not an expression",
    ),
    ("parametrizations.mup.router", [1, "experts/fan_in", 1, 1], "write `total_experts`"),
    ("parametrizations.mup.router", [1, "1/sqrt(top_k)", 1, 1], "write `active_experts`"),
    ("parametrizations.mup.like", "mup", "parametrizations.mup.like"),
    ("parametrizations.sp.router", ..., "`parametrizations.sp.router` is missing"),
    ("parametrizations.sp.attention_logits", "1/fan_in", "does not scale a tensor"),
    ("parametrizations.mup.experts", [1, 1, 1, 1], "is not a role: write expert_up and expert_down"),
    ("analysis.fit_points", 2, "fit_points"),
    ("execution.threads", 0, "threads"),
    ("parametrizations.mup.router", [1, "fan_in^1/0", 1, 1], "'fan_in^1/0' is not an expression"),
    (f"{AXES}.seed", [2**63], "seed is 9223372036854775808"),
    (f"{MODEL}.balance_loss", float("inf"), "balance_loss"),
    ("figures.cells", DOCUMENT["figures"]["figure1"], "figures.cells"),
    ("figures", {}, "`figures` is empty"),
    ("figures", None, "`figures`"),
    ("figures", [], "`figures`"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD, ids=[f"{key}={value}"[:60] for key, value, _ in BAD])
def test_a_mistake_ends_in_one_sentence_naming_the_key(key, value, expected):
    document = copy.deepcopy(DOCUMENT)
    _set(document, key, value)
    with pytest.raises(ConfigError) as error:
        validate(document)
    sentence = str(error.value)
    assert expected in sentence
    assert "\n" not in sentence


def test_rotary_positions_need_heads_of_even_size():
    document = copy.deepcopy(DOCUMENT)
    assert validate(document).setups["mixtral"].model.positions == "rotary"
    document["setups"]["mixtral"]["model"] |= {"heads": None, "head_size": 1}
    with pytest.raises(ConfigError, match="an even head size, but it is 1 at `width` 32: change `head_size`"):
        validate(document)


def test_files_are_overlaid_key_by_key(tmp_path: Path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("setups: {small: {training: {steps: 40}}}")
    config = read_config(ROOT / "config.yaml", overlay)
    assert config.setups["small"].training.steps == 40
    assert config.setups["small"].model == validate(DOCUMENT).setups["small"].model


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "- x", "\x00"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_config(path)


def test_a_cell_too_long_for_a_file_name_is_refused():
    with pytest.raises(ValueError, match="too long for a file name"):
        Cell("x" * 300, "moe", "mup", 8, 4, 1, LearningRate(0.1), 0)


def test_a_grid_is_the_product_of_its_axes():
    axes = DOCUMENT["figures"]["figure1"]["axes"] | {"learning_rate": [LearningRate("2^-9"), LearningRate(0.1)]}
    axes["learning_rate_of"] = [""]
    ids = [cell.id for cell in grid("small", axes)]
    assert len(ids) == len(set(ids)) == 3 * len(axes["width"]) * 2


# ---------------------------------------------------------------- entries that inherit from another one


def test_an_entry_inherits_from_another_key_by_key():
    config = validate(DOCUMENT)
    first, second = config.figures["figure1"], config.figures["figure2a"]
    assert second.axes.learning_rate == first.axes.learning_rate
    assert second.axes.experts != first.axes.experts
    small, other = config.setups["mixtral"], config.setups["mixtral-16"]
    assert other.training == small.training
    assert other.model.base_experts != small.model.base_experts


@pytest.mark.parametrize("section", ["corpora", "setups", "figures", "probes"])
@pytest.mark.parametrize("parent", ["nothing", "itself", ["figure1"], None])
def test_an_entry_can_only_inherit_from_another_entry(section, parent):
    document = copy.deepcopy(DOCUMENT)
    document[section]["itself"] = {"like": parent}
    with pytest.raises(ConfigError, match=rf"`{section}.itself.like` is .* without a cycle"):
        validate(document)


def test_a_circle_of_entries_is_refused():
    document = copy.deepcopy(DOCUMENT)
    document["setups"] |= {"one": {"like": "two"}, "two": {"like": "one"}}
    with pytest.raises(ConfigError, match="without a cycle"):
        validate(document)


def test_an_inherited_mistake_is_reported_once_where_it_is_made():
    document = copy.deepcopy(DOCUMENT)
    document["figures"]["figure1"]["axes"]["seed"] = [0.5]
    with pytest.raises(ConfigError) as error:
        validate(document)
    assert str(error.value).count("\n") == 0
    assert "`figures.figure1.axes.seed.0`" in str(error.value)


def test_a_parent_that_is_not_a_mapping_is_named():
    document = copy.deepcopy(DOCUMENT)
    document["setups"]["small"] = 3
    with pytest.raises(ConfigError, match=r"`setups\.small` is 3"):
        validate(document)


def test_a_figure_of_another_kind_is_refused_in_a_composition(monkeypatch):
    monkeypatch.setitem(KINDS, "other", KINDS["transfer"])
    document = copy.deepcopy(DOCUMENT)
    document["figures"]["figure2b"]["kind"] = "other"
    with pytest.raises(
        ConfigError, match=r"`compositions\.figure2` names 'figure2b' of kind other: name figures of kind transfer"
    ):
        validate(document)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("compositions.figure9", ["figure8"], "figure8"),
        ("compositions.figure9", [], "empty"),
        ("figures.figure1.kind", "histogram", "must be one of transfer"),
        ("figures.figure1.kind", "activations", "must be one of transfer"),
        ("compositions.figure9", ["figure1", "figure1"], "more than once"),
        ("compositions.figure1", ["figure3"], "rename it"),
        ("compositions.claims", ["figure3"], "rename it"),
        ("probes.lemma_b1.steps", [0, 5, 2], "ascend"),
        ("probes.lemma_b1.steps", [1, 2], "begin with 0"),
        ("probes.lemma_b1.steps", [0, 99], "trains 10 steps"),
        ("probes.lemma_b1.axes.width", [64], "two values"),
        ("probes.lemma_b1.axes.architecture", ["dense"], "moe"),
        ("probes.lemma_b1.setup", "big", "'big'"),
        ("claims.drift_margin", 0.0, "positive"),
        ("claims.table.C1.drifts", [], "tests nothing"),
        ("claims.table.C1.drifts.0.figure", "figure9", "figure9"),
        ("claims.table.C1.drifts.0.panel", "mupp", "mupp"),
        ("claims.table.C1.drifts.0.expect", "stays", "keeps"),
        ("claims.table.C7.slopes.0.probe", "lemma", "lemma"),
    ],
)
def test_results_that_cannot_be_made_are_refused(key, value, expected):
    document = copy.deepcopy(DOCUMENT)
    _set(document, key, value)
    with pytest.raises(ConfigError) as error:
        validate(document)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_panel_with_claims_may_be_left_out():
    document = copy.deepcopy(DOCUMENT)
    document["figures"]["figure1"]["axes"]["parametrization"] = ["sp", "mup"]
    validate(document)


@pytest.mark.parametrize("value", [0, 2**20 + 1, math.nan])
def test_ranges_are_checked_wherever_settings_are_made(value):
    training = read_config(ROOT / "config.yaml").setups["small"].training
    with pytest.raises(ValueError, match=r"`batch_size` is .* but must be at least 1 and at most 1048576"):
        replace(training, batch_size=value)
