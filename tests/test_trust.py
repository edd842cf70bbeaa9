"""The names and texts of a config and of corpora can do nothing to a machine."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_project, snakemake
from mup_moe.config.document import read_document
from mup_moe.config.like import overlay

pytestmark = pytest.mark.workflow

HOSTILE = "$(touch pwned) `touch pwned` '; touch pwned; ' \" & | > pwned"
# Pieces of HOSTILE, and names with a meaning to Snakemake, printf, argparse and globs.
NAMES = ["$(touch pwned).txt", "; touch pwned;.txt", "`touch pwned`.txt", 'it\'s "quoted".txt', "-rf.txt", "--out.txt"]
NAMES += ["&|<>!#%s\\.txt", "a\nb.txt", " x .txt", "[a].txt", "{}.txt", "é🏳️‍🌈.txt"]
REFERENCE = "$(touch pwned) '; touch pwned; ' \"r\".csv"
FOLDERS = ["HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"]


def hostile_config(project: Path) -> dict[str, Any]:
    """Returns the config of smoke.yaml with one small figure and hostile text wherever any text is allowed."""
    document = overlay(read_document(project / "config.yaml"), read_document(project / "smoke.yaml"))
    document["corpora"]["smoke"]["files"] = ["corpus/*.txt", f"corpus/{NAMES[0]}"]
    unused = {"source": "text", "tokenizer": "bpe", "vocabulary": 300, "validation_fraction": 0.1}
    document["corpora"]["unused"] = unused | {"files": [f"{HOSTILE} {{input}} <results>"]}
    figure = document["figures"]["figure1"]
    figure["axes"] |= {"parametrization": ["mup"], "width": [8, 16]}
    figure["reference"] = REFERENCE
    document |= {"figures": {"figure1": figure}, "compositions": {}, "trends": {}, "comparisons": {}, "probes": {}}
    claim = {"says": f"{HOSTILE} {{input}} {{x}} <results>\n%s", "decided_by": HOSTILE}
    claim["drifts"] = [{"figure": "figure1", "panel": "mup", "expect": "keeps"}]
    document["claims"]["table"] = {"C1": claim}
    return document


@dataclass(frozen=True)
class Run:
    """A finished workflow in its own world of folders."""

    world: Path
    project: Path
    done: subprocess.CompletedProcess[str]
    new: list[str]  # files, relative to the world


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    world = tmp_path_factory.mktemp("world")
    # The folder's own name also reaches a shell.
    project = make_project(world / "a $(touch pwned) 'project'")
    text = (project / "smoke.txt").read_bytes()
    (project / "corpus").mkdir()
    for number, name in enumerate(NAMES):
        (project / "corpus" / name).write_bytes(text + b"%d" % number)
    (project / REFERENCE).write_text("parametrization,width,learning_rate,train_loss\nmup,8,0.015625,5.0\n")
    (project / "config.yaml").write_text(yaml.safe_dump(hostile_config(project), allow_unicode=True))
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            (world / folder).mkdir()
            patch.setenv(folder, str(world / folder))
        for name in ("MPLCONFIGDIR", "HF_HOME", "PYTHONDONTWRITEBYTECODE"):
            patch.delenv(name, raising=False)
        before = set(world.rglob("*"))
        targets = [f"results/{name}" for name in ("figure1.pdf", "claims.csv", "plan.csv", "table2.csv")]
        done = snakemake(project, "--cores", "2", *targets)
    new = [str(path.relative_to(world)) for path in world.rglob("*") if path not in before and not path.is_dir()]
    return Run(world, project, done, new)


def test_hostile_names_and_texts_work(run):
    assert run.done.returncode == 0, run.done.stdout
    assert "Traceback" not in run.done.stdout
    for name in ("figure1.pdf", "figure1/reference.csv", "plan.md", "table2.md"):
        assert (run.project / "results" / name).stat().st_size > 0
    assert "{input} {x}" in (run.project / "results/claims.md").read_text()
    assert len((run.project / "results/runs.csv").read_text().splitlines()) == 1 + 2 * 3


def test_nothing_in_a_name_or_a_text_is_executed(run):
    assert not [path for path in run.new if Path(path).name.startswith("pwned")]


def test_nothing_is_written_except_results_and_caches_that_the_readme_names(run):
    own = tuple(f"{run.project.name}/{folder}/" for folder in ("results", ".snakemake"))
    elsewhere = [path for path in run.new if not path.startswith(own)]
    # Python's own caches, next to the source.
    assert all(path.startswith(f"{run.project.name}/src/") and path.endswith(".pyc") for path in elsewhere)
    assert [path for folder in FOLDERS for path in (run.world / folder).iterdir()] == []


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("fresh") / "project")


@pytest.fixture
def project(fresh: Path, tmp_path: Path) -> Path:
    return shutil.copytree(fresh, tmp_path / "project")


def refused(project: Path, *arguments: str) -> str:
    """Runs a dry run, which must be refused without executing anything; returns its output."""
    before = set(project.rglob("*"))
    done = snakemake(project, "results/figure1.pdf", "--cores", "1", "--dry-run", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    new = {path for path in project.rglob("*") if not {".snakemake", "__pycache__"} & set(path.parts)}
    assert new <= before
    return done.stdout


GPT2 = "corpora: {{smoke: {{tokenizer: gpt2, vocabulary: null, tokenizer_files: [{}, smoke.txt]}}}}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("{setups: {small: {corpus: '$(touch pwned)'}}}", "`setups.small.corpus` is '$(touch pwned)', which `corpora`"),
        ("{figures: {'; touch pwned': {like: figure1}}}", "`figures.; touch pwned`: a name must be lower-case"),
        ("{corpora: {../../pwned: {like: smoke}}}", "`corpora.../../pwned`: a name must be lower-case"),
        ("{figures: {figure1: {reference: '{input}.csv'}}}", "a name that Snakemake does not take literally"),
        ("{corpora: {smoke: {files: ['*.txt']}}}", "a name that Snakemake does not take literally"),
        ("{corpora: {smoke: {files: ['$(touch pwned).txt']}}}", "lists $(touch pwned).txt, which is not a file"),
        (GPT2.format("src"), "`tokenizer_files` lists src, which is not a file"),
        (GPT2.format("'{input}.txt'"), "a name that Snakemake does not take literally"),
    ],
)
def test_a_hostile_name_that_cannot_work_is_refused(project, change, expected):
    (project / "{input}.txt").write_text("text")
    (project / "mine.yaml").write_text(change)
    assert expected in refused(project, "--configfile", "smoke.yaml", "mine.yaml")


def test_a_hostile_preset_is_refused(project):
    said = refused(project, "--config", "preset=$(touch pwned)")
    assert "`preset` is '$(touch pwned)' but must be one of default" in said
