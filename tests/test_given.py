"""What is laid over config.yaml by --config and --configfile: the same values, and nothing dropped in silence."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from snakemake.cli import get_argument_parser

from conftest import ROOT, make_project, snakemake
from mup_moe.config.document import ConfigError, read_document, read_value
from mup_moe.config.given import check_given_once, describe, read_given
from mup_moe.config.load import overlay, validate

DEFAULTS = read_document(ROOT / "config.yaml")
VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text("abz01.-")
KEYS = st.text("abcz_", min_size=2, max_size=8)


def in_one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES | st.lists(VALUES), min_size=1)))
def test_an_entry_of_the_command_line_says_what_the_same_text_in_a_file_says(document):
    assert read_given([], [f"{key}={in_one_line(value)}" for key, value in document.items()]) == document


def test_every_section_of_the_config_can_be_given_on_the_command_line():
    entries = [f"{key}={in_one_line(value)}" for key, value in DEFAULTS.items()]
    assert validate(read_given([], entries)) == validate(DEFAULTS)


def test_quotes_keep_text_that_looks_like_a_value():
    assert read_given([], ["names={a: ['null', \"2\"], b: null, c: 2}"]) == {
        "names": {"a": ["null", "2"], "b": None, "c": 2}
    }


@given(st.integers(0, 9), st.integers(0, 99), st.integers(-30, 12), st.sampled_from("eE"), st.sampled_from(["", "+"]))
def test_a_number_with_an_exponent_is_a_number_in_every_notation(tmp_path_factory, whole, part, power, letter, sign):
    exponent = f"{letter}{sign if power >= 0 else ''}{power}"
    texts = [f"{whole}{exponent}", f"{whole}.{part}{exponent}", f"-{whole}.{part}{exponent}"]
    path = tmp_path_factory.mktemp("config") / "mine.json"
    path.write_text(f'{{"a": [{", ".join(texts)}]}}')
    expected = [float(text) for text in texts]
    assert read_value(f"[{', '.join(texts)}]", "a") == read_document(path)["a"] == expected
    assert [read_value(text, "a") for text in (f"{whole}.{exponent}", f".{part}{exponent}")] == [
        float(f"{whole}.{exponent}"),
        float(f".{part}{exponent}"),
    ]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("adam_eps", "1e-8"),
        ("weight_decay", "1e-2"),
        ("clip_norm", "1E0"),
        ("steps", "1e3"),
        ("batch_size", "1.6e1"),
        ("divergence_margin", "15e-1"),
        ("final_lr_fraction", "+1.e-1"),
    ],
)
@pytest.mark.parametrize("kind", ["yaml", "json", "entry"])
def test_every_number_of_a_setting_takes_an_exponent(tmp_path, key, text, kind):
    if kind == "entry":
        given = read_given([], [f"setups={{small: {{training: {{{key}: {text}}}}}}}"])
    elif kind == "yaml":
        (tmp_path / "mine.yaml").write_text(f"setups:\n  small:\n    training:\n      {key}: {text}\n")
        given = read_given([tmp_path / "mine.yaml"], [])
    else:
        number = text.lstrip("+").replace(".e", "e")  # as JSON spells it
        (tmp_path / "mine.json").write_text(f'{{"setups": {{"small": {{"training": {{"{key}": {number}}}}}}}}}')
        given = read_given([tmp_path / "mine.json"], [])
    config = validate(overlay(DEFAULTS, given))
    assert getattr(config.setups["small"].training, key) == float(text)


def test_a_number_beyond_every_setting_is_refused_and_not_computed():
    with pytest.raises(ConfigError, match=r"`setups\.small\.training\.steps` is .*inf"):
        validate(overlay(DEFAULTS, read_given([], ["setups={small: {training: {steps: 1e999999999}}}"])))


def test_an_entry_that_is_not_yaml_is_named():
    with pytest.raises(ConfigError, match="`execution` cannot be read as YAML: line 1"):
        read_given([], ["execution={threads: 2"])


def test_a_key_that_json_has_twice_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text('{"figures": {"figure1": {}, "figure1": {}}}')
    with pytest.raises(ConfigError, match="cannot be read as JSON: the key 'figure1' is there twice"):
        read_document(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--config", "preset=gpu", "--config", "execution={device: cpu}"], "--config"),
        (["-C", "preset=gpu", "results/paper", "--config=preset=gpu"], "--config"),
        (["-Cpreset=gpu", "-C", "a=b"], "--config"),
        (["--configfile", "a.yaml", "-n", "--configfiles", "b.yaml"], "--configfile"),
        (["--configfile", "a.yaml", "--config", "a=b", "--configfile", "b.yaml"], "--configfile"),
        (["--set-resources", "train:mem_mb=1", "--set-resources", "train:gpu=1"], "--set-resources"),
        (["--until", "figure", "--until", "claims"], "--until"),
    ],
)
def test_an_option_of_which_snakemake_takes_the_last_is_refused(arguments, option):
    with pytest.raises(ConfigError, match=f"^`{option}` is given 2 times.*give it once, with all of its values"):
        check_given_once(get_argument_parser(), arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "preset=gpu", "execution={device: cpu}", "--configfile", "a.yaml", "b.yaml", "-n"],
        ["results/paper", "--cores", "2", "--config", "preset=gpu", "--", "--config", "--config"],
        [],
    ],
)
def test_options_that_snakemake_takes_whole_are_not_refused(arguments):
    check_given_once(get_argument_parser(), arguments)


def test_the_layers_are_described_from_the_lowest_to_the_highest():
    entries = ["preset=gpu", "execution={device: cpu}"]
    assert describe("gpu", [Path("a.yaml")], entries) == (
        "config.yaml, preset gpu, a.yaml, --config execution={device: cpu}"
    )


# ---------------------------------------------------------------- through Snakemake


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("given") / "project")
    (project / "mine").mkdir()
    (project / "mine/config.yaml").write_text("config: [preset=gpu]\n")
    return project


def run(project: Path, *arguments: str) -> str:
    return snakemake(project, "--cores", "2", *arguments).stdout


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "preset=gpu", "--config", "execution={device: cpu}"], "`--config` is given 2 times"),
        (["--configfile", "smoke.yaml", "--configfile", "smoke.yaml"], "`--configfile` is given 2 times"),
        (
            ["--profile", "mine", "--config", "execution={device: cpu}"],
            "`--config` is given on the command line and by a profile",
        ),
    ],
)
def test_snakemake_drops_nothing_of_a_command_line(project, arguments, sentence):
    output = run(project, "results/plan.csv", "-n", *arguments)
    assert sentence in output
    assert "Traceback" not in output
    assert "rule plan" not in output


@pytest.mark.workflow
def test_the_form_of_the_readme_works_and_the_plan_and_every_log_say_what_they_are_of(project):
    layers = f"config.yaml, preset default, {project / 'smoke.yaml'}, --config execution={{threads: 2, lockstep: []}}"
    arguments = ["--configfile", "smoke.yaml", "--config", "preset=default", "execution={threads: 2, lockstep: []}"]
    output = run(project, "results/plan.csv", "results/table1.csv", *arguments)
    assert f"Config: {layers}" in output
    assert layers in (project / "results/plan.md").read_text().replace("\\", "")
    for name in ("plan", "table1"):
        assert f"config: {layers}\n" in (project / f"results/logs/{name}.log").read_text()
    # What the values are, by the plan of jobs: one a cell, with two threads.
    assert "threads: 2" in run(project, "results/figure1.pdf", "-n", *arguments)


@pytest.mark.workflow
def test_a_profile_may_give_the_config(project):
    assert "Config: config.yaml, preset gpu\n" in run(project, "results/plan.csv", "-n", "--profile", "mine")
