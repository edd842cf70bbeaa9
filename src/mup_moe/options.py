"""The options by which a command finds its sweep: the config and the folder of results.

What reads a config is imported where one is read: `train` also runs where YAML and pydantic are not installed.
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

# Set by the workflow for its jobs: the file of the config that their run began with.
CONFIG_VARIABLE = "MUP_MOE_CONFIG"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --preset and --results."""
    group = parser.add_argument_group("the sweep")
    group.add_argument(
        "--config",
        nargs="+",
        action="extend",
        metavar="FILE|KEY=VALUE",
        help="what you gave Snakemake by --configfile and --config; config.yaml first, unless it is the one here;"
        " default: the config of the last run (RESULTS/config.yaml), else config.yaml",
    )
    group.add_argument("--preset", metavar="NAME", help="the preset that you gave Snakemake by --config preset=NAME")
    help_results = "the folder that Snakemake writes; default: results"
    group.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help=help_results)


def takes(name: str, help_name: str) -> Callable[[argparse.ArgumentParser], None]:
    """The `add_arguments` of a command that takes a name, and the config."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(name, help=help_name)
        add_config_arguments(parser)

    return add_arguments


def add_sweep_arguments(parser: argparse.ArgumentParser, figures: str | None = None) -> None:
    """As `add_config_arguments`, and --figures. figures: its help where it must be given; None where it may be."""
    add_config_arguments(parser)
    help_figures = figures or "figures or compositions; default: all of them"
    parser.add_argument(
        "--figures", nargs="+", action="extend", required=figures is not None, metavar="NAME", help=help_figures
    )


def read_layers(arguments: argparse.Namespace) -> "Layers":
    """The config that the options name, laid together as Snakemake does. Raises UserError."""
    from mup_moe.config.given import Layers

    given: list[str] = arguments.config or []
    # os.path.exists also takes what is too long for a name.
    entries = [text for text in given if "=" in text and not os.path.exists(text)]  # noqa: PTH110
    files = [Path(text) for text in given if text not in entries]
    base, *over = files or [_default(arguments, bool(entries))]
    for path in (base, *over):
        if not os.path.exists(path):  # noqa: PTH110
            raise UserError(f"there is no {path} here: run this in the checkout, or name it by --config")
    return Layers.lay(base, over, entries, arguments.preset)


def _default(arguments: argparse.Namespace, laid_over: bool) -> Path:
    """The config of this run or of the last one, or, where something is laid over it, config.yaml itself."""
    of_run = os.environ.get(CONFIG_VARIABLE)
    last: Path = arguments.results / "config.yaml"
    if laid_over or arguments.preset or not (of_run or last.exists()):
        return Path("config.yaml")
    return Path(of_run) if of_run else last


def read_sweep(arguments: argparse.Namespace) -> "Sweep":
    """The sweep that the options name. Says in the first line of the log which config that is. Raises UserError."""
    from mup_moe.sweep import Sweep

    layers = read_layers(arguments)
    print(f"config: {layers}", file=sys.stderr, flush=True)
    return Sweep(layers.config, arguments.results, str(layers))
