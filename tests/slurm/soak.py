"""Trains 500 short cells on a throwaway SLURM and kills something every few seconds: python tests/slurm/soak.py --help.

Writes docs/soak.md: what was killed, the outcome of the cells, and whether runs.csv equals that of a quiet run. Takes
half an hour or more on two cores; needs root and SLURM, as up.sh does.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from conftest import TARGET, edit, make_project, read_tries, smoke  # noqa: E402
from mup_moe import provenance  # noqa: E402
from mup_moe.files import write_text  # noqa: E402
from slurm.submission import launch, lose_node, output_of, write_profile  # noqa: E402

GAP_SECONDS = (2.0, 8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="minutes of killing")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, each with a hundred cells")
    parser.add_argument("--steps", type=int, default=400, help="training steps of a cell")
    parser.add_argument("--random", type=int, default=int(time.time()), help="the seed of the kills")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/soak.md")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    quiet = make_sweep(folder / "quiet", arguments)
    start = time.monotonic()
    done = smoke(quiet, TARGET)
    assert done.returncode == 0, done.stdout
    quiet_seconds = time.monotonic() - start
    print(f"quiet run: {quiet_seconds:.0f} s", flush=True)
    disturbed = make_sweep(folder / "disturbed", arguments)
    try:
        subprocess.run([HERE / "up.sh", folder / "slurm"], check=True)
        soak = Soak(disturbed, folder, random.Random(arguments.random))
        soak.run(60 * arguments.minutes)
    finally:
        subprocess.run([HERE / "down.sh", folder / "slurm"], check=False)
    report(arguments, soak, quiet, quiet_seconds)


def make_sweep(folder: Path, arguments: argparse.Namespace) -> Path:
    """Makes a project with a figure of 100 cells for each seed, in jobs of 20."""
    project = make_project(folder)
    edit(project, "setups.small.training.steps", arguments.steps)
    axes = "figures.figure1.axes"
    edit(project, f"{axes}.width", [8, 10, 12, 14, 16])
    edit(project, f"{axes}.learning_rate", [f"2^-{power}" for power in range(5, 15)])
    edit(project, f"{axes}.seed", list(range(arguments.seeds)))
    for figure in ("figure2a", "figure2b", "figure3", "figure4"):
        edit(project, f"figures.{figure}.axes.seed", [0])
    edit(project, "execution.checkpoint_seconds", 1.0)
    edit(project, "execution.lockstep", ["learning_rate"])
    edit(project, "execution.cells_per_job", 20)
    return project


class Soak:
    """Runs the sweep on the cluster and kills parts of it."""

    def __init__(self, project: Path, folder: Path, chance: random.Random) -> None:
        self.project = project
        self.kills: Counter[str] = Counter()
        self.starts = 0
        self.seconds = 0.0
        self._chance = chance
        # Every kill uses up a retry of its job.
        self._profile = write_profile(folder / "site", {"retries": 100})
        self._ways: dict[Callable[[], str | None], int] = {
            lambda: self._signal(signal.SIGKILL): 40,
            lambda: self._signal(signal.SIGTERM): 20,
            lambda: self._scontrol("scancel", "{job}"): 15,
            lambda: self._scontrol("scontrol", "requeue", "{job}"): 10,
            self._lose_node: 5,
            self._kill_snakemake: 5,
        }

    def run(self, seconds: float) -> None:
        """Kills for this many seconds or until the sweep is done, then lets the sweep finish."""
        begun = time.monotonic()
        self._start()
        while time.monotonic() - begun < seconds and not self._is_done():
            time.sleep(self._chance.uniform(*GAP_SECONDS))
            (way,) = self._chance.choices(list(self._ways), list(self._ways.values()))
            if (killed := way()) is not None:
                self.kills[killed] += 1
            if sum(self.kills.values()) % 20 == 0:
                done = len(list(self.project.glob("results/cells/*/summary.json")))
                print(f"{time.monotonic() - begun:.0f} s: {sum(self.kills.values())} kills, {done} cells", flush=True)
        self.seconds = time.monotonic() - begun
        while not self._is_done():
            self._start()
            self._snakemake.wait()

    def _is_done(self) -> bool:
        return self._snakemake.poll() == 0

    def _start(self) -> None:
        if self.starts and self._snakemake.poll() is None:
            return
        self.starts += 1
        log = self.project / f"snakemake-{self.starts}.log"
        self._snakemake = launch(self.project, self._profile, log)

    def _signal(self, number: signal.Signals) -> str | None:
        processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        training = [pid for pid in processes if _is_training(pid)]
        if not training:
            return None
        try:
            os.kill(self._chance.choice(training), number)
        except ProcessLookupError:
            return None
        return f"{number.name} to a training process"

    def _scontrol(self, *command: str) -> str | None:
        running = output_of("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()
        if not running:
            return None
        job = self._chance.choice(running)
        done = subprocess.run([part.format(job=job) for part in command], check=False, capture_output=True)
        return " ".join(command[:-1]) + " of a job" if done.returncode == 0 else None

    def _lose_node(self) -> str:
        lose_node(self._chance.choice(["node1", "node2"]))
        return "a node set down"

    def _kill_snakemake(self) -> str:
        if self._snakemake.poll() is None:
            os.killpg(self._snakemake.pid, signal.SIGKILL)
            self._snakemake.wait()
        # See docs/clusters.md: jobs that are still pending would be submitted a second time.
        subprocess.run(["scancel", "--user=root", "--state=PENDING"], check=False)
        self._start()
        return "SIGKILL to Snakemake, then a restart"


def _is_training(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        inside = b"SLURM_CLUSTER_NAME=throwaway" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return inside and command[1:4] == [b"-m", b"mup_moe", b"train"]


def report(arguments: argparse.Namespace, soak: Soak, quiet: Path, quiet_seconds: float) -> None:
    """Writes the outcome of the cells; exits with 1 if one was lost or trained twice."""
    ours, theirs = (
        pd.read_csv(project / "results/figure1/runs.csv").drop(columns="wall_seconds")
        for project in (soak.project, quiet)
    )
    stories = [read_tries(folder) for folder in sorted((soak.project / "results/cells").iterdir())]
    tries = [sum(line["event"] == "began" for line in story) for story in stories]
    again = sum(_went_back(story) for story in stories)
    twice = sum(sum(line["event"] in ("finished", "diverged") for line in story) > 1 for story in stories)
    equal = ours.equals(theirs)
    losses = ["train_loss", "valid_loss"]
    difference = (
        0.0 if len(ours) != len(theirs) else float(((ours[losses] - theirs[losses]) / theirs[losses]).abs().max().max())
    )
    machine, versions = (
        provenance.machine(),
        provenance.versions("torch", "snakemake", "snakemake-executor-plugin-slurm"),
    )
    slurm = output_of("slurmctld", "-V").strip()
    facts = {
        "cells": len(theirs),
        "cells done": len(ours),
        "cells lost": len(theirs) - len(ours),
        "cells retrained from before a checkpoint": again,
        "cells finished twice": twice,
        "attempts per cell, mean and maximum": f"{sum(tries) / len(tries):.1f}, {max(tries)}",
        "starts of Snakemake": soak.starts,
        "`runs.csv`, except seconds, compared with the quiet run": "equal"
        if equal
        else f"losses within {difference:.1e}",
        "minutes of killing": f"{soak.seconds / 60:.1f}",
        "minutes of the quiet run, without SLURM": f"{quiet_seconds / 60:.1f}",
    }
    lines = [
        "# Soak test: a sweep under constant kills",
        "",
        f"Generated by `make soak` on {datetime.now(UTC):%Y-%m-%d}: {machine['cpu']}, {machine['cores']} cores,"
        f" {slurm}, {', '.join(f'{name} {version}' for name, version in versions.items())};"
        f" seed of the kills {arguments.random}, one kill every {GAP_SECONDS[0]:.0f} to {GAP_SECONDS[1]:.0f} s.",
        "",
        "| what was killed | times |",
        "|---|---|",
        *(f"| {what} | {times} |" for what, times in soak.kills.most_common()),
        f"| total | {sum(soak.kills.values())} |",
        "",
        "| outcome | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
    ]
    write_text(arguments.out, "\n".join(lines))
    print("\n".join(lines))
    sys.exit(0 if equal and not again and not twice else 1)


def _went_back(story: list[dict[str, object]]) -> bool:
    """Returns whether an attempt began before a checkpoint of an earlier one."""
    least = 0
    for line in story:
        step = int(str(line["step"]))
        if line["event"] == "began" and step < least:
            return True
        if line["event"] in ("began", "first checkpoint"):
            least = max(least, step)
    return False


if __name__ == "__main__":
    main()
