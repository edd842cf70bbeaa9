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


_ADAPTER = pydantic.TypeAdapter(Config)


def read_config(*paths: Path) -> Config:
    """The config of one YAML file, or of several laid over each other key by key."""
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(document, dict):
            raise ConfigError(f"{path} must hold a mapping of keys to values")
        merged = _overlay(merged, document)
    return validate(merged)


def validate(document: Mapping[str, Any]) -> Config:
    """The typed config of a parsed YAML document. Raises ConfigError."""
    try:
        text = json.dumps(document)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config holds a value that is neither text, number, list nor mapping: {error}") from None
    try:
        config = _ADAPTER.validate_json(text)
        parse_table(config.parametrizations)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_sentences(error))) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config


def _overlay(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _sentences(error: pydantic.ValidationError) -> list[str]:
    """One sentence per key; where a key may be of several types, what each of them asks for."""
    by_key: dict[str, list[Any]] = {}
    for problem in error.errors():
        # pydantic puts type names into the location of unions: they are no keys.
        key = ".".join(str(part) for part in problem["loc"] if not _is_type_name(str(part)))
        by_key.setdefault(key, []).append(problem)
    return [_sentence(key, problems) for key, problems in by_key.items()]


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
