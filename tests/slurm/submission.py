"""Shared by the SLURM tests and the soak: a site's profile, a Snakemake that submits jobs, and the loss of a node."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from conftest import ROOT, TARGET

# What a site of two small nodes sets in its profile, with shorter waits than on a real cluster.
SITE = {
    "slurm-status-command": "squeue",
    "slurm-init-seconds-before-status-checks": 3,
    "latency-wait": 60,
    "max-threads": 2,
}


def write_profile(folder: Path, changes: dict[str, Any]) -> Path:
    """Copies the project's profile to a folder and edits it as a site would; returns the folder."""
    folder.mkdir(exist_ok=True)
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text()) | SITE | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    return folder


def launch(project: Path, profile: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Starts a Snakemake that submits the miniature sweep, in its own process group so that it can be killed."""
    command = [sys.executable, "-m", "snakemake", TARGET, "--workflow-profile", str(profile)]
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, "--configfile", "smoke.yaml"],
            cwd=project,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def output_of(*command: str) -> str:
    """Runs a command that must succeed; returns its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lose_node(node: str) -> None:
    """Sets a node down, along with the jobs on it, and up again."""
    output_of("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(1)
    # The node may have come back by itself.
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False, stderr=subprocess.DEVNULL)
