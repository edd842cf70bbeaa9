"""The options that name a command's sweep: the config and the results folder.

Functions that read a config import what they need: `train` also runs without YAML and pydantic installed.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mup_moe.files import UserError

if TYPE_CHECKING:
    from mup_moe.config.given import Layers
    from mup_moe.sweep import Sweep

# Set by the workflow for its jobs: the config file that their run started with.
CONFIG_VARIABLE = "MUP_MOE_CONFIG"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config, --preset and --results."""
    group = parser.add_argument_group("the sweep")
    group.add_argument(
        "--config",
        nargs="+",
        action="extend",
        metavar="FILE|KEY=VALUE",
        help="what you passed to Snakemake as --configfile and --config; the first file must be a whole config, such"
        " as config.yaml; default: the config of the last run (RESULTS/config.yaml), or else config.yaml",
    )
    group.add_argument(
        "--preset", metavar="NAME", help="the preset that you passed to Snakemake as --config preset=NAME"
    )
    help_results = "the folder that Snakemake writes to; default: results"
    group.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help=help_results)


def takes(name: str, help_name: str) -> Callable[[argparse.ArgumentParser], None]:
    """Returns the `add_arguments` of a command that takes a name and the config options."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(name, help=help_name)
        add_config_arguments(parser)

    return add_arguments


def add_sweep_arguments(parser: argparse.ArgumentParser, figures: str | None = None) -> None:
    """Adds the options of `add_config_arguments` and --figures.

    figures: the help text of --figures, which is then required; None makes it optional.
    """
    add_config_arguments(parser)
    help_figures = figures or "figures or compositions; default: all of them"
    parser.add_argument(
        "--figures", nargs="+", action="extend", required=figures is not None, metavar="NAME", help=help_figures
    )


def read_layers(arguments: argparse.Namespace) -> "Layers":
    """Returns the config that the options name, merged as Snakemake does it. Raises UserError."""
    from mup_moe.config.given import Layers

    given: list[str] = arguments.config or []
    # Unlike Path.exists, os.path.exists accepts text that is too long for a file name.
    entries = [text for text in given if "=" in text and not os.path.exists(text)]  # noqa: PTH110
    files = [Path(text) for text in given if text not in entries]
    base, *over = files or [_default(arguments, bool(entries))]
    for path in (base, *over):
        if not os.path.exists(path):  # noqa: PTH110
            raise UserError(f"{path} does not exist here: run this in the checkout, or name the config with --config")
    return Layers.lay(base, over, entries, arguments.preset)


def _default(arguments: argparse.Namespace, overlaid: bool) -> Path:
    """Returns the config of this run or of the last one; config.yaml if options overlay it."""
    of_run = os.environ.get(CONFIG_VARIABLE)
    last: Path = arguments.results / "config.yaml"
    if overlaid or arguments.preset or not (of_run or last.exists()):
        return Path("config.yaml")
    return Path(of_run) if of_run else last


def read_sweep(arguments: argparse.Namespace) -> "Sweep":
    """Returns the sweep that the options name; the log's first line says which config that is. Raises UserError."""
    from mup_moe.sweep import Sweep

    layers = read_layers(arguments)
    print(f"config: {layers}", file=sys.stderr, flush=True)
    return Sweep(layers.config, arguments.results, str(layers))
