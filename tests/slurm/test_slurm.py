"""The miniature sweep on a real SLURM, started on this machine, and what a cluster does to jobs."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from conftest import TARGET, edit, make_project, read_tries, smoke, wait_until
from mup_moe.ops.heartbeat import Heartbeat
from slurm.submission import launch, lose_node, output_of, write_profile

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
STEPS = 1500


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Starts SLURM; call the fixture with settings of up.sh to restart SLURM with those."""
    if "MUP_MOE_NEEDS_SLURM" not in os.environ:
        pytest.skip("starts daemons on this machine: run `make slurm-test`")
    folders: list[Path] = []

    def bring_up(**settings: str) -> None:
        for folder in folders:
            output_of(str(HERE / "down.sh"), str(folder))
        folders.append(tmp_path_factory.mktemp("slurm"))
        subprocess.run([str(HERE / "up.sh"), str(folders[-1])], check=True, env=os.environ | settings)

    bring_up()
    yield bring_up
    output_of(str(HERE / "down.sh"), str(folders[-1]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"set-resources": {"tokenize": {"mem_mb": 1000}}}
    return write_profile(tmp_path_factory.mktemp("site"), settings)


def make_sweep(folder: Path) -> Path:
    """Makes a project with two curves of cells that take long enough to be disturbed."""
    project = make_project(folder)
    edit(project, "setups.small.training.steps", STEPS)
    edit(project, "figures.figure1.axes.parametrization", ["mup"])
    edit(project, "figures.figure2a.axes.width", [8])
    edit(project, "execution.checkpoint_seconds", 0.5)
    return project


CURVES = ("small_moe_mup_w8_e4_g1", "small_moe_mup_w16_e4_g1")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep, finished on this machine without SLURM or disturbance."""
    project = make_sweep(tmp_path_factory.mktemp("quiet") / "project")
    done = smoke(project, TARGET)
    assert done.returncode == 0, done.stdout
    return project


@pytest.fixture
def sweep(quiet: Path, tmp_path: Path) -> Path:
    """The sweep with its tokens, but no cells."""
    project = tmp_path / "project"
    shutil.copytree(quiet, project, ignore=shutil.ignore_patterns("cells", "figure1*", "runs.csv", "optima.csv"))
    return project


class Submitted:
    """A Snakemake that submits the sweep, with its output in a file."""

    def __init__(self, project: Path, profile: Path, log: str = "snakemake.log") -> None:
        self.project = project
        self._log = project / log
        self.process = launch(project, profile, self._log)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self) -> None:
        assert self.process.wait() == 0, self.output

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def submit(cluster: Any, site: Path) -> Iterator[Callable[..., Submitted]]:  # noqa: ARG001 - must be running
    started: list[Submitted] = []

    def start(project: Path, **options: str) -> Submitted:
        started.append(Submitted(project, site, **options))
        return started[-1]

    yield start
    for submitted in started:
        submitted.kill()
    subprocess.run(["scancel", "--user=root"], check=False)


def job_of(curve: str) -> str | None:
    """Returns the id of the running job that trains a curve, or None."""
    for line in output_of("squeue", "--noheader", "--states=RUNNING", "--format=%i %k").splitlines():
        job, _, comment = line.partition(" ")
        if comment.strip() == f"rule_train_{curve}":
            return job
    return None


def cells_of(project: Path, curve: str) -> list[Path]:
    return list((project / "results/cells").glob(f"{curve}_*"))


def begun(project: Path, curve: str, after: int = 0) -> int | None:
    """Returns the process that trains a curve, once its cells have checkpoints, if it is not the process `after`."""
    folders = cells_of(project, curve)
    if not folders or not all((folder / "checkpoint.safetensors").exists() for folder in folders):
        return None
    sign = Heartbeat.read(folders[0])
    return sign.pid if sign is not None and sign.pid != after else None


def assert_as_undisturbed(project: Path, quiet: Path, event: str | None = None) -> None:
    """Asserts that all cells are done and equal, that none lost a checkpoint, and that `event` happened to each."""
    ours, theirs = (
        pd.read_csv(folder / "results/figure1/runs.csv").drop(columns="wall_seconds") for folder in (project, quiet)
    )
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    for folder in (project / "results/cells").iterdir():
        tries = read_tries(folder)
        steps = [line["step"] for line in tries if line["event"] == "began"]
        assert steps[0] == 0
        assert all(step > 0 for step in steps[1:]), tries
        assert steps == sorted(steps), tries
        assert [line["event"] for line in tries].count("finished") == 1, tries
        if event is not None:
            assert len(steps) > 1, tries
            assert event in {line["event"] for line in tries}, tries


def test_the_miniature_sweep_is_submitted_as_the_profile_says(submit, finished, tmp_path):
    project = make_project(tmp_path / "project")
    submitted = submit(project)
    submitted.wait()
    ours, theirs = (
        pd.read_csv(folder / "results/runs.csv").drop(columns="wall_seconds") for folder in (project, finished)
    )
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    jobs = json.loads(output_of("squeue", "--states=all", "--json"))["jobs"]
    trained = [job for job in jobs if (job["comment"] or "").startswith("rule_train_")]
    assert {job["comment"] for job in trained} == {
        f"rule_train_small_moe_{row}_w{width}_e4_g1" for row in ("sp", "mup") for width in (8, 16)
    }
    assert all("gpu" in job["tres_per_job"] for job in trained)
    assert all(job["name"].startswith("mup-moe") for job in jobs if job["comment"])
    (tokenized,) = (job for job in jobs if (job["comment"] or "").startswith("rule_tokenize"))
    assert "gpu" not in tokenized["tres_per_job"]


def test_jobs_that_are_cancelled_or_lose_their_node_or_their_time_resume_unchanged(submit, sweep, quiet):
    submitted = submit(sweep)
    pids = {curve: wait_until(lambda curve=curve: begun(sweep, curve), submitted.process) for curve in CURVES}
    # Running jobs ignore these edits, the second of which is not even valid YAML.
    edit(sweep, "setups.small.training.steps", STEPS + 1)
    (sweep / "config.yaml").write_text("setups: {small: [\n")
    # Cancel one job and take down the node of the other.
    output_of("scancel", job_of(CURVES[0]))
    lose_node(output_of("squeue", "--noheader", "--format=%N", f"--jobs={job_of(CURVES[1])}").strip())
    for curve, pid in pids.items():
        pids[curve] = wait_until(lambda curve=curve, pid=pid: begun(sweep, curve, pid), submitted.process)
    # Let the time limit of the jobs that still run expire.
    for curve in CURVES:
        if (job := job_of(curve)) is not None:
            # The job may have ended in the meantime.
            subprocess.run(["scontrol", "update", f"jobid={job}", "timelimit=1"], check=False)
    submitted.wait()
    assert_as_undisturbed(sweep, quiet, "began")


@pytest.mark.parametrize("mode", ["REQUEUE", "CANCEL"])
def test_a_preempted_job_writes_a_checkpoint_and_resumes(cluster, submit, sweep, quiet, mode):
    cluster(PREEMPT=mode)
    submitted = submit(sweep)
    for curve in CURVES:
        wait_until(lambda curve=curve: begun(sweep, curve), submitted.process)
    output_of("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    submitted.wait()
    assert_as_undisturbed(sweep, quiet, "stopped by SIGTERM")


def test_a_killed_and_restarted_snakemake_trains_nothing_twice(submit, sweep, quiet):
    first = submit(sweep)
    for curve in CURVES:
        wait_until(lambda curve=curve: begun(sweep, curve), first.process)
    first.kill()
    # Its jobs keep running; those of the second Snakemake wait for them and use their results.
    second = submit(sweep, log="second.log")
    second.wait()
    assert_as_undisturbed(sweep, quiet)
    for folder in sweep.glob("results/cells/*"):
        assert [line["event"] for line in read_tries(folder)].count("began") == 1
