"""Passes a fault to a process in its environment, where hooks/sitecustomize.py reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT

HOOKS = Path(__file__).parent / "hooks"
Inject = Callable[..., dict[str, str]]


def injector(folder: Path) -> Inject:
    """Returns a function that makes the environment of a fault, which the jobs of a Snakemake inherit.

    folder: for the files that mark faults that have struck.
    """
    made: list[Path] = []

    def environment(does: str, **settings: Any) -> dict[str, str]:
        made.append(folder / f"struck{len(made)}")
        defaults = {"at": "step", "number": 1, "after": 0.0, "set": {}, "once": str(made[-1])}
        return {"FAULT": json.dumps(defaults | {"does": does} | settings), "PYTHONPATH": f"{HOOKS}:{ROOT / 'src'}"}

    return environment


def is_stopped(pid: int) -> bool:
    """Returns whether a process has been stopped by a signal and not continued."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
