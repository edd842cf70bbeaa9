"""What the tests on SLURM and the soak share: a site's profile, a Snakemake that submits, a node that is lost."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from conftest import ROOT, TARGET

# What a site of two small nodes sets in its profile; nobody here waits as patiently as a lab.
SITE = {
    "slurm-status-command": "squeue",
    "slurm-init-seconds-before-status-checks": 3,
    "latency-wait": 60,
    "max-threads": 2,
}


def write_profile(folder: Path, changes: dict[str, Any]) -> Path:
    """The project's profile in a folder, as a site would copy and edit it."""
    folder.mkdir(exist_ok=True)
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text()) | SITE | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    return folder


def launch(project: Path, profile: Path, log: Path) -> "subprocess.Popen[bytes]":
    """A Snakemake that submits the sweep in miniature; a process group of its own, to be killed."""
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
    """What a command that succeeds says."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lose_node(node: str) -> None:
    """Sets a node down, with what runs on it, and up again."""
    output_of("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(1)
    # It may have come back by itself.
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False, stderr=subprocess.DEVNULL)
