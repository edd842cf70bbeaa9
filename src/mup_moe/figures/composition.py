"""Draws several figures as one, (a), (b), ... below each other; set-ups are named if there are several."""

from pathlib import Path

from mup_moe.config.settings import Config
from mup_moe.figures.plotting import Figure
from mup_moe.figures.style import new_figure
from mup_moe.figures.transfer import draw_content, read_content


def draw(config: Config, name: str, results: Path) -> Figure:
    """Draws a composition of the config. Raises UserError as `transfer.draw` does, for each of its figures."""
    contents = [read_content(config, part, results) for part in config.compositions[name]]
    widths, heights = zip(*(content.size for content in contents), strict=True)
    figure = new_figure(max(widths), sum(heights))
    parts = figure.subfigures(len(contents), 1, height_ratios=heights, squeeze=False)
    differ = len({content.spec.figure.setup for content in contents}) > 1
    for index, (part, content) in enumerate(zip(parts.flat, contents, strict=True)):
        setup = f", {content.spec.figure.setup}" if differ else ""
        draw_content(part, content, max(widths), f"({chr(ord('a') + index)})", setup)
    return figure
