"""Draws a figure: python -m mup_moe figure NAME."""

import argparse
import importlib

from mup_moe.analysis.pages import figure_page
from mup_moe.figures.shown import kind_of
from mup_moe.figures.style import drawing_style, save
from mup_moe.files import write_text
from mup_moe.options import read_layers, takes

add_arguments = takes("name", "one of the config's figures, compositions, trends, comparisons or probes")


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/NAME.pdf, .png and .html. Raises UserError where a file that the figure reads is incomplete."""
    config, out = read_layers(arguments).config, arguments.results / arguments.name
    kind = importlib.import_module(f"mup_moe.figures.{kind_of(config, arguments.name)}")
    with drawing_style():
        save(kind.draw(config, arguments.name, arguments.results), out)
    png = out.with_name(f"{out.name}.png").read_bytes()
    write_text(out.with_name(f"{out.name}.html"), figure_page(out.name, png))
