"""The options by which a command that people call finds a sweep: its config, its figures and its results."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from mup_moe.config.cell import Cell
from mup_moe.config.load import overlay, read_document, read_preset, validate
from mup_moe.config.settings import Config
from mup_moe.files import UserError


def add_sweep_arguments(parser: argparse.ArgumentParser, figures: str | None = None) -> None:
    """--config, --preset, --figures and --results. figures: the help of an option that must be given; None: may be."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[Path("config.yaml")],
        metavar="FILE",
        help="config.yaml first, then the files laid over it; default: config.yaml",
    )
    parser.add_argument("--preset", metavar="NAME", help="the preset that you gave Snakemake by --config preset=NAME")
    help_figures = figures or "figures or compositions; default: all of them"
    parser.add_argument("--figures", nargs="+", required=figures is not None, metavar="NAME", help=help_figures)
    help_results = "the folder that Snakemake writes; default: results"
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="FOLDER", help=help_results)


def read_sweep_config(arguments: argparse.Namespace) -> Config:
    """The config that the options name, as Snakemake would lay it together. Raises UserError."""
    for path in arguments.config:
        if not path.exists():
            raise UserError(f"there is no {path} here: run this in the checkout, or name it by --config")
    first, *over = (read_document(path) for path in arguments.config)
    absent = [field.name for field in fields(Config) if field.name not in first]
    if absent:
        raise UserError(
            f"{arguments.config[0]} is no whole config, for it has no `{absent[0]}`: name the whole one first,"
            " as in --config config.yaml mine.yaml"
        )
    named = arguments.preset or overlay(first, *over).get("preset")
    preset = read_preset(arguments.config[0].parent / "presets", named)
    return validate(overlay(first, preset, *over, {"preset": named}))


def cells_of_figures(config: Config, names: Sequence[str] | None) -> dict[str, list[Cell]]:
    """The cells of figures and of compositions' figures, in their order; None: of all. Raises UserError."""
    chosen = config.figures if names is None else names
    figures = [part for name in chosen for part in config.compositions.get(name, (name,))]
    unknown = [figure for figure in figures if figure not in config.figures]
    if unknown:
        raise UserError(f"`figures` has no {unknown[0]!r}: choose from {', '.join(config.figures)}")
    return {figure: config.figures[figure].cells() for figure in figures}
