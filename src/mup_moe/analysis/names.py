"""How parametrizations, axes and numbers are written in figures and tables."""

import math

from mup_moe.parametrization import CONTROL

MINUS = "\N{MINUS SIGN}"
_TITLES = {"sp": "SP", "simplep": "simpleP", "mup": "μP", "experts-only": "experts-only router"}
_ARCHITECTURES = {"moe": "MoE", "dense": "Dense", "mixtral": "Mixtral", "olmoe": "OLMoE", "qwen3-moe": "Qwen3-MoE"}
_ARCHITECTURES |= {"deepseek-v3": "DeepSeek-V3"}
_AXES = {"experts": "number of experts"}


def parametrization_title(name: str) -> str:
    """The paper's spelling of a parametrization it has; any other name as the config spells it."""
    match = CONTROL.fullmatch(name)
    if match and name not in _TITLES:
        return f"{_TITLES.get(match['row'], match['row'])} {match['what']} {match['group']}"
    return _TITLES.get(name, name)


def panel_title(name: str) -> str:
    """A panel's name where its axis is not known: of a parametrization, an architecture, or a number."""
    return _ARCHITECTURES.get(name) or parametrization_title(name)


def axis_title(axis: str) -> str:
    """What an axis counts."""
    return _AXES.get(axis, axis)


def axis_value(axis: str, value: int | str) -> str:
    """One value of an axis, in words."""
    if axis == "architecture":
        return _ARCHITECTURES.get(str(value), str(value))
    if axis == "experts":
        return f"{value} expert" if value == 1 else f"{value} experts"
    return f"{axis} {value}"


def estimated(number: float) -> str:
    """An estimate with its sign, for which "0.00" has none; "none" where it is not a number."""
    return "none" if math.isnan(number) else signed(number).replace("+0.00", "0.00")


def signed(number: float, decimals: int = 2) -> str:
    """A number with its sign and so many decimals: a true minus sign, and no "-0.00"."""
    return f"{round(number, decimals) + 0.0:+.{decimals}f}".replace("-", MINUS)
