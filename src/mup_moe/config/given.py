"""Merges the layers of a config, stores the result for a run, and finds options that Snakemake would drop silently.

The layers are config.yaml, a preset, config files and command-line entries.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from mup_moe.config.document import ConfigError, cut, document_text, in_one_line, read_document, read_value
from mup_moe.config.like import overlay
from mup_moe.config.load import read_preset, validate
from mup_moe.config.settings import Config
from mup_moe.files import write_text

# Options that are lost entirely: even an entry with the same key does not keep what the other place has below it.
_DROPPED_WHOLE = ("--config", "--configfile")
# The first words of the config that a run keeps, now and up to version 0.10.0.
_LAYERS_MARKS = ("# Merged from ", "# Laid together from ")


@dataclass(frozen=True)
class Layers:
    """A config and the layers from which it was merged."""

    base: Path  # a complete config.yaml, or the config that a run kept
    preset: Any  # the name of a file in the folder presets next to the base
    files: Sequence[Path]  # override both, as in `read_given`
    entries: Sequence[str]  # override the files, as in `read_given`
    document: dict[str, Any]  # the merged config
    of_run: str | None = None  # the layers of the base, if a run kept it

    @classmethod
    def lay(cls, base: Path, files: Sequence[Path], entries: Sequence[str], preset: str | None = None) -> Self:
        """Reads and merges the layers. preset: None if a file or an entry names it. Raises ConfigError."""
        defaults, of_run = _read_base(base)
        given = read_given(files, entries)
        named = preset or overlay(defaults, given).get("preset")
        # A config that a run kept already includes its preset.
        below = {} if of_run and named == defaults["preset"] else read_preset(base.parent / "presets", named)
        document = overlay(defaults, below, given, {"preset": named})
        return cls(base, named, files, entries, document, of_run)

    @cached_property
    def config(self) -> Config:
        """The document as typed settings. Raises ConfigError."""
        return validate(self.document)

    def __str__(self) -> str:
        """Returns the layers in one line, the lowest first."""
        entries = [f"--config {cut(entry)}" for entry in self.entries if not entry.startswith("preset=")]
        lowest = self.of_run or f"config.yaml, preset {self.preset}"
        return in_one_line(", ".join([lowest, *map(str, self.files), *entries]))

    def show(self, path: Path) -> None:
        """Writes the complete config for readers, as YAML with a first line that names its layers."""
        write_text(path, f"{_LAYERS_MARKS[0]}{self}\n{document_text(self.document)}")

    def keep(self, folder: Path, version: int) -> Path:
        """Writes the config for the jobs of a run to a file that is unique to this config. Returns its path.

        version: the version of the numerical results, which must match that of the run's jobs.
        """
        text = json.dumps({"layers": str(self), "version": version, "document": self.document})
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        write_text(path, text)
        return path


def _read_base(path: Path) -> tuple[dict[str, Any], str | None]:
    """Reads a complete config, and its layers if a run kept it. Raises ConfigError."""
    document = read_document(path)
    if "layers" in document and "document" in document:
        return document["document"], document["layers"]
    absent = [field.name for field in fields(Config) if field.name not in document and "neutral" not in field.metadata]
    if absent:
        raise ConfigError(
            f"{path} is not a complete config, since it has no `{absent[0]}`: name the complete one first,"
            " as in --config config.yaml mine.yaml"
        )
    with path.open(encoding="utf-8") as file:
        first = file.readline().rstrip("\n")
    mark = next((mark for mark in _LAYERS_MARKS if first.startswith(mark)), None)
    return document, first.removeprefix(mark) if mark else None


def read_given(files: Sequence[Path], entries: Sequence[str]) -> dict[str, Any]:
    """Merges config files, and over them the KEY=VALUE entries of --config. Raises ConfigError.

    A value is read as YAML, as in a file. Snakemake itself would read each number within `{...}` as text.
    """
    values = (entry.partition("=")[::2] for entry in entries)
    return overlay(*map(read_document, files), *({key: read_value(text, key)} for key, text in values))


def check_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], profiles: Mapping[Path, Mapping[str, Any]]
) -> None:
    """Rejects options with several values that are given in two places, since Snakemake only uses one place.

    parser: Snakemake's parser, without a profile. arguments: the command line. profiles: the contents of each profile,
    the one with the highest priority last. Raises ConfigError.
    """
    options = {
        name: action
        for action in parser._actions
        if isinstance(action, argparse._StoreAction) and action.nargs in ("*", "+")
        for name in action.option_strings
    }
    places = [("on the command line", _given_once(parser, set(options.values()), arguments))]
    for path, profile in reversed(list(profiles.items())):
        named = {f"--{key.lstrip('-')}": value for key, value in profile.items()}
        values = {options[name].option_strings[0]: value for name, value in named.items() if name in options}
        places.append((f"by the profile {path}", values))
    for (higher, kept), (lower, dropped) in combinations(places, 2):
        for name in kept.keys() & dropped.keys():
            if lost := _lost(name, kept[name], dropped[name]):
                raise ConfigError(
                    f"`{name}` is given {higher} and {lower}, so Snakemake would drop {cut(', '.join(lost))}: give all"
                    " of its values in one of these places"
                )


def _given_once(
    parser: argparse.ArgumentParser, options: set[argparse._StoreAction], arguments: Sequence[str]
) -> dict[str, Any]:
    """Returns the values of the options on a command line, by the option's first name."""
    given: dict[str, Any] = {}

    def take(option: argparse._StoreAction, _parser: object, _namespace: object, values: Any, _by: object) -> None:
        name = option.option_strings[0]
        if name in given:
            raise ConfigError(
                f"`{name}` is given more than once, and Snakemake only uses the last one: give it once, with all of its"
                f" values, as in {name} FIRST SECOND"
            )
        given[name] = values

    # The parser finds the options in every spelling: abbreviated, or within short options such as -nC.
    for option in options:
        option.__class__ = type("_Taken", (type(option),), {"__call__": take})
    # Targets follow "--".
    parser.parse_known_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    return given


def _lost(name: str, kept: Any, dropped: Any) -> list[str]:
    """Returns the values that would be dropped: those with keys that the kept ones lack; lists may be replaced."""
    entries = [str(value) for value in ([dropped] if isinstance(dropped, str) else dropped)]
    if name in _DROPPED_WHOLE:
        return entries
    keys = {str(value).partition("=")[0] for value in ([kept] if isinstance(kept, str) else kept)}
    return [entry for entry in entries if "=" in entry and entry.partition("=")[0] not in keys]
