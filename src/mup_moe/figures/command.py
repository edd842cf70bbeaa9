"""Draws a figure: python -m mup_moe figure NAME."""

import argparse
import importlib

from mup_moe.figures.shown import kind_of
from mup_moe.figures.style import drawing_style, save
from mup_moe.options import read_layers, takes

add_arguments = takes("name", "one of the config's figures, compositions, trends, comparisons or probes")


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/NAME.pdf and .png. Raises UserError if a file that the figure reads lacks part of its data."""
    config = read_layers(arguments).config
    kind = importlib.import_module(f"mup_moe.figures.{kind_of(config, arguments.name)}")
    with drawing_style():
        save(kind.draw(config, arguments.name, arguments.results), arguments.results / arguments.name)
