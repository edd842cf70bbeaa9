"""Reading config.yaml: any mistake ends in one sentence that names the key."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from mup_moe.config.settings import Config
from mup_moe.files import UserError
from mup_moe.parametrization import parse_table


class ConfigError(UserError):
    """A mistake in the configuration, told in one sentence per key."""


DEFAULT_PRESET = "default"  # config.yaml itself
_ADAPTER = pydantic.TypeAdapter(Config)
# Sections whose entries may start from another one by `like`; parametrizations resolve their own.
_LIKE = ("corpora", "setups", "figures", "probes")


def read_config(*paths: Path) -> Config:
    """The config of one YAML file, or of several laid over each other key by key."""
    return validate(overlay(*(read_document(path) for path in paths)))


def read_document(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return document


def read_preset(folder: Path, name: object) -> dict[str, Any]:
    """The overlay `name` in the folder of presets; nothing for the default. Raises ConfigError."""
    if name == DEFAULT_PRESET:
        return {}
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"`preset` is {name!r} but must be one of {', '.join([DEFAULT_PRESET, *known])}")
    return read_document(folder / f"{name}.yaml")


def validate(document: Mapping[str, Any]) -> Config:
    """The typed config of a parsed YAML document. Raises ConfigError."""
    try:
        text = json.dumps(document)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config holds a value that is neither text, number, list nor mapping: {error}") from None
    try:
        config = _ADAPTER.validate_json(json.dumps(_inherit(json.loads(text))))
        parse_table(config.parametrizations)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, document))) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config


def overlay(*documents: Mapping[str, Any]) -> dict[str, Any]:
    """Documents laid over each other key by key; the later one wins."""
    merged: dict[str, Any] = {}
    for document in documents:
        for key, value in document.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = overlay(merged[key], value) if both else value
    return merged


def _inherit(document: Any) -> Any:
    """The document with every `like` of `_LIKE`'s sections resolved. Raises ValueError naming the key."""
    if not isinstance(document, dict):
        return document

    def entry(section: str, table: dict[str, Any], name: str, below: tuple[str, ...]) -> Any:
        own = table[name]
        if not isinstance(own, dict) or "like" not in own:
            return own
        parent = own["like"]
        if not isinstance(parent, str) or parent not in table or parent in (*below, name):
            raise ValueError(f"`{section}.{name}.like` is {parent!r}, which must name another entry, without a circle")
        inherited = entry(section, table, parent, (*below, name))
        rest = {key: value for key, value in own.items() if key != "like"}
        return overlay(inherited, rest) if isinstance(inherited, dict) else inherited

    resolved = dict(document)
    for section in _LIKE:
        table = document.get(section)
        if isinstance(table, dict):
            resolved[section] = {name: entry(section, table, name, ()) for name in table}
    return resolved


def _sentences(error: pydantic.ValidationError, document: Mapping[str, Any]) -> list[str]:
    """One sentence per key; where a key may be of several types, what each of them asks for."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors():
        # pydantic puts type names into the location of unions: they are no keys.
        key = tuple(str(part) for part in problem["loc"] if not _is_type_name(str(part)))
        by_key.setdefault(key, []).append(problem)
    # A mistake that entries inherit is told where it is made.
    told = {(key, problems[0]["msg"]) for key, problems in by_key.items()}
    return [
        _sentence(".".join(key), problems)
        for key, problems in by_key.items()
        if (_inherited_from(key, document), problems[0]["msg"]) not in told
    ]


def _inherited_from(key: tuple[str, ...], document: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The same key of the entry that this one starts from by `like`, if it does."""
    if len(key) < 2 or key[0] not in _LIKE:
        return None
    section = document[key[0]]
    own = section.get(key[1]) if isinstance(section, Mapping) else None
    parent = own.get("like") if isinstance(own, Mapping) else None
    return None if parent is None else (key[0], str(parent), *key[2:])


def _sentence(key: str, problems: list[Any]) -> str:
    problem = problems[0]
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            near = difflib.get_close_matches(key.rpartition(".")[2], _known_keys(), n=1)
            return f"`{key}` is not a known key" + (f": did you mean `{near[0]}`?" if near else "; remove it")
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


def _is_type_name(part: str) -> bool:
    return part in {"int", "float", "str", "none"} or part.startswith(("literal[", "function-", "union[", "tuple["))


def _known_keys() -> list[str]:
    names: list[str] = []
    pending: list[Any] = [Config]
    while pending:
        for field in fields(pending.pop()):
            names.append(field.name)
            pending += [t for t in (field.type, *getattr(field.type, "__args__", ())) if is_dataclass(t)]
    return names
