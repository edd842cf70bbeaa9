"""Draws several figures as one, (a), (b), ... below each other: python -m mup_moe composition."""

import argparse
from pathlib import Path

from mup_moe.analysis.request import parse_json
from mup_moe.figures.transfer import draw, drawing_style, new_figure, read_content, save
from mup_moe.files import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `composition`."""
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="the runs of each figure, in order")
    parser.add_argument("--optima", type=Path, nargs="+", required=True, help="the optima of each figure, in order")
    parser.add_argument("--figures", required=True, help="JSON object: a figure's name -> its figure_request()")
    parser.add_argument("--out", type=Path, required=True, help="the PDF to write")
    parser.add_argument("--png", type=Path, help="a PNG of the same figure to write as well")


def run(arguments: argparse.Namespace) -> None:
    """Writes the figure. Raises UserError when the runs, the optima or a reference lack a part of it."""
    requests = parse_json(arguments.figures, "--figures")
    if not len(requests) == len(arguments.runs) == len(arguments.optima):
        raise UserError("give one table of runs and one of optima per figure, in the figures' order")
    contents = [
        read_content(name, runs, optima, request)
        for (name, request), runs, optima in zip(requests.items(), arguments.runs, arguments.optima, strict=True)
    ]
    widths, heights = zip(*(content.size for content in contents), strict=True)
    with drawing_style():
        figure = new_figure(max(widths), sum(heights))
        parts = figure.subfigures(len(contents), 1, height_ratios=heights, squeeze=False)
        for index, (part, content) in enumerate(zip(parts.flat, contents, strict=True)):
            draw(part, content, max(widths), f"({chr(ord('a') + index)})")
        save(figure, arguments.out, arguments.png)
