"""Reads a YAML or JSON file as plain values, and rejects values that no setting can have before anything uses them."""

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mup_moe.encoding import NO_TEXT
from mup_moe.files import UserError

# Far beyond any real config, but small enough that checking any document takes only seconds.
_MOST_LEVELS = 20
_MOST_CHARACTERS = 2 * 10**6
_MOST_MERGED_KEYS = 10_000
_LONGEST_TEXT = 4096  # the length of the longest path
_LONGEST_KEY = 100
_LONGEST_SENTENCE = 400
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_LARGEST_EXACT = 2**53  # floats represent integers exactly up to here
# YAML 1.1 reads 1.0e-8 as a number, but 1e-8 as text.
_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)[eE][-+]?[0-9]+")
# Octal numbers, and minutes and seconds.
_SURPRISING = re.compile("[-+]?0[0-9_]+|.*:.*")


class ConfigError(UserError):
    """A mistake in the configuration, described in one sentence per key."""


def read_document(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML or JSON (.json) file; no YAML tag can run code. Raises ConfigError."""
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        # UTF-8 only, with or without a byte-order mark: Snakemake reads the file too and supports no other encoding.
        text = path.read_text(encoding="utf-8-sig")
        if kind == "JSON":
            document = json.loads(text, parse_float=_number, object_pairs_hook=_without_repetition)
        else:
            document = _Loader(text).get_single_data()
    except UnicodeDecodeError:
        raise ConfigError(
            cut(f"{path} cannot be read as {kind}: it is not UTF-8, so save it in that encoding")
        ) from None
    # For a scalar that is invalid for its type, PyYAML passes on whatever Python raises.
    except Exception as error:
        raise ConfigError(cut(f"{path} cannot be read as {kind}: {_problem(error)}")) from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    if "__use_yte__" in document:
        raise ConfigError(f"{path} has `__use_yte__`, which makes Snakemake run code in the config: remove it")
    try:
        check_values(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return document


def document_text(document: Mapping[str, Any]) -> str:
    """Returns YAML that `read_document` reads back to the same document."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def read_value(text: str, key: str) -> Any:
    """Reads a line of YAML as the value of `key`, as if it were in a file. Raises ConfigError."""
    try:
        value = _EntryLoader(text).get_single_data()
    except Exception as error:  # as above
        raise ConfigError(cut(f"`{key}` cannot be read as YAML: {_problem(error)}")) from None
    check_values({key: value})
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {repeated!r} appears twice")
    return document


def _number(text: str) -> int | float:
    """Reads a number with a fraction or an exponent; 1e4 is an integer, as people expect."""
    value = float(text)
    whole = "e" in text.lower() and value.is_integer() and abs(value) <= _LARGEST_EXACT
    return int(value) if whole else value


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split()) or type(error).__name__


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also rejects repeated keys and merges (<<) of too many keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} appears twice", key.start_mark)
            seen.add(name)
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Reads a YAML number, or one of our `_EXPONENT`; rejects those that YAML 1.1 reads differently than people."""
        if _SURPRISING.fullmatch(node.value):
            problem = f"{node.value} is not a plain number: put it in quotes if it is text"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
        text = node.value.replace("_", "")
        if _EXPONENT.fullmatch(text):
            return _number(text)
        return self.construct_yaml_int(node) if node.tag == _INTEGER else self.construct_yaml_float(node)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_MERGED_KEYS:
            raise yaml.MarkedYAMLError(None, None, "<< merges too many keys", node.start_mark)


class _EntryLoader(_Loader):
    """Reads entries from Snakemake, which writes null as None if a profile has `config` as a mapping."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes text that `_Loader` would read as a number, and repeats shared values instead of using aliases."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


_INTEGER, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver(_FLOAT, re.compile(f"{_EXPONENT.pattern}$"), list("-+.0123456789"))
_Loader.add_constructor(_INTEGER, _Loader.construct_number)
_Loader.add_constructor(_FLOAT, _Loader.construct_number)
_EntryLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])


def check_values(document: object) -> None:
    """Rejects values that no setting can have, such as self-referencing ones. Raises ConfigError naming the key."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"the config is {show(document)} but must hold a mapping of keys to values")
    room = _MOST_CHARACTERS
    pending: list[tuple[tuple[str, ...], object]] = [((), document)]
    while pending:
        path, value = pending.pop()
        # The target of an alias (*) counts at every place where the alias appears.
        room -= 10 + (len(value) if isinstance(value, str) else 0)
        if room < 0:
            raise ConfigError(f"`{path[0]}` holds more than {_MOST_CHARACTERS:,} characters: shorten it")
        if len(path) > _MOST_LEVELS:
            raise ConfigError(f"`{path[0]}` has more than {_MOST_LEVELS} levels, or contains itself: flatten it")
        key = ".".join(path)
        match value:
            case Mapping():
                for name, below in value.items():
                    _check_name(name, f"`{key}`" if key else "the config")
                    pending.append(((*path, name), below))
            case list() | tuple():
                pending += (((*path, str(index)), below) for index, below in enumerate(value))
            case str():
                _check_text(value, key)
            case int() if value.bit_length() > 64:
                raise ConfigError(f"`{key}` is an integer that does not fit in 64 bits: make it smaller")
            case None | int() | float():
                pass
            case _:
                kind = type(value).__name__
                raise ConfigError(f"`{key}` is read as a {kind}, which no setting is: put text in quotes")


def _check_name(name: object, place: str) -> None:
    if not isinstance(name, str):
        kind = type(name).__name__
        raise ConfigError(f"{place} has the key {show(name)}, which is read as a {kind}: put it in quotes")
    if len(name) > _LONGEST_KEY or not name.isprintable():
        raise ConfigError(
            f"{place} has the key {show(name)}, which is longer than {_LONGEST_KEY} characters"
            " or not printable: rename it"
        )


def _check_text(text: str, key: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(f"`{key}` has more than {_LONGEST_TEXT} characters: shorten it")
    if NO_TEXT.search(text):
        raise ConfigError(f"`{key}` is {show(text)}, which contains NUL or half a surrogate pair: remove it")


def show(value: object) -> str:
    """Formats a value for a sentence, in few characters."""
    try:
        return _REPR.repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        return f"a very large {type(value).__name__}"


def cut(sentence: str) -> str:
    """Returns the sentence in one line, shortened if it is too long to read."""
    return in_one_line(sentence if len(sentence) <= _LONGEST_SENTENCE else f"{sentence[:_LONGEST_SENTENCE]}...")


def in_one_line(text: str) -> str:
    """Returns the text with unprintable characters escaped as in Python."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
