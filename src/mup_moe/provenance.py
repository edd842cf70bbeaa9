"""What made a result: versions and machine."""

import os
import platform
from importlib import metadata
from pathlib import Path

import mup_moe


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of this package and of installed packages."""
    found = {"python": platform.python_version(), "mup_moe": mup_moe.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine() -> dict[str, str | int]:
    """The machine in words; nothing that names its owner."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
