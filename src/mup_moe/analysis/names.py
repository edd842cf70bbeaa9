"""How parametrizations and axes are called in figures and tables."""

_TITLES = {"sp": "SP", "simplep": "simpleP", "mup": "μP", "experts-only": "experts-only router"}
_AXES = {"experts": "number of experts"}


def parametrization_title(name: str) -> str:
    """The paper's spelling of a parametrization it has; any other name as the config spells it."""
    return _TITLES.get(name, name)


def axis_title(axis: str) -> str:
    """What an axis counts."""
    return _AXES.get(axis, axis)


def axis_value(axis: str, value: int) -> str:
    """One value of an axis, in words."""
    if axis == "experts":
        return f"{value} expert" if value == 1 else f"{value} experts"
    return f"{axis} {value}"
