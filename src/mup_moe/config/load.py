"""Validates the config; any mistake is reported in one sentence that names the key."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic

from mup_moe.config.document import ConfigError, check_values, cut, read_document, show
from mup_moe.config.like import inherited, overlay, without_like
from mup_moe.config.settings import Config
from mup_moe.parametrization import ATTENTION_LOGITS, FACTORS, Parametrization

DEFAULT_PRESET = "default"  # config.yaml itself
_ADAPTER = pydantic.TypeAdapter(Config)
# Sections in which entries may extend another one with `like`; parametrizations resolve their own.
_LIKE = ("roles", "architectures", "corpora", "setups", "figures", "probes")
# Far beyond any real config.
_LARGEST_POWER = 16
_MOST_SENTENCES = 20
# Names of a union's types in pydantic's locations.
_TYPE_NAME = re.compile(r"(int|float|str|none)$|literal\[|function-|union\[|tuple\[")


def read_preset(folder: Path, name: object) -> dict[str, Any]:
    """Reads the preset `name` from the folder of presets; empty for the default. Raises ConfigError."""
    return without_like(overlay(*map(read_document, preset_files(folder, name))))


def preset_files(folder: Path, name: object, below: tuple[object, ...] = ()) -> list[Path]:
    """Returns the files of a preset, starting with those that it extends with `like`. Raises ConfigError."""
    if name == DEFAULT_PRESET:
        return []
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known or name in below:
        key = f"`like` of preset {below[-1]}" if below else "`preset`"
        choices = [preset for preset in (DEFAULT_PRESET, *known) if preset not in below]
        raise ConfigError(f"{key} is {show(name)} but must be one of {', '.join(choices)}")
    path = folder / f"{name}.yaml"
    parent = read_document(path).get("like", DEFAULT_PRESET)
    return [*preset_files(folder, parent, (*below, name)), path]


def validate(document: Mapping[str, Any]) -> Config:
    """Returns the typed config of a parsed YAML document. Raises ConfigError."""
    check_values(document)
    try:
        resolved = _inherit(document)
        config = _ADAPTER.validate_json(json.dumps(resolved))
        _check_table(config.rows)
    except pydantic.ValidationError as error:
        sentences = _sentences(error, document, resolved)
        more = len(sentences) - _MOST_SENTENCES
        rest = [f"and {more} more mistakes"] if more > 0 else []
        raise ConfigError("\n".join([*map(cut, sentences[:_MOST_SENTENCES]), *rest])) from None
    except ValueError as error:
        raise ConfigError(cut(str(error))) from None
    return config


def _check_table(rows: Mapping[str, Parametrization]) -> None:
    """Rejects powers with factors that would overflow. Raises ValueError naming the key."""
    for name, row in rows.items():
        factors = [(role, getattr(rule, factor)) for role, rule in row.rules.items() for factor in FACTORS]
        for role, factor in (*factors, (ATTENTION_LOGITS, row.attention_logits)):
            for variable, power in factor.exponents:
                if abs(power) > _LARGEST_POWER:
                    raise ValueError(
                        f"`parametrizations.{name}.{role}` has a power of {variable} beyond +-{_LARGEST_POWER}"
                    )


def _inherit(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the document with every `like` in the sections `_LIKE` resolved. Raises ValueError naming the key."""
    resolved = dict(document)
    for section in _LIKE:
        if isinstance(table := document.get(section), Mapping):
            resolved[section] = {name: inherited(section, table, name) for name in table}
    # A preset may remove claims by setting them to null.
    claims = document.get("claims")
    if isinstance(claims, Mapping) and isinstance(table := claims.get("table"), Mapping):
        kept = {name: claim for name, claim in table.items() if claim is not None}
        resolved["claims"] = {**claims, "table": kept}
    return resolved


def _sentences(error: pydantic.ValidationError, document: Mapping[str, Any], resolved: Mapping[str, Any]) -> list[str]:
    """Returns one sentence per key; if a key may have several types, it states the requirement of each."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors():
        by_key.setdefault(_key(problem["loc"], resolved), []).append(problem)
    # Report a mistake that entries inherit only where it is made.
    reported = {(key, problems[0]["msg"]) for key, problems in by_key.items()}
    return [
        _sentence(key, problems)
        for key, problems in by_key.items()
        if (_inherited_from(key, document), problems[0]["msg"]) not in reported
    ]


def _inherited_from(key: tuple[str, ...], document: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the same key in the entry that this one extends with `like`; None if it extends none."""
    if len(key) < 2 or key[0] not in _LIKE:
        return None
    section = document[key[0]]
    own = section.get(key[1]) if isinstance(section, Mapping) else None
    parent = own.get("like") if isinstance(own, Mapping) else None
    return None if parent is None else (key[0], str(parent), *key[2:])


def _sentence(path: tuple[str, ...], problems: list[Any]) -> str:
    key = ".".join(path)
    problem = problems[0]
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return _unknown_key(path)
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"`{key}` is missing: give it a value"
        case "value_error":
            reason = str(problem["ctx"]["error"])
            return f"`{key}`: {reason}" if key else reason
        case _:
            shown = repr(problem["input"])
            shown = shown if len(shown) < 60 else shown[:57] + "..."
            wanted = (p["msg"].removeprefix("Input ").removeprefix("should be ").rstrip(".") for p in problems)
            return f"`{key}` is {shown} but should be {' or '.join(dict.fromkeys(wanted))}"


def _key(location: tuple[int | str, ...], document: Any) -> tuple[str, ...]:
    """Returns the key at which pydantic found a mistake: its location without the names of a union's types."""
    key = []
    for part in location:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            if _TYPE_NAME.match(str(part)):
                continue
        key.append(str(part))
    return tuple(key)


def _unknown_key(path: tuple[str, ...]) -> str:
    *section, key = path
    known = list(_known_keys(Config))
    # NAME and NUMBER match anything.
    at = re.compile(r"\.".join(f"({re.escape(part)}|NAME|NUMBER)" for part in section))
    near = difflib.get_close_matches(key, [name for place, name in known if at.fullmatch(".".join(place))], n=1)
    if near:
        return f"`{'.'.join(path)}` is not a known key: did you mean `{near[0]}`?"
    elsewhere = [f"`{'.'.join(place)}`" if place else "the top level" for place, name in known if name == key]
    if elsewhere:
        return f"`{'.'.join(path)}` is not a known key here: it belongs to {' or '.join(elsewhere)}"
    return f"`{'.'.join(path)}` is not a known key: remove it"


def _known_keys(kind: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields every key that a config of this type can have, with the path of its section first."""
    if is_dataclass(kind):
        if len(place) == 2 and place[0] in _LIKE:
            yield place, "like"
        for field in fields(kind):
            yield place, field.name
            yield from _known_keys(field.type, (*place, field.name))
    elif get_origin(kind) is dict:
        yield from _known_keys(get_args(kind)[1], (*place, "NAME"))
    elif get_origin(kind) is tuple:
        yield from _known_keys(get_args(kind)[0], (*place, "NUMBER"))
