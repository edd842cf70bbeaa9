"""The options by which a command that people call finds a sweep: its config, its figures and its results."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from mup_moe.config.cell import Cell
from mup_moe.config.given import Layers
from mup_moe.config.load import read_document
from mup_moe.config.settings import Config
from mup_moe.files import UserError


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --preset and --results."""
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        metavar="FILE|KEY=VALUE",
        help="what you gave Snakemake by --configfile and --config; config.yaml first, unless it is the one here",
    )
    parser.add_argument("--preset", metavar="NAME", help="the preset that you gave Snakemake by --config preset=NAME")
    help_results = "the folder that Snakemake writes; default: results"
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help=help_results)


def add_sweep_arguments(parser: argparse.ArgumentParser, figures: str | None = None) -> None:
    """As `add_config_arguments`, and --figures. figures: its help where it must be given; None where it may be."""
    add_config_arguments(parser)
    help_figures = figures or "figures or compositions; default: all of them"
    parser.add_argument(
        "--figures", nargs="+", action="extend", required=figures is not None, metavar="NAME", help=help_figures
    )


def read_layers(arguments: argparse.Namespace) -> Layers:
    """The config that the options name, laid together as Snakemake does. Raises UserError."""
    given: list[str] = arguments.config or []
    # os.path.exists also takes what is too long for a name.
    entries = [text for text in given if "=" in text and not os.path.exists(text)]  # noqa: PTH110
    base, *over = [Path(text) for text in given if text not in entries] or [Path("config.yaml")]
    for path in (base, *over):
        if not os.path.exists(path):  # noqa: PTH110
            raise UserError(f"there is no {path} here: run this in the checkout, or name it by --config")
    whole = read_document(base)
    absent = [field.name for field in fields(Config) if field.name not in whole]
    if absent:
        raise UserError(
            f"{base} is not a whole config, for it has no `{absent[0]}`: name the whole one first,"
            " as in --config config.yaml mine.yaml"
        )
    return Layers.lay(base, over, entries, arguments.preset)


def cells_of_figures(config: Config, names: Sequence[str] | None) -> dict[str, list[Cell]]:
    """The cells of figures and of compositions' figures, in their order; None: of all. Raises UserError."""
    chosen = config.figures if names is None else names
    figures = [part for name in chosen for part in config.compositions.get(name, (name,))]
    unknown = [figure for figure in figures if figure not in config.figures]
    if unknown:
        raise UserError(f"`figures` has no {unknown[0]!r}: choose from {', '.join(config.figures)}")
    return {figure: config.figures[figure].cells() for figure in figures}
