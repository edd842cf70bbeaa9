"""Which source files can change a cell's result."""

from functools import cache
from pathlib import Path

from mup_moe.provenance import source_digest

_PACKAGE = Path(__file__).parents[1]

# Reading requests, writing files and finding a GPU are left out: they cannot change a number.
SOURCES = tuple(
    [_PACKAGE / "parametrization.py", *sorted(_PACKAGE.glob("model/*.py"))]
    + [_PACKAGE / "config" / "learning_rate.py", _PACKAGE / "data" / "tokens.py"]
    + [_PACKAGE / "training" / name for name in ("adamw.py", "batches.py", "optimizer.py", "stack.py", "trainer.py")]
)


@cache
def code_digest() -> str:
    """The digest of `SOURCES`."""
    return source_digest(SOURCES)
