"""The rows and role tables of the config.yaml that comes with the package; needs no torch."""

import difflib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mup_moe.config.like import inherited
from mup_moe.config.roles import RoleTable
from mup_moe.files import UserError
from mup_moe.parametrization import Parametrization, control, parse_table

# A link to the checkout's own, and a copy where the package is installed.
_DEFAULTS = Path(__file__).parents[1] / "defaults.yaml"


@cache
def _document() -> Mapping[str, Any]:
    # Only here is YAML needed.
    from mup_moe.config.document import read_document

    return read_document(_DEFAULTS)


def rules_of(rules: str | Mapping[str, Any] | Parametrization) -> Parametrization:
    """A row of the table by its name ("mup", "mup-without-router"), or one of your own. Raises UserError.

    A row of your own is as `parametrizations` of config.yaml has it, and may start from another one by `like`.
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
    """A role table by its name ("mixtral"), one of your own, or (None) the one for a model type of transformers.

    A table of your own is as `roles` of config.yaml has it, and may start from another one by `like`. Raises UserError.
    """
    if isinstance(roles, RoleTable):
        return roles
    tables = dict(_document()["roles"])
    if roles is None:
        matching = [name for name, table in tables.items() if model_type in table.get("model_types", ())]
        if not matching:
            what = (
                f"for the model type {model_type!r}" if model_type else "for a model without a config of transformers"
            )
            known = [name for name, table in tables.items() if "model_types" in table]
            raise UserError(f"there is no role table {what}: give `roles`, one of {', '.join(known)} or your own")
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
        raise UserError(
            f"{what} is of type {type(given).__name__}: give a name in config.yaml, or a mapping of your own"
        )


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}, or give your own"
    return f"there are no {what} {name!r}: {hint}"
