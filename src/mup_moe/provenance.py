"""What made a result: versions, machine and source code."""

import ast
import hashlib
import os
import platform
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

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


# What can change a cell's result. Reading requests, writing files and finding a GPU are left out: they cannot.
_PACKAGE = Path(__file__).parent
SOURCES = tuple(
    [_PACKAGE / "parametrization.py", *sorted(_PACKAGE.glob("model/*.py"))]
    + [_PACKAGE / "config" / "learning_rate.py", _PACKAGE / "data" / "tokens.py"]
    + [_PACKAGE / "training" / name for name in ("batches.py", "optimizer.py", "stack.py", "trainer.py")]
)


@cache
def code_digest() -> str:
    """The digest of `SOURCES`, which a result records for its reader; what counts is `training.version`."""
    return source_digest(SOURCES)


def source_digest(sources: Iterable[Path]) -> str:
    """A digest of the meaning of Python files: comments, docstrings and layout do not change it.

    Nor does the Python that takes it, of those that can parse the files.
    """
    digest = hashlib.sha256()
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                documented = body and isinstance(body[0], ast.Expr) and _is_text(body[0].value)
                node.body = body[bool(documented) :] or [ast.Pass()]  # type: ignore[attr-defined]
        digest.update(f"{path.name}\n{_plain(tree)!r}\n".encode())
    return digest.hexdigest()[:16]


def _is_text(node: ast.expr) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _plain(node: Any) -> Any:
    """A syntax tree as nested tuples of the fields that say something; newer Pythons have more that are empty.

    Not its text by `ast.unparse`, which quotes differently from version to version, nor by `ast.dump`,
    which names empty fields or not.
    """
    if isinstance(node, ast.JoinedStr):
        # Some versions leave an empty piece of text in a format specification.
        return "JoinedStr", *(_plain(piece) for piece in node.values if not (_is_text(piece) and not piece.value))
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node) if name not in _SAYS_NOTHING)
        return type(node).__name__, *((name, value) for name, value in fields if value not in (None, ()))
    if isinstance(node, list):
        return tuple(map(_plain, node))
    # A constant: 1, 1.0 and True differ. Not `repr`, which escapes the characters that this Python does not know.
    return None if node is None else ascii(node)


# How a literal was written, and comments on types.
_SAYS_NOTHING = ("kind", "type_comment", "type_ignores")
