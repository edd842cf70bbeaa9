"""How parametrizations are called in figures and tables."""

_TITLES = {"sp": "SP", "simplep": "simpleP", "mup": "μP", "experts-only": "experts-only router"}


def parametrization_title(name: str) -> str:
    """The paper's spelling of a parametrization it has; any other name as the config spells it."""
    return _TITLES.get(name, name)
