"""Small models and tokens, made from config.yaml so that tests need no second set of defaults."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import numpy as np
import pytest
import torch
import yaml

from mup_moe.__main__ import main
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.config.cell import AXES, Cell, LearningRate
from mup_moe.config.document import read_document
from mup_moe.config.like import overlay
from mup_moe.config.load import validate
from mup_moe.config.settings import AnalysisSettings, AxesSettings, Config, FigureSettings
from mup_moe.ops.cell_folder import Result, keep_all
from mup_moe.ops.device import keep_compiled_code_apart
from mup_moe.ops.heartbeat import TRIES
from mup_moe.parametrization import parse_table
from mup_moe.training.device import precision_on
from mup_moe.training.request import TrainingRequest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from common import INSTRUCTIONS  # noqa: E402


def read_config(*paths: Path) -> Config:
    """Reads a config from one YAML file, or from several that are overlaid key by key."""
    return validate(overlay(*map(read_document, paths)))


CONFIG = read_config(ROOT / "config.yaml")
TABLE = parse_table(CONFIG.parametrizations)
VOCABULARY = 97

# Model settings that a modern architecture changes.
MODERN = {"gated": True, "activation": "silu", "norm": "rmsnorm", "positions": "rotary", "gates": "sigmoid"}
MODERN |= {"top_k": 2, "renormalize_gates": True, "final_norm": True}

# A slow or busy machine must not fail a test: slowness is not an error, and pytest's own timeout ends tests that hang.
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")
torch.set_num_threads(1)
keep_compiled_code_apart()
# So that the commands that tests start find the package even if it is not installed.
os.environ["PYTHONPATH"] = str(ROOT / "src")

T = TypeVar("T")


def run_step(*words: str | Path, config: Config, results: Path) -> int:
    """Runs a command on a config and a folder of results in this process; returns its exit status."""
    path = results / "given.json"
    results.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(config)))
    return main([*map(str, words), "--config", str(path), "--results", str(results)])


_SCRATCH = tempfile.TemporaryDirectory()


def results_of(**parts: Path) -> Path:
    """Makes a folder of results from links to existing folders, one for each part, such as `cells`."""
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    for name, part in parts.items():
        part.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(part.absolute())
    return folder


def tokenize_command(corpus: Mapping[str, Any], out: Path, threads: int = 1) -> list[str]:
    """Returns the command that tokenizes a corpus, given like an entry of `corpora`, into a folder."""
    results = results_of(data=out.parent)
    document = asdict(CONFIG) | {"corpora": asdict(CONFIG)["corpora"] | {out.name: dict(corpus)}}
    (results / "given.json").write_text(json.dumps(document))
    given = ["--config", str(results / "given.json"), "--results", str(results)]
    return [sys.executable, "-m", "mup_moe", "tokenize", out.name, *given, "--threads", str(threads)]


def config_of(cells: Sequence[Cell], **parts: Any) -> Config:
    """Returns a config with one figure of exactly these cells of one set-up. parts: new parts of that set-up."""
    first = cells[0]
    axes = {
        axis: tuple(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in AXES if axis != "learning_rate_of"
    }
    figure = FigureSettings(setup=first.setup, panel="width", curve="experts", axes=AxesSettings(**axes))
    setups = CONFIG.setups | {first.setup: replace(CONFIG.setups[first.setup], **parts)}
    claims = replace(CONFIG.claims, table={})
    return replace(CONFIG, setups=setups, figures={"figure1": figure}, compositions={}, trends={}, claims=claims)


def lines_after_config(errors: str) -> list[str]:
    """Returns the lines that a step wrote to stderr after the first one, which names its config."""
    return [line for line in errors.splitlines() if not line.startswith("config: ")]


def wait_until(condition: Callable[[], T], process: "subprocess.Popen[Any]") -> T:
    """Waits for a process to make a condition true; returns its value. Fails if the process ends before that."""
    while True:
        ended = process.poll() is not None
        if value := condition():
            return value
        assert not ended, f"the process ended too early, with status {process.returncode}"
        time.sleep(0.02)


def make_request(**changes: Any) -> TrainingRequest:
    """Makes a tiny training request; keywords change the cell, the model or the training."""
    setup = CONFIG.setups["small"]
    cell = Cell("small", "moe", "mup", 8, 4, 1, LearningRate("2^-6"), 0)
    model = replace(setup.model, base_width=8, base_experts=4, sequence=16, heads=2)
    training = replace(setup.training, steps=12, batch_size=4, warmup_steps=3, final_loss_steps=4, validation_batches=2)
    training = replace(training, precision="float32")
    table = changes.pop("table", TABLE)
    parts: dict[str, Any] = {"cell": cell, "model": model, "training": training}
    for name, part in parts.items():
        mine = {key: changes.pop(key) for key in list(changes) if hasattr(part, key)}
        parts[name] = replace(part, **mine)
    assert not changes, f"no part of a request has {changes}"
    return TrainingRequest(**parts, parametrization=table[parts["cell"].parametrization])


def write_result(folder: Path, summary: dict[str, Any]) -> None:
    """Keeps and publishes a result with this summary."""
    result = Result(folder)
    keep_all({result: ([["step", "train_loss"], [0, "4.5"]], summary)})
    result.publish()


# Environment variables that hide AVX-512, and with it native bfloat16, from torch and its libraries.
AVX2 = INSTRUCTIONS["avx2"]


@pytest.fixture(params=["native", "avx2"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The processor that the commands of a test see: as it is, or without AVX-512."""
    if request.param == "avx2":
        for name, value in AVX2.items():
            monkeypatch.setenv(name, value)
    return str(request.param)


@pytest.fixture
def auto_precision(processor: str) -> str:
    """The precision that `precision: auto` selects on that processor."""
    auto = replace(CONFIG.setups["small"].training, precision="auto")
    return "float32" if processor == "avx2" else precision_on(torch.device("cpu"), auto)


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Tokens with some structure to learn: a noisy cycle over the vocabulary."""
    generator = np.random.default_rng(0)
    steps = generator.choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=20_000)
    return (np.cumsum(steps) % VOCABULARY).astype(np.uint16)


def write_tokens(folder: Path, tokens: np.ndarray) -> None:
    """Writes a corpus as `tokenize` does, except for its tokenizer."""
    splits = {}
    for split, array in (("train", tokens), ("valid", tokens[:2000])):
        data = array.astype("<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(data)
        splits[split] = {"tokens": len(array), "tokens_sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"vocabulary": VOCABULARY, "end_of_text": 0, "dtype": "uint16", "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))


PARTS = ("Snakefile", "config.yaml", "environment.yml", "requirements.lock")
PARTS += ("benchmarks", "presets", "profiles", "reference", "src", "workflow")


def code_blocks(page: str, language: str) -> list[str]:
    """The blocks of code in a language on a page of Markdown, in order."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def copy_project(folder: Path) -> Path:
    """Copies the files of a user's checkout, without results."""
    folder.mkdir(exist_ok=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / part)
    return folder


def snakemake(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the real Snakemake in a folder; all of its output is in `stdout`."""
    # Merge the streams, since Snakemake prints the errors of a dry run on standard output.
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# A miniature sweep, made by the real Snakemake.
SMOKE = ("--configfile", "smoke.yaml", "--cores", "2")
TARGET = "results/figure1.pdf"


def make_project(folder: Path) -> Path:
    """Makes a checkout with the miniature sweep and its text."""
    copy_project(folder)
    shutil.copy2(ROOT / "tests" / "smoke.yaml", folder)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    generator = np.random.default_rng(0)
    (folder / "smoke.txt").write_text("\n\n".join(" ".join(generator.choice(words, 60)) for _ in range(400)))
    return folder


def smoke(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Snakemake on the miniature sweep."""
    return snakemake(project, *SMOKE, *arguments)


def edit(project: Path, path: str, value: Any) -> None:
    """Sets a key of the miniature sweep, written as a.b.c."""
    document = yaml.safe_load((project / "smoke.yaml").read_text())
    *parents, last = path.split(".")
    section = document
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    (project / "smoke.yaml").write_text(yaml.safe_dump(document))


def spec_of(request: dict[str, Any]) -> FigureSpec:
    """Builds a figure's spec from plain data: setup, panel, curve, base, axes, analysis and optionally reference."""
    axes = {axis: tuple(values) for axis, values in request["axes"].items()}
    axes["learning_rate"] = tuple(LearningRate(rate) for rate in axes["learning_rate"])
    plain = {key: request[key] for key in ("setup", "panel", "curve")} | {"reference": request.get("reference")}
    figure = FigureSettings(**plain, axes=AxesSettings(**axes))
    return FigureSpec(figure, request["base"], AnalysisSettings(**request["analysis"]))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature sweep, finished, with its figure. Do not change it."""
    project = make_project(tmp_path_factory.mktemp("finished") / "project")
    done = smoke(project, TARGET)
    assert done.returncode == 0, done.stdout
    return project


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, with its time stamps and Snakemake's records."""
    return shutil.copytree(finished, tmp_path / "project")


def read_tries(folder: Path) -> list[dict[str, Any]]:
    """Reads the log of a cell's tries, an entry for each `note_try`; lines that a kill cut short are left out."""
    tries = []
    with suppress(OSError):
        for line in (folder / TRIES).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                tries.append(json.loads(line))
    return tries
