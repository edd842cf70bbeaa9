"""Cells trained on a machine without Snakemake: exported, trained, packed, imported, and accepted by Snakemake."""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, copy_project, make_request, snakemake, write_result
from mup_moe.__main__ import main
from mup_moe.analysis.aggregate import run_rows
from mup_moe.config.document import read_document
from mup_moe.config.like import overlay
from mup_moe.config.load import read_preset, validate
from mup_moe.files import read_json
from mup_moe.model.inventory import ModelShape
from mup_moe.model.metrics import METRICS
from mup_moe.ops.cell_folder import HISTORY, SUMMARY, CellFiles, Result, keep_all, read_result
from mup_moe.ops.offsite import run_jobs
from mup_moe.ops.offsite.archive import CellArchives, read_archive
from mup_moe.ops.offsite.job_list import ListedJob, read_jobs
from mup_moe.ops.offsite.job_time import JobTimes
from mup_moe.provenance import versions
from mup_moe.training.memory import stack_bytes
from mup_moe.training.version import VERSION
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
    """A checkout with tokens, but no cells."""
    folder = copy_project(tmp_path_factory.mktemp("home") / "project")
    (folder / "small.yaml").write_text(SMALL)
    done = snakemake(folder, "results/data/tiny/manifest.json", *SNAKEMAKE)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The environment of a machine that has neither Snakemake nor the package that validates the config."""
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
def test_cells_trained_elsewhere_are_as_good_as_those_trained_here(home, bare, tmp_path):
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
    archives = sorted((away / "packed").glob("cells-*.tar.gz"))
    assert len(archives) == 12
    # A rerun trains nothing.
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
        ({f"{CELL}/summary.json": b"{}"}, tarfile.REGTYPE, "only part"),
        ({f"{CELL}/summary.json": b"{}", f"{CELL}/history.csv": b"step\n"}, tarfile.REGTYPE, "is damaged"),
    ],
)
def test_an_archive_of_anything_else_is_refused(tmp_path, capsys, files, kind, sentence):
    path = archive_of(tmp_path / "cells.tar.gz", files, kind)
    assert main(["import-cells", str(path), "--results", str(tmp_path / "results")]) == 1
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("results/cells/*/summary.json"))
    assert not (tmp_path / "evil").exists()


def test_a_byte_changed_in_transit_is_noticed_and_a_result_is_not_replaced(tmp_path, capsys):

    def files_of(fingerprint: str) -> dict[str, bytes]:
        folder = tmp_path / fingerprint / CELL
        write_result(folder, {"id": CELL, "fingerprint": fingerprint, "valid_loss": 3.5})
        return {f"{CELL}/{name}": (folder / name).read_bytes() for name in ("history.csv", "summary.json")}

    files = files_of("a")
    whole = archive_of(tmp_path / "whole.tar.gz", files).read_bytes()
    asked = ["--results", str(tmp_path / "results")]
    path = tmp_path / "cells.tar.gz"
    for place in range(40, len(whole), 7):  # after the name that gzip stores
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


def test_a_result_of_another_python_and_torch_is_accepted_and_keeps_its_versions(tmp_path, capsys):
    request = make_request()
    cell, results = request.cell, tmp_path / "results"
    fingerprint = request.fingerprint("tokens")
    away = {"device": "cuda", "versions": versions("numpy") | {"python": "3.12.1", "torch": "2.11.0+cu126"}}
    made_of = {"request": request.digest, "tokens_digest": "tokens", "version": VERSION, "fingerprint": fingerprint}
    folder = tmp_path / "away" / cell.id
    write_result(folder, summary_of(cell, 3.5, **away, **made_of))
    files = {f"{cell.id}/{name}": (folder / name).read_bytes() for name in (HISTORY, SUMMARY)}
    path = archive_of(tmp_path / "cells.tar.gz", files)
    assert main(["import-cells", str(path), "--results", str(results)]) == 0
    home = results / "cells"
    assert Result(home / cell.id).is_of(fingerprint)
    assert read_result(home / cell.id)["versions"] == away["versions"]
    # If Snakemake runs a job for the cell anyway, that has nothing to train.
    assert CellFiles(request, "tokens", home).publish()
    capsys.readouterr()
    (row,) = run_rows([(cell.id, request.digest)], home)
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


def test_a_job_that_fails_is_reported_and_the_others_continue(home, tmp_path):
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


# ---------------------------------------------------------------- archives that only grow


def cells_in(folder: Path) -> dict[str, bytes]:
    return {
        cell.id: files["summary.json"] for path in folder.glob("cells-*.tar.gz") for cell, files in read_archive(path)
    }


def make_cells(folder: Path, count: int, rows: int = 3) -> list[Path]:
    generator = np.random.default_rng(0)
    folders = [folder / f"small_moe_mup_w32_e8_g1_lr2^-6_s{seed}" for seed in range(count)]
    for seed, path in enumerate(folders):
        # Like the numbers of a history: nine digits, hardly any two of them equal.
        history = [[step, *(f"{value:.9g}" for value in generator.random(7))] for step in range(rows)]
        result = Result(path)
        keep_all(
            {result: ([["step", "learning_rate", *METRICS], *history], {"id": path.name, "fingerprint": f"{seed}"})}
        )
    return folders


@given(parts=st.lists(st.integers(0, 11), max_size=6), part_bytes=st.sampled_from([0, 900, 2000, 10**9]))
@settings(max_examples=25)
def test_every_cell_is_packed_once_in_any_order(tmp_path_factory, parts, part_bytes):
    folder = tmp_path_factory.mktemp("packed")
    cells = make_cells(folder / "cells", 12)
    expected: set[str] = set()
    for number in parts:
        # A new object each time, as after a kill in between.
        before = {path: path.read_bytes() for path in folder.glob("cells-*.tar.gz")}
        written = CellArchives(folder, part_bytes).add(cells[:number])
        expected |= {path.name for path in cells[:number]}
        assert set(cells_in(folder)) == expected
        assert {path for path in before if path.read_bytes() != before[path]} <= set(written)
        assert all(len(content) < part_bytes for path, content in before.items() if path in written)
    names = [cell.id for path in folder.glob("cells-*.tar.gz") for cell, _ in read_archive(path)]
    assert len(names) == len(set(names))


def test_a_kill_while_cells_are_packed_loses_no_packed_cell(tmp_path, monkeypatch):
    cells = make_cells(tmp_path / "cells", 6)
    archives = CellArchives(tmp_path, 10**9)
    archives.add(cells[:4])
    replace = Path.replace

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        archives.add(cells)
    monkeypatch.setattr(Path, "replace", replace)
    assert set(cells_in(tmp_path)) == {path.name for path in cells[:4]}
    CellArchives(tmp_path, 10**9).add(cells)
    assert set(cells_in(tmp_path)) == {path.name for path in cells}


def test_the_files_that_return_from_a_visit_fit(tmp_path):
    """The limit of docs/offsite.md is eight files of 16 MiB: archives, logs, and what look writes."""
    config = validate(overlay(read_document(ROOT / "config.yaml"), read_preset(ROOT / "presets", "gpu")))
    first = {cell for figure in ("figure1", "attribution") for cell in config.figures[figure].cells()}
    rows = config.setups["gpu"].training.steps
    options = argparse.ArgumentParser()
    run_jobs.add_arguments(options)
    full = options.parse_args(["--jobs", "x"]).archive_bytes
    job = 27
    CellArchives(tmp_path, 10**9).add(make_cells(tmp_path / "cells", job, rows))
    (packed,) = tmp_path.glob("*.tar.gz")
    size = packed.stat().st_size
    # An archive that is not quite full takes one more job.
    assert full + size < 16 * 2**20
    assert len(first) / job * size / full <= 5


def test_the_files_that_travel_to_a_visit_fit():
    """The limit is 64 MiB: the checkout, two lists, and tokens, at most 0.8 bytes for each byte of text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a clone, so the files of the checkout are not known")
    checkout = sum(
        path.lstat().st_size for name in listed.stdout.split("\0") if name and (path := ROOT / name).exists()
    )
    text = read_preset(ROOT / "presets", "gpu-visit")["corpora"]["python-large"]["max_bytes"]
    assert checkout < 13_000_000
    assert checkout + 2_000_000 + 0.8 * text < 64 * 2**20


# ---------------------------------------------------------------- which jobs are started


def job_of(*widths: int, steps: int = 100) -> ListedJob:
    requests = [make_request(width=width, steps=steps, seed=seed) for width in widths for seed in (0, 1, 2)]
    return ListedJob("job", "figure1", "tiny", "digest", tuple(requests))


def test_a_jobs_time_is_known_once_one_is_measured():
    times = JobTimes({"tiny": 97}, None)
    job, larger, longer = job_of(8), job_of(16), job_of(8, steps=300)
    assert times.estimate(job) is None
    times.learn(job, seconds=50.0, steps_per_second=4.0)
    # 25 s of steps and 25 s of startup; estimates of steps have a margin, to be too long rather than too short.
    assert times.estimate(job) == pytest.approx(25 + 1.15 * 25)
    assert times.estimate(longer) == pytest.approx(25 + 1.15 * 75)
    assert times.estimate(larger) > times.estimate(job)
    assert times.estimate(replace(job, requests=job.requests[:1])) < times.estimate(job)
    both = job_of(8, 16)
    parts = times.estimate(job) + times.estimate(larger)
    assert times.estimate(both) == pytest.approx(parts - 25)


def test_what_look_measured_gives_an_estimate_before_any_job_has_run(tmp_path):
    job = job_of(8)
    shape = ModelShape.of(job.requests[0].cell, job.requests[0].model, 97)
    row = {"part": "stack", "bytes": stack_bytes(shape, job.requests[0], 3), "step_ms": 200.0}
    path = tmp_path / "look.jsonl"
    path.write_text(json.dumps({"part": "facts"}) + "\n" + json.dumps(row) + "\n")
    assert JobTimes({"tiny": 97}, path).estimate(job) == pytest.approx(60 + 1.15 * 20)
    # A line that a kill cut short does not affect the others, and a missing file is no error.
    path.write_text(json.dumps(row) + "\n" + json.dumps(row)[:-9])
    assert JobTimes({"tiny": 97}, path).estimate(job) == pytest.approx(60 + 1.15 * 20)
    assert JobTimes({"tiny": 97}, tmp_path / "nowhere").estimate(job) is None


def test_a_job_that_cannot_end_in_time_is_not_started_unless_it_keeps_checkpoints(home, tmp_path):
    shutil.rmtree(home / "results" / "cells", ignore_errors=True)
    export(home)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "data").symlink_to(home / "results" / "data")
    (tmp_path / "look.jsonl").write_text('{"part": "stack", "bytes": 1000000, "step_ms": 1e9}\n')
    run = ("run-jobs", "--jobs", home / "results" / "jobs.jsonl", "--device", "cpu", "--measured", "look.jsonl")
    left_out = command(tmp_path, *run, "--minutes", "10000", "--checkpoint-seconds", "inf")
    assert left_out.returncode == 0, left_out.stderr
    assert left_out.stdout.count("not started") == 4
    assert "0 of 12 cells are done" in left_out.stdout
    begun = command(tmp_path, *run, "--minutes", "10000")
    assert "12 of 12 cells are done" in begun.stdout


def test_a_cell_is_exported_once_with_all_of_its_width(home):
    figures = ("--figures", "figure1", "attribution", "figure3", "figure2b")
    (home / "results" / "data" / "python-large").symlink_to(home / "results" / "data" / "tiny")
    done = command(home, "export-jobs", "--preset", "gpu", *figures, "--out", "results/gpu.jsonl")
    assert done.returncode == 0, done.stderr
    listed = read_jobs(home / "results" / "gpu.jsonl")
    ids = [request.cell.id for job in listed for request in job.requests]
    assert len(ids) == len(set(ids))
    assert [(job.figure, len(job.requests)) for job in listed[:8]] == [("figure1", 27)] * 4 + [("attribution", 27)] * 4
    assert [job.requests[0].cell.width for job in listed[:4]] == [64, 128, 256, 512]
    assert f"({(home / 'results' / 'gpu.jsonl').stat().st_size / 1e6:.1f} MB)" in done.stdout


# ---------------------------------------------------------------- the visit


CHECK = ROOT / "tests" / "gpu" / "check.sh"


@pytest.fixture
def visit(home, bare, tmp_path):
    """The environment of a visit with a CPU instead of a GPU, with the small list and nothing trained."""
    shutil.rmtree(home / "results" / "cells", ignore_errors=True)
    export(home)
    (tmp_path / "gpu").mkdir()
    shutil.copy2(home / "results" / "jobs.jsonl", tmp_path / "gpu" / "gpu-visit.jsonl")
    (tmp_path / "data").symlink_to(home / "results" / "data")
    small = {"LOOK": "--stacks 3x32 1x64 --profiled 1x64 --blocks 1", "LOOK_SECONDS": "1000000"}
    small |= {"TRAIN_SECONDS": "1000000"}
    where = {"PYTHON": sys.executable, "DEVICE": "cpu", "RESULTS": str(tmp_path), "OUT": str(tmp_path / "out")}
    return bare | where | small


def test_the_two_commands_of_a_visit_fit_in_its_quarter_of_an_hour():
    seconds = {name: int(value) for name, value in re.findall(r"\{(\w+_SECONDS):=(\d+)\}", CHECK.read_text())}
    # Each may take half a minute longer to end; starting the machine takes about 100 s.
    assert set(seconds) == {"LOOK_SECONDS", "TRAIN_SECONDS"}
    assert 100 + sum(seconds.values()) + 2 * 30 <= 15 * 60


@pytest.mark.workflow
def test_a_visit_that_is_killed_twice_returns_whole_cells_and_finishes(home, visit, tmp_path):
    """Makes the whole visit on a CPU; the moments of the kills are random and printed."""
    generator = random.Random()
    seen: set[str] = set()
    for attempt in range(3):
        process = subprocess.Popen(
            [CHECK], env=visit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        if attempt < 2:
            # A random number of its lines and a random moment later, which works on a machine of any speed.
            lines, moment = generator.randrange(28), generator.random()
            print(f"attempt {attempt}: killed {moment:.3f} s after line {lines}")
            for _ in range(lines):
                process.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # `timeout` puts its command into its own process group.
            for pid in pids_in(tmp_path):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(os.getpgid(int(pid)), signal.SIGKILL)
        said = process.communicate()[0]
        for path in (tmp_path / "out").glob("look.jsonl"):
            whole = path.read_text().splitlines(keepends=True)
            assert all(json.loads(line) for line in whole if line.endswith("\n"))
        packed = set(cells_in(tmp_path / "out"))
        assert packed >= seen, "what was packed stays packed"
        seen = packed
    assert process.returncode == 0, said
    assert "12 of 12 cells are done" in said
    made = sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))
    assert made == ["cells-000.tar.gz", "kernels-1x64.csv", "logs.tar.gz", "look.jsonl"]
    archives = list((tmp_path / "out").glob("cells-*.tar.gz"))
    assert command(home, "import-cells", *archives).returncode == 0
    done = snakemake(home, "results/figure1.pdf", *SNAKEMAKE)
    assert done.returncode == 0, done.stdout
    assert "train_" not in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "look.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"facts", "smoke", "rates", "attention", "stack", "kernels"}
    assert [row["which"] for row in rows if row["part"] == "stack"] == ["3x32", "1x64"]
    assert all(row["step_ms"] > 0 and row["tokens_per_second"] > 0 for row in rows if row["part"] == "stack")
    assert all(row["same_bits"] for row in rows if row["part"] == "smoke")


def pids_in(folder: Path) -> list[str]:
    """Returns the ids of the processes that name a folder in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_a_failing_part_of_a_visit_sets_its_status_and_the_rest_is_tried(visit, tmp_path):
    done = subprocess.run(
        [CHECK, "look", "train"],
        env=visit | {"LOOK": "--stacks 99x32", "LOOK_SECONDS": "0", "FROM": str(tmp_path / "nowhere")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stderr.splitlines() if "nowhere" in line] == ["look", "mup-moe"]
    assert subprocess.run([CHECK, "dance"], env=visit, check=False, capture_output=True).returncode == 2
