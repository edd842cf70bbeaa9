"""Formats parametrizations, axes and numbers for figures and tables."""

import math

from mup_moe.parametrization import CONTROL

MINUS = "\N{MINUS SIGN}"
_TITLES = {"sp": "SP", "simplep": "simpleP", "mup": "μP", "experts-only": "experts-only router"}
_ARCHITECTURES = {"moe": "MoE", "dense": "Dense", "mixtral": "Mixtral", "olmoe": "OLMoE", "qwen3-moe": "Qwen3-MoE"}
_ARCHITECTURES |= {"deepseek-v3": "DeepSeek-V3"}
_AXES = {"experts": "number of experts"}


def parametrization_title(name: str) -> str:
    """Returns the paper's spelling of a parametrization; other names stay as the config spells them."""
    match = CONTROL.fullmatch(name)
    if match and name not in _TITLES:
        return f"{_TITLES.get(match['row'], match['row'])} {match['what']} {match['group']}"
    return _TITLES.get(name, name)


def panel_title(name: str) -> str:
    """Returns the title of a panel of unknown axis: a parametrization, an architecture, or a number."""
    return _ARCHITECTURES.get(name) or parametrization_title(name)


def axis_title(axis: str) -> str:
    """Returns the label of an axis."""
    return _AXES.get(axis, axis)


def axis_value(axis: str, value: int | str) -> str:
    """Returns one value of an axis in words."""
    if axis == "architecture":
        return _ARCHITECTURES.get(str(value), str(value))
    if axis == "experts":
        return f"{value} expert" if value == 1 else f"{value} experts"
    return f"{axis} {value}"


def estimated(number: float) -> str:
    """Formats an estimate with its sign, except for "0.00"; returns "none" for NaN."""
    return "none" if math.isnan(number) else signed(number).replace("+0.00", "0.00")


def signed(number: float, decimals: int = 2) -> str:
    """Formats a number with its sign and this many decimals: a true minus sign, and never "-0.00"."""
    return f"{round(number, decimals) + 0.0:+.{decimals}f}".replace("-", MINUS)
