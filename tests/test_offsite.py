"""Cells run on a machine without Snakemake: export, train there, pack, bring home, and Snakemake agrees."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from conftest import ROOT, copy_project, make_request, snakemake, write_result
from mup_moe.__main__ import main
from mup_moe.analysis.aggregate import collect
from mup_moe.files import read_json
from mup_moe.offsite.job_list import read_jobs
from mup_moe.provenance import versions
from mup_moe.training.cell_files import CellFiles
from mup_moe.training.code import code_digest
from mup_moe.training.result import HISTORY, SUMMARY, Result, read_result
from test_analysis import summary_of

SMALL = """
corpora:
  tiny: {like: python, packages: [], max_bytes: 1000000, vocabulary: 300, validation_fraction: 0.2}
setups:
  tiny:
    like: small
    corpus: tiny
    training: {steps: 6, warmup_steps: 1, final_loss_steps: 2, validation_batches: 1, batch_size: 4}
figures:
  figure1:
    setup: tiny
    axes: {parametrization: [sp, mup], width: [32, 64], learning_rate: [2^-7, 2^-6, 2^-5], seed: [0]}
"""
SNAKEMAKE = ("--cores", "1", "--configfile", "small.yaml")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkout with tokens, and no cell."""
    folder = copy_project(tmp_path_factory.mktemp("home") / "project")
    (folder / "small.yaml").write_text(SMALL)
    done = snakemake(folder, "results/data/tiny/manifest.json", *SNAKEMAKE)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The environment of a machine that has neither Snakemake nor what validates the config."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        "import sys\nfor name in ('snakemake', 'pydantic', 'datasets'):\n    sys.modules[name] = None\n"
    )
    return os.environ | {"PYTHONPATH": f"{folder}:{ROOT / 'src'}"}


def command(
    folder: Path, *arguments: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    asked = [sys.executable, "-m", "mup_moe", *map(str, arguments)]
    return subprocess.run(asked, cwd=folder, env=env, check=False, capture_output=True, text=True)


def export(folder: Path) -> subprocess.CompletedProcess[str]:
    config = ("--config", "config.yaml", "small.yaml", "--figures", "figure1")
    return command(folder, "export-jobs", *config, "--out", "results/jobs.jsonl")


@pytest.mark.workflow
def test_cells_trained_elsewhere_are_as_good_as_trained_at_home(home, bare, tmp_path):
    exported = export(home)
    assert exported.returncode == 0, exported.stderr
    assert "12 cells in 4 jobs" in exported.stdout
    # Away: the list, the tokens and the source, nothing else.
    away = tmp_path / "away"
    (away / "results").mkdir(parents=True)
    (away / "results" / "data").symlink_to(home / "results" / "data")
    run = ("run-jobs", "--jobs", home / "results" / "jobs.jsonl", "--device", "cpu")
    idle = command(away, *run, "--minutes", "0", env=bare)
    assert idle.returncode == 0
    assert "0 of 12 cells are done" in idle.stdout
    worked = command(away, *run, "--archive", "packed", "--archive-bytes", "0", env=bare)
    assert worked.returncode == 0, worked.stdout + worked.stderr
    assert "12 of 12 cells are done" in worked.stdout
    archives = sorted((away / "packed").glob("*.tar.gz"))
    assert len(archives) == 12
    # Run again, it trains nothing.
    before = {path: path.stat().st_mtime_ns for path in away.glob("results/cells/*/summary.json")}
    assert "12 of 12 cells are done" in command(away, *run, env=bare).stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Home: the first archive only, then all of them.
    assert command(home, "import-cells", archives[0]).returncode == 0
    there = len(list(home.glob("results/cells/*/summary.json")))
    assert 0 < there < 12
    export(home)
    assert sum(len(job.requests) for job in read_jobs(home / "results" / "jobs.jsonl")) == 12 - there
    assert command(home, "import-cells", *archives).returncode == 0
    done = snakemake(home, "results/figure1.pdf", *SNAKEMAKE)
    assert done.returncode == 0, done.stdout
    assert "train_" not in done.stdout
    assert (home / "results" / "figure1.pdf").exists()
    for path in away.glob("results/cells/*/summary.json"):
        assert read_json(home / "results" / "cells" / path.parent.name / path.name) == read_json(path)


def archive_of(path: Path, files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            tar.addfile(member, io.BytesIO(content))
    return path


CELL = "small_moe_mup_w32_e8_g1_lr2^-6_s0"


@pytest.mark.parametrize(
    ("files", "kind", "sentence"),
    [
        ({"../evil": b"x"}, tarfile.REGTYPE, "not an archive of cells"),
        ({f"{CELL}/../../evil": b"x"}, tarfile.REGTYPE, "not an archive of cells"),
        ({f"{CELL}/summary.json": b""}, tarfile.SYMTYPE, "not an archive of cells"),
        ({f"{CELL}/summary.json": b"{}"}, tarfile.REGTYPE, "only a part"),
        ({f"{CELL}/summary.json": b"{}", f"{CELL}/history.csv": b"step\n"}, tarfile.REGTYPE, "is not whole"),
    ],
)
def test_an_archive_of_anything_else_is_refused(tmp_path, capsys, files, kind, sentence):
    path = archive_of(tmp_path / "cells.tar.gz", files, kind)
    assert main(["import-cells", str(path), "--results", str(tmp_path / "results")]) == 1
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("results/cells/*/summary.json"))
    assert not (tmp_path / "evil").exists()


def test_a_byte_that_changed_on_the_way_is_noticed_and_a_result_is_not_replaced(tmp_path, capsys):

    def files_of(fingerprint: str) -> dict[str, bytes]:
        folder = tmp_path / fingerprint / CELL
        write_result(folder, {"id": CELL, "fingerprint": fingerprint, "valid_loss": 3.5})
        return {f"{CELL}/{name}": (folder / name).read_bytes() for name in ("history.csv", "summary.json")}

    files = files_of("a")
    whole = archive_of(tmp_path / "whole.tar.gz", files).read_bytes()
    asked = ["--results", str(tmp_path / "results")]
    path = tmp_path / "cells.tar.gz"
    for place in range(40, len(whole), 7):  # behind the name that gzip notes
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert main(["import-cells", str(path), *asked]) == 1
    assert not list(tmp_path.glob("results/cells/*/summary.json"))
    for _ in range(2):  # twice is as good as once
        assert main(["import-cells", str(tmp_path / "whole.tar.gz"), *asked]) == 0
    kept = (tmp_path / "results/cells" / CELL / "summary.json").read_bytes()
    capsys.readouterr()
    assert main(["import-cells", str(archive_of(path, files_of("b"))), *asked]) == 1
    assert "delete that folder" in capsys.readouterr().err
    assert (tmp_path / "results/cells" / CELL / "summary.json").read_bytes() == kept


def test_a_result_of_another_python_and_torch_is_this_cells_and_keeps_its_versions(tmp_path, capsys):
    request = make_request()
    cell, results = request.cell, tmp_path / "results"
    fingerprint = request.fingerprint("tokens", code_digest())
    away = {"device": "cuda", "versions": versions("numpy") | {"python": "3.12.1", "torch": "2.11.0+cu126"}}
    made_of = {"request": request.digest, "tokens_digest": "tokens", "code": code_digest(), "fingerprint": fingerprint}
    folder = tmp_path / "away" / cell.id
    write_result(folder, summary_of(cell, 3.5, **away, **made_of))
    files = {f"{cell.id}/{name}": (folder / name).read_bytes() for name in (HISTORY, SUMMARY)}
    path = archive_of(tmp_path / "cells.tar.gz", files)
    assert main(["import-cells", str(path), "--results", str(results)]) == 0
    home = results / "cells"
    assert Result(home / cell.id).is_of(fingerprint)
    assert read_result(home / cell.id)["versions"] == away["versions"]
    # A job that Snakemake runs for the cell all the same has nothing to train.
    assert CellFiles(request, "tokens", home).publish()
    capsys.readouterr()
    (row,) = collect([(cell.id, request.digest)], home)
    assert (row["device"], row["torch"], row["fingerprint"]) == ("cuda", "2.11.0+cu126", fingerprint)
    assert capsys.readouterr().err == ""


def test_a_damaged_archive_or_list_ends_in_one_sentence(tmp_path, capsys):
    (tmp_path / "cells.tar.gz").write_bytes(b"\x1f\x8bnothing")
    assert main(["import-cells", str(tmp_path / "cells.tar.gz"), "--results", str(tmp_path)]) == 1
    (tmp_path / "jobs.jsonl").write_text("{}\n")
    assert main(["run-jobs", "--jobs", str(tmp_path / "jobs.jsonl")]) == 1
    assert main(["export-jobs", "--config", str(ROOT / "config.yaml"), "--figures", "figure9", "--out", "x"]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 3
    assert all(line.startswith("mup-moe: ") for line in errors)


def test_a_job_that_fails_is_told_and_the_others_go_on(home, tmp_path):
    shutil.rmtree(home / "results" / "cells", ignore_errors=True)
    export(home)
    run = ("run-jobs", "--jobs", home / "results" / "jobs.jsonl", "--device", "cpu")
    none = command(tmp_path, *run)
    assert none.returncode == 1
    assert "results/data/tiny" in none.stderr
    shutil.copytree(home / "results" / "data", tmp_path / "results" / "data")
    tokens = tmp_path / "results" / "data" / "tiny" / "train.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = command(tmp_path, *run)
    assert damaged.returncode == 1
    jobs = read_jobs(home / "results" / "jobs.jsonl")
    assert damaged.stdout.count("failed with 1") == len(jobs)
    assert "is damaged" in (tmp_path / "results" / "logs" / "train" / f"{jobs[0].name}.log").read_text()


@pytest.mark.workflow
def test_gpu_check_runs_from_end_to_end_where_the_device_is_a_cpu(home, bare, tmp_path):
    shutil.rmtree(home / "results" / "cells", ignore_errors=True)
    export(home)
    (tmp_path / "gpu").mkdir()
    shutil.copy2(home / "results" / "jobs.jsonl", tmp_path / "gpu")
    (tmp_path / "data").symlink_to(home / "results" / "data")
    request = subprocess.run([sys.executable, ROOT / "benchmarks" / "variants.py"], check=True, capture_output=True)
    (tmp_path / "gpu" / "request.json").write_bytes(request.stdout)
    small = {
        "STEP": "--widths 16 --architectures moe --seconds 0.1 --no-compile",
        "SWEEP": "--cells 2 --steps 3 --rounds 1 --width 16",
        "GROWTH": "--axes replicas --values 1 2 --architectures moe --seconds 0.1 --width 16",
    }
    where = {"PYTHON": sys.executable, "DEVICE": "cpu", "RESULTS": str(tmp_path), "MINUTES": "5"}
    done = subprocess.run(
        [ROOT / "tests" / "gpu" / "check.sh"], env=bare | where | small, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 of 12 cells are done" in done.stdout
    made = {path.name for path in (tmp_path / "gpu" / "out").iterdir()}
    assert made == {"step.csv", "sweep.csv", "growth.csv", "cells-000.tar.gz"}
    failed = subprocess.run(
        [ROOT / "tests" / "gpu" / "check.sh"],
        env=bare | where | {"PARTS": "cells", "FROM": str(tmp_path / "nowhere")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1
    assert "nowhere" in failed.stderr
