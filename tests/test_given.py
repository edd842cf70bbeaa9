"""What --config and --configfile overlay on config.yaml: the same values, and nothing is dropped silently."""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from snakemake.cli import get_argument_parser

from conftest import ROOT, make_project, read_config, snakemake
from mup_moe.config.document import ConfigError, document_text, read_document, read_value
from mup_moe.config.given import Layers, check_options, read_given
from mup_moe.config.like import overlay
from mup_moe.config.load import validate
from mup_moe.options import CONFIG_VARIABLE, add_sweep_arguments, read_layers

DEFAULTS = read_document(ROOT / "config.yaml")
VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text("abz01.-")
KEYS = st.text("abcz_", min_size=2, max_size=8)


def in_one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES | st.lists(VALUES), min_size=1)))
def test_an_entry_of_the_command_line_means_the_same_as_in_a_file(document):
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
def test_every_numeric_setting_accepts_an_exponent(tmp_path, key, text, kind):
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


def test_a_duplicate_key_in_json_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text('{"figures": {"figure1": {}, "figure1": {}}}')
    with pytest.raises(ConfigError, match="cannot be read as JSON: the key 'figure1' appears twice"):
        read_document(tmp_path / "mine.json")


@pytest.mark.parametrize("text", ["010", "+0_7", "08", "1:30", "-1:30:00", "1:30.5", "!!int 010"])
def test_a_number_that_yaml_and_people_read_differently_is_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(f"seed: [{text}]\n")
    if text == "08":  # text to YAML and to us: no numeric setting accepts it
        assert read_value(text, "seed") == "08"
        return
    with pytest.raises(ConfigError, match=r"line 1, column .* is not a plain number: put it in quotes if it is text"):
        read_document(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match=r"`seed` cannot be read as YAML: .* is not a plain number"):
        read_value(text, "seed")


def test_a_mapping_that_snakemake_turned_into_python_is_read():
    # This is how it passes on `config: {setups: ...}` of a profile.
    document = {"small": {"model": {"heads": None, "head_size": 8, "final_norm": True, "activation": "none"}}}
    assert read_given([], [f"setups={document}"]) == {"setups": document}


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--config", "preset=gpu", "--config", "execution={device: cpu}"], "--config"),
        (["-C", "preset=gpu", "results/paper", "--config=preset=gpu"], "--config"),
        (["-Cpreset=gpu", "-C", "a=b"], "--config"),
        (["-nC", "preset=gpu", "-C", "a=b"], "--config"),
        (["--configfile", "a.yaml", "-n", "--configfiles", "b.yaml"], "--configfile"),
        (["--configfile", "a.yaml", "--config", "a=b", "--configfile", "b.yaml"], "--configfile"),
        (["--set-resources", "train:mem_mb=1", "--set-resources", "train:gpu=1"], "--set-resources"),
        (["--default-resou", "gpu=1", "--default-resources", "mem_mb=1"], "--default-resources"),
        (["--until", "figure", "--unti", "claims"], "--until"),
    ],
)
def test_a_repeated_option_is_refused_if_snakemake_would_use_only_the_last(arguments, option):
    with pytest.raises(ConfigError, match=f"^`{option}` is given more than once.*give it once, with all of its values"):
        check_options(get_argument_parser(), arguments, {})


CONFIG, RESOURCES = {"config": ["preset=gpu"]}, {"default-resources": ["gpu=1", "runtime=240"]}


@pytest.mark.parametrize(
    ("arguments", "profiles", "sentence"),
    [
        (["-C", "a=b"], [CONFIG], "`--config` is given on the command line and by the profile 0.*drop preset=gpu"),
        (["-nC", "preset=paper"], [CONFIG], "`--config` is given on the command line and by the profile 0"),
        ([], [CONFIG, CONFIG], "`--config` is given by the profile 1 and by the profile 0"),
        (["--configfile", "a"], [{"configfiles": "b"}], "`--configfile` is given .* drop b: give all of its values"),
        (
            ["--default-resources", "slurm_account=mylab", "gpu=2"],
            [RESOURCES],
            "`--default-resources` is given on the command line and by the profile 0, .* drop runtime=240: ",
        ),
        (["--res", "mem_mb=1"], [{"resources": ["gpu=4"]}], "`--resources` .* drop gpu=4"),
        (["--set-threads", "train=1"], [{"set-threads": ["probe=2"]}], "`--set-threads` .* drop probe=2"),
    ],
)
def test_an_option_is_refused_if_snakemake_would_drop_the_values_of_a_profile(arguments, profiles, sentence):
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        check_options(get_argument_parser(), arguments, {Path(str(i)): one for i, one in enumerate(profiles)})


@pytest.mark.parametrize(
    ("arguments", "profiles"),
    [
        (["--config", "preset=gpu", "execution={device: cpu}", "--configfile", "a.yaml", "b.yaml", "-n"], []),
        (["results/paper", "--cores", "2", "--config", "preset=gpu", "--", "--config", "--config"], []),
        ([], []),
        (["--config", "preset=gpu"], [{"configfile": "a.yaml", "retries": "2", "quiet": ["reason"]}]),
        (["--resources", "gpu=2", "mem_mb=1", "--quiet", "all"], [{"resources": ["gpu=4"], "quiet": ["reason"]}]),
        ([], [CONFIG, RESOURCES]),
    ],
)
def test_options_that_snakemake_uses_completely_are_accepted(arguments, profiles):
    check_options(get_argument_parser(), arguments, {Path(str(i)): one for i, one in enumerate(profiles)})


def test_the_layers_are_described_from_the_lowest_to_the_highest():
    layers = Layers(Path("config.yaml"), "gpu", [Path("a.yaml")], ["preset=gpu", "execution={device: cpu}"], {})
    assert str(layers) == "config.yaml, preset gpu, a.yaml, --config execution={device: cpu}"


# ---------------------------------------------------------------- by our own commands


def layers_of(*arguments: str) -> Layers:
    parser = argparse.ArgumentParser()
    add_sweep_arguments(parser)
    return read_layers(parser.parse_args(arguments))


def test_a_command_takes_the_same_options_as_snakemake(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    mine = tmp_path / "a=b.yaml"
    mine.write_text("execution: {threads: 2, replicas: 1}\n")
    layers = layers_of("--config", "config.yaml", str(mine), "--config", "preset=gpu", "execution={threads: 3}")
    assert str(layers) == f"config.yaml, preset gpu, {mine}, --config execution={{threads: 3}}"
    assert (layers.config.execution.threads, layers.config.execution.replicas) == (3, 1)
    assert layers_of("--config", "execution={threads: 3}").config.execution.threads == 3
    long = f"setups={{small: {{training: {{steps: {'1' * 9}}}}}}}{' ' * 300}"
    assert layers_of("--config", long).config.setups["small"].training.steps == 111_111_111
    assert layers_of("--preset", "gpu").document == layers_of("--config", "preset=gpu").document


def test_an_option_of_a_command_that_is_given_twice_has_both_values():
    parser = argparse.ArgumentParser()
    add_sweep_arguments(parser)
    assert parser.parse_args(["--figures", "a", "b", "--figures", "c"]).figures == ["a", "b", "c"]


# ---------------------------------------------------------------- what a run keeps


ODD = [
    "1e5",
    "1e-8",
    "010",
    "1:30",
    "null",
    "None",
    "~",
    "true",
    "no",
    "2^-7",
    "0x1f",
    "- a",
    "# b",
    "é\u2028",
    " x ",
    "",
]


@pytest.mark.parametrize("preset", ["default", "gpu", "gpu-visit", "authors", "paper"])
def test_the_config_that_a_run_writes_is_complete_and_names_its_layers(tmp_path, preset):
    path = tmp_path / "config.yaml"
    layers = Layers.lay(ROOT / "config.yaml", [], [f"preset={preset}", "execution={threads: 3}"])
    layers.show(path)
    assert path.read_text().startswith(
        f"# Merged from config.yaml, preset {preset}, --config execution={{threads: 3}}\n"
    )
    assert read_document(path) == layers.document
    assert read_config(path) == layers.config
    again = Layers.lay(path, [], ["execution={replicas: 1}"])
    assert str(again) == f"{layers}, --config execution={{replicas: 1}}"
    assert again.document == overlay(layers.document, {"execution": {"replicas": 1}})
    # It is also the same when overlaid on the config of the checkout.
    assert Layers.lay(ROOT / "config.yaml", [path], []).document == layers.document


def test_jobs_read_the_same_config_from_a_file_with_a_unique_name(tmp_path):
    layers = Layers.lay(ROOT / "config.yaml", [], ["preset=gpu"])
    path = layers.keep(tmp_path, 1)
    read = Layers.lay(path, [], [])
    assert (read.document, read.config, str(read)) == (layers.document, layers.config, str(layers))
    assert layers.keep(tmp_path, 1) == path != layers.keep(tmp_path, 2)


TEXTS = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(VALUES | TEXTS | st.lists(VALUES | TEXTS, max_size=3))
def test_the_config_of_a_run_returns_values_unchanged(value):
    path = Path(tempfile.gettempdir()) / f"{os.getpid()}-written.yaml"
    path.write_text(document_text({"a": value, "b": value}), encoding="utf-8")
    try:
        assert repr(read_document(path)) == repr({"a": value, "b": value})
    finally:
        path.unlink()


def test_a_command_reads_the_config_of_its_run_else_of_the_last_one_else_the_one_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy2(ROOT / "config.yaml", "config.yaml")
    shutil.copytree(ROOT / "presets", "presets")
    assert str(layers_of()) == "config.yaml, preset default"
    last, run = (Layers.lay(Path("config.yaml"), [], [f"preset={name}"]) for name in ("gpu", "authors"))
    last.show(Path("results/config.yaml"))
    assert str(layers_of()) == "config.yaml, preset gpu"
    assert layers_of().document == last.document
    assert str(layers_of("--results", "elsewhere")) == "config.yaml, preset default"
    monkeypatch.setenv(CONFIG_VARIABLE, str(run.keep(tmp_path, 1)))
    assert str(layers_of()) == "config.yaml, preset authors"
    # Explicit options take precedence, and are overlaid on config.yaml.
    assert str(layers_of("--preset", "paper")) == "config.yaml, preset paper"
    assert str(layers_of("--config", "results/config.yaml")) == "config.yaml, preset gpu"


# ---------------------------------------------------------------- through Snakemake


def test_a_dry_run_writes_no_config_and_a_run_writes_the_one_that_it_uses(tmp_path):
    project = make_project(tmp_path / "project")
    given = ("--configfile", "smoke.yaml", "--config", "execution={threads: 2}", "--cores", "2")
    assert snakemake(project, *given, "results/table1.csv", "--dry-run").returncode == 0
    assert not (project / "results/config.yaml").exists()
    assert not (project / ".snakemake/mup-moe").exists()
    done = snakemake(project, *given, "results/table1.csv")
    assert done.returncode == 0, done.stdout
    first = (project / "results/config.yaml").read_text().splitlines()[0]
    said = f"config.yaml, preset default, {project / 'smoke.yaml'}, --config execution={{threads: 2}}"
    assert first == f"# Merged from {said}"
    assert (project / "results/logs/table1.log").read_text().splitlines()[0] == f"config: {said}"
    # Versions up to 0.10.0 wrote other words there.
    kept = tmp_path / "kept.yaml"
    kept.write_text((project / "results/config.yaml").read_text().replace("# Merged from", "# Laid together from"))
    assert Layers.lay(kept, [], []).of_run == said
    # Passed back to Snakemake, it is the same config.
    again = snakemake(project, "--configfile", "results/config.yaml", "--cores", "2", "results/table1.csv", "--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("given") / "project")
    (project / "mine").mkdir()
    (project / "mine/config.yaml").write_text("config: [preset=gpu]\n")
    (project / "other").mkdir()
    (project / "other/config.yaml").write_text("config: {execution: {threads: 2}}\n")
    return project


def run(project: Path, *arguments: str) -> str:
    return snakemake(project, "--cores", "2", *arguments).stdout


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "preset=gpu", "--config", "execution={device: cpu}"], "`--config` is given more than once"),
        (["--configfile", "smoke.yaml", "--configfile", "smoke.yaml"], "`--configfile` is given more than once"),
        (
            ["--profile", "mine", "--config", "execution={device: cpu}"],
            "`--config` is given on the command line and by the profile",
        ),
        (["--profile", "mine", "--profile", "other"], "`--config` is given by the profile"),
        (
            ["--workflow-profile", "profiles/slurm", "--default-resources", "slurm_account=mylab"],
            "so Snakemake would drop gpu=1, runtime=",
        ),
    ],
)
def test_snakemake_drops_nothing_of_a_command_line(project, arguments, sentence):
    output = run(project, "results/plan.csv", "-n", *arguments)
    assert sentence in output
    assert "Traceback" not in output
    assert "rule plan" not in output


@pytest.mark.workflow
def test_the_command_of_the_readme_works_and_the_plan_and_every_log_name_their_config(project):
    layers = f"config.yaml, preset default, {project / 'smoke.yaml'}, --config execution={{threads: 2, lockstep: []}}"
    arguments = ["--configfile", "smoke.yaml", "--config", "preset=default", "execution={threads: 2, lockstep: []}"]
    output = run(project, "results/plan.csv", "results/table1.csv", *arguments)
    assert f"Config: {layers}" in output
    assert layers in (project / "results/plan.md").read_text().replace("\\", "")
    for name in ("plan", "table1"):
        assert f"config: {layers}\n" in (project / f"results/logs/{name}.log").read_text()
    # The planned jobs show the values: one job per cell, with two threads.
    assert "threads: 2" in run(project, "results/figure1.pdf", "-n", *arguments)


@pytest.mark.workflow
def test_a_profile_may_give_the_config(project):
    assert "Config: config.yaml, preset gpu\n" in run(project, "results/plan.csv", "-n", "--profile", "mine")
