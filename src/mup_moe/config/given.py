"""What a command line lays over config.yaml, and what Snakemake would drop of it in silence."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from mup_moe.config.document import ConfigError, cut, in_one_line, read_document, read_value
from mup_moe.config.load import overlay, read_preset, validate
from mup_moe.config.settings import Config

# Not even an entry of the same key holds what the other place says below it.
_DROPPED_WHOLE = ("--config", "--configfile")


@dataclass(frozen=True)
class Layers:
    """A config and what it was laid together from.

    base: config.yaml, the whole one. preset: its name, in the folder presets beside that. files, entries: over
    both, as `read_given` has them. document: the result.
    """

    base: Path
    preset: Any
    files: Sequence[Path]
    entries: Sequence[str]
    document: dict[str, Any]

    @classmethod
    def lay(cls, base: Path, files: Sequence[Path], entries: Sequence[str], preset: str | None = None) -> Self:
        """Reads the files. preset: None where a file or an entry names it. Raises ConfigError."""
        defaults, given = read_document(base), read_given(files, entries)
        named = preset or overlay(defaults, given).get("preset")
        below = read_preset(base.parent / "presets", named)
        return cls(base, named, files, entries, overlay(defaults, below, given, {"preset": named}))

    @cached_property
    def config(self) -> Config:
        """The document, typed. Raises ConfigError."""
        return validate(self.document)

    def __str__(self) -> str:
        """The layers in one line, the lowest first."""
        entries = [f"--config {cut(entry)}" for entry in self.entries if not entry.startswith("preset=")]
        return in_one_line(", ".join(["config.yaml", f"preset {self.preset}", *map(str, self.files), *entries]))


def read_given(files: Sequence[Path], entries: Sequence[str]) -> dict[str, Any]:
    """Config files laid over each other, and over them the KEY=VALUE entries of --config. Raises ConfigError.

    A value is YAML, as in a file. Snakemake's own reading makes text of each number within `{...}`.
    """
    values = (entry.partition("=")[::2] for entry in entries)
    return overlay(*map(read_document, files), *({key: read_value(text, key)} for key, text in values))


def check_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], profiles: Mapping[Path, Mapping[str, Any]]
) -> None:
    """Refuses options of several values that are given in two places, as Snakemake takes those of one alone.

    parser: Snakemake's own, with no profile. arguments: of the command line. profiles: what each says, the one that
    prevails last. Raises ConfigError.
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
                    f"`{name}` is given {higher} and {lower}, of which Snakemake would drop"
                    f" {cut(', '.join(lost))}: give all of its values in one of these places"
                )


def _given_once(
    parser: argparse.ArgumentParser, options: set[argparse._StoreAction], arguments: Sequence[str]
) -> dict[str, Any]:
    """The values of the options that a command line has, by their first names."""
    given: dict[str, Any] = {}

    def take(option: argparse._StoreAction, _parser: object, _namespace: object, values: Any, _by: object) -> None:
        name = option.option_strings[0]
        if name in given:
            raise ConfigError(
                f"`{name}` is given more than once, and Snakemake takes the last one alone: give it once,"
                f" with all of its values, as in {name} FIRST SECOND"
            )
        given[name] = values

    # The parser finds them under every spelling: abbreviated, or within short options such as -nC.
    for option in options:
        option.__class__ = type("_Taken", (type(option),), {"__call__": take})
    # What follows -- is targets.
    parser.parse_known_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    return given


def _lost(name: str, kept: Any, dropped: Any) -> list[str]:
    """What is dropped of an option's values: those whose keys the kept ones lack; a list is replaced on purpose."""
    entries = [str(value) for value in ([dropped] if isinstance(dropped, str) else dropped)]
    if name in _DROPPED_WHOLE:
        return entries
    keys = {str(value).partition("=")[0] for value in ([kept] if isinstance(kept, str) else kept)}
    return [entry for entry in entries if "=" in entry and entry.partition("=")[0] not in keys]
