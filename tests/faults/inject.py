"""How a fault comes to a process: by its environment, to hooks/sitecustomize.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT

HOOKS = Path(__file__).parent / "hooks"
Inject = Callable[..., dict[str, str]]


def injector(folder: Path) -> Inject:
    """Makes the environment of a fault, with the folder for what it leaves behind; jobs of a Snakemake inherit it."""
    made: list[Path] = []

    def environment(does: str, **told: Any) -> dict[str, str]:
        made.append(folder / f"struck{len(made)}")
        defaults = {"at": "step", "number": 1, "after": 0.0, "set": {}, "once": str(made[-1])}
        return {"FAULT": json.dumps(defaults | {"does": does} | told), "PYTHONPATH": f"{HOOKS}:{ROOT / 'src'}"}

    return environment


def is_stopped(pid: int) -> bool:
    """Whether a process has been stopped by a signal, and not continued."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
