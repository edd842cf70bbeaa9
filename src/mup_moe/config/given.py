"""What a command line lays over config.yaml, how a run keeps the result, and what Snakemake would drop in silence."""

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

# Not even an entry of the same key holds what the other place says below it.
_DROPPED_WHOLE = ("--config", "--configfile")
# How the config that a run keeps begins.
_LAID_TOGETHER = "# Laid together from "


@dataclass(frozen=True)
class Layers:
    """A config and what it was laid together from."""

    base: Path  # config.yaml, the whole one, or what a run has kept of its config
    preset: Any  # its name, in the folder presets beside that
    files: Sequence[Path]  # over both, as `read_given` has them
    entries: Sequence[str]  # over these, likewise
    document: dict[str, Any]  # the result
    of_run: str | None = None  # what a run's base was laid together from

    @classmethod
    def lay(cls, base: Path, files: Sequence[Path], entries: Sequence[str], preset: str | None = None) -> Self:
        """Reads the files. preset: None where a file or an entry names it. Raises ConfigError."""
        defaults, of_run = _read_base(base)
        given = read_given(files, entries)
        named = preset or overlay(defaults, given).get("preset")
        # A run's config has its preset in it.
        below = {} if of_run and named == defaults["preset"] else read_preset(base.parent / "presets", named)
        document = overlay(defaults, below, given, {"preset": named})
        return cls(base, named, files, entries, document, of_run)

    @cached_property
    def config(self) -> Config:
        """The document, typed. Raises ConfigError."""
        return validate(self.document)

    def __str__(self) -> str:
        """The layers in one line, the lowest first."""
        entries = [f"--config {cut(entry)}" for entry in self.entries if not entry.startswith("preset=")]
        lowest = self.of_run or f"config.yaml, preset {self.preset}"
        return in_one_line(", ".join([lowest, *map(str, self.files), *entries]))

    def show(self, path: Path) -> None:
        """Writes the config for people: a whole one, in YAML, that begins by naming its layers."""
        write_text(path, f"{_LAID_TOGETHER}{self}\n{document_text(self.document)}")

    def keep(self, folder: Path, version: int) -> Path:
        """Writes the config for the jobs of a run to a file that no other config will have. Returns its path.

        version: of the numbers, which has to be that of the run's jobs.
        """
        text = json.dumps({"layers": str(self), "version": version, "document": self.document})
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        write_text(path, text)
        return path


def _read_base(path: Path) -> tuple[dict[str, Any], str | None]:
    """The whole config that a file holds; for what a run has kept of its own, the layers too. Raises ConfigError."""
    document = read_document(path)
    if "layers" in document and "document" in document:
        return document["document"], document["layers"]
    absent = [field.name for field in fields(Config) if field.name not in document and "neutral" not in field.metadata]
    if absent:
        raise ConfigError(
            f"{path} is not a whole config, for it has no `{absent[0]}`: name the whole one first,"
            " as in --config config.yaml mine.yaml"
        )
    with path.open(encoding="utf-8") as file:
        first = file.readline().rstrip("\n")
    return document, first.removeprefix(_LAID_TOGETHER) if first.startswith(_LAID_TOGETHER) else None


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
