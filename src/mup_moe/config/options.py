"""The options by which a command that people call finds a sweep: its config, its figures and its results."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mup_moe.config.cell import Cell
from mup_moe.config.load import overlay, read_document, read_preset, validate
from mup_moe.config.settings import Config
from mup_moe.files import UserError


def add_sweep_arguments(parser: argparse.ArgumentParser, figures: str | None = None) -> None:
    """--config, --preset, --figures and --results. figures: the help of an option that must be given; None: may be."""
    parser.add_argument("--config", type=Path, nargs="+", default=[Path("config.yaml")], help="laid over each other")
    parser.add_argument("--preset", help="under all but the first config; without it, the one that they name")
    parser.add_argument("--figures", nargs="+", required=figures is not None, help=figures or "default: all of them")
    parser.add_argument("--results", type=Path, default=Path("results"))


def read_sweep_config(arguments: argparse.Namespace) -> Config:
    """The config that the options name, as Snakemake would lay it together. Raises UserError."""
    first, *over = (read_document(path) for path in arguments.config)
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
