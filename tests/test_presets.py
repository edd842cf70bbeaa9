"""The presets have the settings that they claim, and run at a tiny size."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from tokenizers import pre_tokenizers

from conftest import CONFIG, ROOT, copy_project, snakemake
from mup_moe.config.document import ConfigError, read_document
from mup_moe.config.jobs import jobs
from mup_moe.config.like import overlay
from mup_moe.config.load import read_preset, validate
from mup_moe.config.settings import Config
from mup_moe.data.tokens import END_OF_TEXT
from mup_moe.sweep import Sweep
from mup_moe.tables import plan

LARGE = ("authors", "gpu", "gpu-visit", "paper")  # larger sweeps than the default
NAMES = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


def preset(name: str) -> Config:
    return validate(overlay(read_document(ROOT / "config.yaml"), read_preset(ROOT / "presets", name)))


def test_all_presets_exist():
    assert set(NAMES) == {*LARGE, "architectures", "evening", "granularity", "power", "switch"}


def test_the_default_is_the_config_itself():
    assert preset("default") == CONFIG


def test_an_unknown_name_is_refused_with_a_list_of_presets():
    known = "default, architectures, authors, evening, gpu, gpu-visit, granularity, paper, power, switch"
    with pytest.raises(ConfigError, match=f"`preset` is 'huge' but must be one of {known}"):
        read_preset(ROOT / "presets", "huge")


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_has_the_papers_figures_and_probes(name):
    config = preset(name)
    assert {"figure1", "figure2a", "figure2b", "figure3", "figure4"} <= set(config.figures)
    assert {"coordinate_check", "lemma_b1"} <= set(config.probes)
    assert config.figures["figure1"].axes.parametrization == ("sp", "simplep", "mup")
    for figure in config.figures.values():
        model = config.setups[figure.setup].model
        if figure.kind == "sensitivity":
            assert figure.axes.width == (model.base_width,)
        elif figure.curve == "width":
            assert figure.axes.experts == (1 if figure.axes.architecture == ("dense",) else model.base_experts,)
            assert figure.axes.granularity == (1,)
            assert max(figure.axes.width) >= 8 * model.base_width
        else:
            # At the base width all parametrizations are one model.
            assert min(figure.axes.width) > model.base_width
            base = {"experts": model.base_experts, "granularity": 1}[figure.curve]
            assert base in getattr(figure.axes, figure.curve)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_measures_the_controls_of_every_claim(name):
    config = preset(name)
    tests = [drift for claim in config.claims.table.values() for drift in claim.drifts if drift.expect == "keeps"]
    assert tests
    for test in tests:
        figure, other = config.figures[test.figure], config.figures[test.controls.figure]
        assert test.panel in figure.axes.values(figure.panel)
        assert set(test.controls.panels) <= set(other.axes.values(other.panel))
        # The excess is measured at the far end, over seeds that both have.
        assert max(getattr(figure.axes, figure.curve)) == max(getattr(other.axes, figure.curve))
        assert figure.axes.seed == other.axes.seed
        assert figure.axes.learning_rate == other.axes.learning_rate


@pytest.mark.parametrize("name", NAMES)
def test_no_two_presets_give_different_settings_to_the_same_cells(name):
    config = preset(name)
    for other in [CONFIG, *(preset(other) for other in NAMES if other != name)]:
        for figure in config.figures.values():
            setup = other.setups.get(figure.setup)
            assert setup is None or setup == config.setups[figure.setup]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_enough_for_one_epoch(name):
    config = preset(name)
    rows = {row.sweep: row for row in plan.plan(Sweep(config), plan.Machine.read(ROOT / "benchmarks" / "step.csv"))}
    for figure in config.figures.values():
        setup = config.setups[figure.setup]
        kept = 1 - config.corpora[setup.corpus].validation_fraction
        # One corpus is meant to be seen more than once.
        assert rows[setup.corpus].tokens * kept > setup.tokens_per_run or setup.corpus == "repeated"


def test_authors_has_the_settings_of_their_public_code():
    config = preset("authors")
    figure = config.figures["figure1"]
    setup = config.setups[figure.setup]
    corpus, model, training = config.corpora[setup.corpus], setup.model, setup.training
    assert figure.axes.width == (64, 128, 256, 512)
    rates = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
    assert figure.axes.learning_rate == rates
    assert (model.base_width, model.blocks, model.heads, model.head_size) == (64, 4, 4, None)
    assert (model.base_experts, model.top_k, model.ffn_ratio) == (8, 1, 3)
    assert (model.activation, model.capacity_factor) == ("relu", 1.0)
    assert (training.steps, training.batch_size, model.sequence) == (25_000, 64, 128)
    assert setup.tokens_per_step == 8_192
    assert setup.tokens_per_run == 204_800_000
    assert (training.warmup_steps, training.final_lr_fraction) == (250, 0.1)
    assert (training.adam_betas, training.adam_eps, training.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert training.clip_norm == 1.0
    assert (model.init, model.init_scale, model.embedding_multiplier, model.logit_multiplier) == (
        *("constant", 0.1, 10.0, 0.1),
    )
    assert model.scale_residual_init
    assert (model.balance_loss, model.z_loss) == (0.01, 0.0)
    assert not model.final_norm
    assert not model.renormalize_gates
    assert training.precision == "bfloat16"
    assert training.final_loss_steps == 100
    assert config.analysis.loss == "train_loss"
    assert (corpus.source, corpus.tokenizer) == ("c4", "gpt2")
    assert figure.reference is not None
    published = pd.read_csv(ROOT / figure.reference)
    assert set(published["width"]) <= set(figure.axes.width)
    assert set(published["learning_rate"]) <= set(figure.axes.learning_rate)
    for name in config.figures.keys() - {"figure1"}:
        assert config.figures[name].reference is None


def test_paper_covers_the_range_of_the_paper():
    config = preset("paper")
    axes = {name: figure.axes for name, figure in config.figures.items()}
    assert max(axes["figure1"].width) == 2048
    assert axes["figure2a"].experts == (1, 2, 4, 8, 16, 32)
    assert axes["figure2b"].granularity == (1, 2, 4, 8, 16, 32)
    assert all(len(a.seed) > 1 for a in axes.values())
    assert config.execution.device == "cuda"
    # Its settings are the authors', except where it says otherwise.
    ours, theirs = config.setups["paper"], preset("authors").setups["authors"]
    assert ours.model == theirs.model
    assert {key for key, value in vars(ours.training).items() if getattr(theirs.training, key) != value} == {
        "validation_batches"
    }
    assert config.corpora["c4"] == preset("authors").corpora["c4"]


def test_gpu_is_a_sweep_for_one_device():
    config = preset("gpu")
    figure = config.figures["figure1"]
    setup = config.setups[figure.setup]
    assert len(figure.cells()) == 108
    assert max(figure.axes.width) >= 512
    assert (setup.training.steps, setup.tokens_per_step) == (3_000, 8_192)
    assert config.corpora[setup.corpus].source == "python"


def make(project: Path, *arguments: str) -> str:
    """Runs Snakemake, which must succeed; returns its output."""
    done = snakemake(project, "--cores", "2", *arguments)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The workflow, with text in C4's format and a tokenizer in GPT-2's."""
    project = copy_project(tmp_path_factory.mktemp("presets") / "project")
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    (project / "en").mkdir()
    for shard in range(2):
        with gzip.open(project / f"en/c4-train.{shard:05}-of-01024.json.gz", "wt") as file:
            for number in range(100):
                text = " ".join(generator.choice(words, 60))
                record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.com/{number}"}
                file.write(json.dumps(record) + "\n")
    merges = [("e", "t"), ("et", "a"), ("t", "h"), ("Ġ", "z"), ("l", "p")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), END_OF_TEXT]
    (project / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (project / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    return project


def write_override(project: Path, setup: str, figures: dict[str, dict[str, list]]) -> None:
    """Reduces a preset to a few steps of tiny models on the project's own shards."""
    document = {
        "corpora": {
            "c4": {
                "files": ["en/c4-train.*.json.gz"],
                "tokenizer_files": ["vocab.json", "merges.txt"],
                "max_bytes": None,
                "validation_fraction": 0.2,
            }
        },
        "setups": {
            setup: {
                "model": {"blocks": 1, "sequence": 16},
                "training": {
                    "steps": 4,
                    "batch_size": 4,
                    "warmup_steps": 1,
                    "final_loss_steps": 2,
                    "validation_batches": 1,
                },
            }
        },
        "figures": {name: {"axes": axes} for name, axes in figures.items()},
        "execution": {"device": "cpu"},
    }
    (project / "few.yaml").write_text(yaml.safe_dump(document))


@pytest.mark.workflow
@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_of_a_preset_resolves(name, project):
    said = make(project, "results/plan.csv", "results/figure1.pdf", "--dry-run", "--config", f"preset={name}")
    config = preset(name)
    every = jobs({figure: settings.cells() for figure, settings in config.figures.items()}, config.execution.lockstep)
    wanted = set(config.figures["figure1"].cells())
    assert sum(len(cells) for cells in every.values() if wanted.issuperset(cells)) == len(wanted)
    assert set(re.findall(r"^train_(\S+) +1$", said, re.M)) == {
        job for job, cells in every.items() if wanted.issuperset(cells)
    }


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("name", "figure", "axes"),
    [
        ("authors", "figure1", {"width": [64, 128], "learning_rate": [1e-3]}),
        (
            *("paper", "figure2b-authors"),
            {"width": [128], "granularity": [1, 4], "learning_rate": ["2^-8"], "seed": [0, 1]},
        ),
    ],
)
def test_a_preset_runs_from_c4_to_figure(name, figure, axes, project):
    write_override(project, name, {figure: axes})
    targets = [f"results/{figure}.pdf", "results/table2.csv", "results/plan.csv"]
    said = make(project, *targets, "--configfile", "few.yaml", "--config", f"preset={name}")
    runs = pd.read_csv(project / f"results/{figure}/runs.csv")
    assert set(runs["setup"]) == {name}
    assert set(runs["status"]) == {"finished"}
    for axis in ("width", "granularity", "seed"):
        if axis in axes:
            assert set(runs[axis]) == set(axes[axis])
    vocabulary = json.loads((project / "vocab.json").read_text())
    manifest = json.loads((project / "results/data/c4/manifest.json").read_text())
    assert manifest["vocabulary"] == len(vocabulary)
    # The actual cost is the planned one.
    planned = pd.read_csv(project / "results/plan.csv").set_index("sweep").loc[figure]
    assert planned["cells"] == len(runs)
    assert planned["flops"] == runs["flops"].sum()
    assert planned["tokens"] == runs["tokens"].sum()
    assert figure in said
    table = pd.read_csv(project / "results/table2.csv")
    keys = ["setup", "architecture", "width", "experts", "granularity"]
    columns = ["parameters", "active_parameters", "tokens", "flops"]
    merged = runs.merge(table, on=keys, suffixes=("", "_of_table"), how="left")
    for column in columns:
        assert (merged[column] == merged[f"{column}_of_table"]).all()
    assert (project / f"results/{figure}.pdf").stat().st_size > 0
