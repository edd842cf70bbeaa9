"""Faults that strike whole workflows under Snakemake."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from conftest import SMOKE, edit, make_project, wait_until
from faults.commands import end, start
from faults.inject import Inject
from faults.ledger import ONE_SENTENCE, RESUMES, SAME_BYTES, Ledger
from test_workflow import planned

pytestmark = pytest.mark.workflow

TABLE = "results/figure1/runs.csv"
COMMAND = [sys.executable, "-m", "snakemake", *SMOKE, TABLE]
TABLES = ("figure1", "runs.csv", "optima.csv")
KILLS = 3


def launch(project: Path, *options: str, environment: dict[str, str] | None = None, bound: list[str] | None = None):
    """Starts Snakemake in its own process group, with one stream, since it prints some errors on standard output."""
    return start(
        [*(bound or []), *COMMAND, *options],
        # As in a user's shell.
        {"PYTHONPATH": "", **(environment or {})},
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def make(project: Path, *options: str, environment: dict[str, str] | None = None) -> str:
    """Runs Snakemake, which must succeed; returns its output."""
    done = end(launch(project, *options, environment=environment))
    assert done.returncode == 0, done.stdout
    return done.stdout


def make_sweep(folder: Path) -> Path:
    """Makes a project with a curve of two cells that take long enough to be struck."""
    project = make_project(folder)
    edit(project, "figures.figure1.axes.parametrization", ["mup"])
    edit(project, "figures.figure1.axes.width", [8])
    edit(project, "figures.figure1.axes.learning_rate", ["2^-8", "2^-6"])
    edit(project, "setups.small.training.steps", 200)
    # Write a checkpoint after every step.
    edit(project, "execution.checkpoint_seconds", 1e-6)
    return project


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, finished without a fault. Do not change it."""
    project = make_sweep(tmp_path_factory.mktemp("quiet") / "project")
    make(project)
    return project


@pytest.fixture
def sweep(quiet: Path, tmp_path: Path) -> Path:
    """The sweep with its tokens, but no cells."""
    return shutil.copytree(quiet, tmp_path / "project", ignore=shutil.ignore_patterns("cells", *TABLES))


def assert_as_quiet(project: Path, quiet: Path) -> None:
    """Asserts that the table (except seconds) and histories are those of `quiet`, and that no partial file is left."""
    ours, theirs = (pd.read_csv(folder / TABLE).drop(columns="wall_seconds") for folder in (project, quiet))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    for path in quiet.glob("results/cells/*/history.csv"):
        assert (project / path.relative_to(quiet)).read_bytes() == path.read_bytes()
    assert not list((project / "results").rglob("*.part"))


def test_a_workflow_resumes_however_often_it_is_killed(
    ledger: Ledger, chance: random.Random, quiet: Path, tmp_path: Path
) -> None:
    with ledger.trial("SIGKILL or SIGTERM", "Snakemake with its jobs, or Snakemake alone", SAME_BYTES) as trial:
        project, seconds = make_sweep(tmp_path / "project"), 8.0
        while trial.strikes < KILLS:
            process = launch(project)
            time.sleep(chance.uniform(0, seconds))
            number = chance.choice([signal.SIGKILL, signal.SIGTERM])
            # Killed alone, Snakemake leaves jobs behind that keep running.
            chance.choice([os.kill, os.killpg])(process.pid, number)
            process.wait()
            trial.struck(project / "results")
        make(project)
        assert_as_quiet(project, quiet)
        assert planned(project, TABLE) == {}


def test_a_second_snakemake_does_not_disturb_the_first(
    ledger: Ledger, inject: Inject, sweep: Path, quiet: Path
) -> None:
    expected = "the second stops with a one-sentence error; the first ends with the same bytes"
    with ledger.trial("two Snakemakes", "in one folder", expected) as trial:
        first = launch(sweep, environment=inject("SIGSTOP", number=100))
        wait_until(lambda: list(sweep.glob("results/cells/*/checkpoint.safetensors")), first)
        second = end(launch(sweep))
        assert second.returncode == 1
        assert "another run is working in results: wait for it to end, or stop it first" in second.stdout
        assert "Traceback" not in second.stdout
        trial.struck(sweep / "results")
        while first.poll() is None:
            # The job may not have stopped yet.
            os.killpg(first.pid, signal.SIGCONT)
            time.sleep(0.2)
        assert first.returncode == 0
        assert_as_quiet(sweep, quiet)


def test_a_job_is_retried_when_its_gpu_disappears(
    ledger: Ledger, chance: random.Random, inject: Inject, sweep: Path, quiet: Path
) -> None:
    with ledger.trial("the GPU disappears (simulated)", "in a Snakemake job with --retries 1", RESUMES) as trial:
        fault = inject("lose_gpu", number=chance.randint(100, 190))
        said = make(sweep, "--retries", "1", environment=fault)
        trial.struck(sweep / "results")
        assert "mup-moe: the GPU failed: rerun the same command" in said
        (log,) = sweep.glob("results/logs/train/*.log")
        assert "continuing from step" in log.read_text()
        assert_as_quiet(sweep, quiet)


def test_files_dated_in_the_future_are_not_made_again(ledger: Ledger, quiet: Path, tmp_path: Path) -> None:
    project = shutil.copytree(quiet, tmp_path / "project")
    for path in project.rglob("*"):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 86_400 * 10**9))
    expected = "only new cells are trained; then nothing is left to do"
    with ledger.trial("clock turned back a day", "between two runs of Snakemake", expected) as trial:
        trial.struck(project / "results/cells")
        assert planned(project, TABLE) == {}
        edit(project, "figures.figure1.axes.learning_rate", ["2^-8", "2^-6", "2^-4"])
        make(project)
        assert len(pd.read_csv(project / TABLE)) == 3
        # By times alone, as for text that is too large for Snakemake to compare.
        assert planned(project, TABLE, "--max-checksum-file-size", "0") == {}


def test_a_read_only_results_folder_stops_snakemake_in_one_sentence(
    ledger: Ledger, quiet: Path, bound: list[str], tmp_path: Path
) -> None:
    project = shutil.copytree(quiet, tmp_path / "project", ignore=shutil.ignore_patterns(*TABLES))
    folders = [path for path in [project / "results", *(project / "results").rglob("*")] if path.is_dir()]
    with ledger.trial("read-only folder", "the folder of all results, under Snakemake", ONE_SENTENCE) as trial:
        for folder in folders:
            folder.chmod(0o555)
        done = end(launch(project, bound=bound))
        for folder in folders:
            folder.chmod(0o755)
        trial.struck(project / "results")
        assert done.returncode == 1
        assert "results cannot be written" in done.stdout
        assert "Traceback" not in done.stdout, done.stdout
        make(project)
        assert_as_quiet(project, quiet)
