"""Provenance of a result: versions, machine and source code."""

import hashlib
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import mup_moe


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of Python, of this package and of the named packages."""
    found = {"python": platform.python_version(), "mup_moe": mup_moe.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine() -> dict[str, str | int]:
    """Describes the machine, with nothing that identifies its owner."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


# A superset of the code that can change a cell's numbers.
_PACKAGE = Path(__file__).parent
SOURCES = (
    _PACKAGE / "parametrization.py",
    *sorted(path for part in ("data", "model", "training") for path in _PACKAGE.glob(f"{part}/*.py")),
)


@cache
def code_digest() -> str:
    """Returns the digest of `SOURCES`. Results record it for information only; `training.version` is what counts."""
    return source_digest(SOURCES)


def source_digest(sources: Iterable[Path]) -> str:
    """Returns a digest of the names and contents of files, in the given order."""
    digest = hashlib.sha256()
    for path in sources:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
