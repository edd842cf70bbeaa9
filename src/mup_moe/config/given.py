"""What a Snakemake command line lays over config.yaml, and what Snakemake would drop of it in silence."""

import argparse
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mup_moe.config.document import ConfigError, cut, in_one_line, read_document, read_value
from mup_moe.config.load import overlay

# Each is one option of Snakemake under two names.
OPTIONS = {"config": ("--config", "-C"), "configfile": ("--configfile", "--configfiles")}


def read_given(files: Sequence[Path], entries: Sequence[str]) -> dict[str, Any]:
    """Config files laid over each other, and over them the KEY=VALUE entries of --config. Raises ConfigError.

    A value is YAML, as in a file. Snakemake's own reading makes text of each number within `{...}`.
    """
    values = (entry.partition("=")[::2] for entry in entries)
    return overlay(*map(read_document, files), *({key: read_value(text, key)} for key, text in values))


def check_given_once(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Refuses an option of which Snakemake takes the last one alone. parser: its own. Raises ConfigError."""
    for action in parser._actions:
        if isinstance(action, argparse._StoreAction) and action.nargs in ("*", "+"):
            used = [argument for argument in _options(arguments) if _names(argument, action.option_strings)]
            if len(used) > 1:
                name = action.option_strings[0]
                raise ConfigError(
                    f"`{name}` is given {len(used)} times, and Snakemake takes the last one alone: give it once,"
                    f" with all of its values, as in {name} FIRST SECOND"
                )


def split_off(arguments: Sequence[str]) -> tuple[set[str], list[str]]:
    """Which of `OPTIONS` a command line has, and its arguments without them."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, names in OPTIONS.items():
        own.add_argument(*names, nargs="*", dest=name)
    given, rest = own.parse_known_args(_options(arguments))
    return {name for name, values in vars(given).items() if values is not None}, rest


def _options(arguments: Sequence[str]) -> list[str]:
    # What follows -- is targets.
    return list(itertools.takewhile(lambda argument: argument != "--", arguments))


def _names(argument: str, names: Sequence[str]) -> bool:
    return any(
        argument.partition("=")[0] == name or (re.fullmatch("-[^-]", name) and argument.startswith(name))
        for name in names
    )


def check_profile(given: Collection[str], of_profile: Mapping[str, object]) -> None:
    """Refuses an option of `OPTIONS` that the command line gives beside a profile. Raises ConfigError.

    of_profile: the options' values by the profile alone; an empty one is not given.
    """
    for name in given:
        if of_profile[name]:
            raise ConfigError(
                f"`{OPTIONS[name][0]}` is given on the command line and by a profile, whose values Snakemake would"
                " drop: give them all on the command line, or take them out of the profile"
            )


def describe(preset: object, files: Sequence[Path], entries: Sequence[str]) -> str:
    """The layers of a config in one line, the lowest first."""
    rest = [f"--config {cut(entry)}" for entry in entries if not entry.startswith("preset=")]
    layers = ["config.yaml", f"preset {preset}", *map(str, files), *rest]
    return in_one_line(", ".join(layers))
