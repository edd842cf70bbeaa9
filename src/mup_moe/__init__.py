"""mup-moe: a reproducible replication of *mu-Parametrization for Mixture of Experts*."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mup_moe.files import UserError
    from mup_moe.library.check import CoordinateCheck, coordinate_check
    from mup_moe.library.plan import Plan, parametrize

__all__ = ["CoordinateCheck", "Plan", "UserError", "coordinate_check", "parametrize"]
__version__ = "0.11.0"

# The module of each public name, imported on first use because a Snakefile needs no torch.
_HOMES = {
    "CoordinateCheck": "library.check",
    "Plan": "library.plan",
    "UserError": "files",
    "coordinate_check": "library.check",
    "parametrize": "library.plan",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mup_moe' has no attribute {name!r}")
    import importlib

    from mup_moe.files import UserError

    try:
        return getattr(importlib.import_module(f"mup_moe.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"mup_moe.{name} needs the package {error.name}: run pip install '.[pipeline]' in a checkout"
        ) from None
