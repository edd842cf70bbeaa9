"""Looks up rules and role tables in the config.yaml that ships with the package; needs no torch."""

import difflib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mup_moe.config.like import inherited
from mup_moe.config.roles import RoleTable
from mup_moe.files import UserError
from mup_moe.parametrization import Parametrization, control, parse_table

# In a checkout, a link to its config.yaml; in an installed package, a copy.
_DEFAULTS = Path(__file__).parents[1] / "defaults.yaml"


@cache
def _document() -> Mapping[str, Any]:
    # Only this function needs YAML.
    from mup_moe.config.document import read_document

    return read_document(_DEFAULTS)


def rules_of(rules: str | Mapping[str, Any] | Parametrization) -> Parametrization:
    """Returns a row of the table by name ("mup", "mup-without-router"), or parses your own. Raises UserError.

    Your own row has the form of an entry of `parametrizations` in config.yaml, and may extend another one with `like`.
    """
    if isinstance(rules, Parametrization):
        return rules
    _check_type("rules", rules)
    table = dict(_document()["parametrizations"])
    name = rules if isinstance(rules, str) else "yours"
    if not isinstance(rules, str):
        table[name] = rules
    try:
        rows = parse_table(table)
    except ValueError as error:
        raise UserError(str(error)) from None
    found = rows.get(name) or control(rows, name)
    if found is None:
        raise UserError(_unknown("rules", name, rows))
    return found


def roles_of(roles: str | Mapping[str, Any] | RoleTable | None, model_type: str | None = None) -> RoleTable:
    """Returns a role table by name ("mixtral"), or parses your own; None selects the one for the model type.

    Your own table has the form of an entry of `roles` in config.yaml, and may extend another one with `like`. Raises
    UserError.
    """
    if isinstance(roles, RoleTable):
        return roles
    tables = dict(_document()["roles"])
    if roles is None:
        matching = [name for name, table in tables.items() if model_type in table.get("model_types", ())]
        if not matching:
            what = f"for the model type {model_type!r}" if model_type else "for a model without a transformers config"
            known = [name for name, table in tables.items() if "model_types" in table]
            raise UserError(f"there is no role table {what}: choose `roles` from {', '.join(known)}, or give your own")
        roles = matching[0]
    _check_type("roles", roles)
    name = roles if isinstance(roles, str) else "yours"
    if not isinstance(roles, str):
        tables[name] = roles
    if name not in tables:
        raise UserError(_unknown("roles", name, tables))
    try:
        return RoleTable.parse(name, inherited("roles", tables, name))
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_type(what: str, given: object) -> None:
    if not isinstance(given, str | Mapping):
        raise UserError(f"{what} is of type {type(given).__name__}: give a name from config.yaml, or your own mapping")


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}, or give your own"
    return f"there are no {what} {name!r}: {hint}"
