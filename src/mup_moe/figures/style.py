"""The style of all figures, their sizes, and how they are saved."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mup_moe.figures.plotting import ConstrainedLayoutEngine, Figure, SubFigure, Text, matplotlib, sns
from mup_moe.files import atomic_write
from mup_moe.parametrization import GROUPS

WIDTH = 7.0  # inches: the text width of a paper
NARROW = 4.6  # inches, of a figure of one panel
LINE = 0.15  # inches, of a line of text
MARGIN = 0.1  # inches, kept free next to fitted text
INK, FAINT = "#222222", "#8c8c8c"
BAND = "#ececec"  # the background of values within a margin
DOTTED = (0, (1, 2))
LEGEND: dict[str, Any] = {"frameon": False, "handletextpad": 0.5, "columnspacing": 1.4, "borderaxespad": 0.2}
RC: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType, embedded: text that can be searched and edited
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "mathtext.fontset": "dejavusans",
    **dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8),
    "axes.titlesize": 9,
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 3),
    **dict.fromkeys(("axes.edgecolor", "text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def group_colors() -> dict[str, Any]:
    """Returns a color for each group of roles, the same in every figure."""
    return dict(zip(GROUPS, sns.color_palette("colorblind", len(GROUPS)), strict=True))


@contextmanager
def drawing_style() -> Iterator[None]:
    """Sets the fonts, lines and ticks of all figures, so that figures drawn and saved inside look the same anywhere."""
    with matplotlib.style.context(["default", sns.axes_style("ticks"), RC]):
        yield


def shades(values: Sequence[int]) -> dict[int, Any]:
    """Returns a color per value, light to dark; crest is perceptually uniform and varies in lightness."""
    colors = sns.color_palette("crest", as_cmap=True)(np.linspace(0.05, 1.0, len(values)))
    return dict(zip(values, map(tuple, colors), strict=True))


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of this size in inches, with a layout that avoids overlaps."""
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.05)
    return Figure(figsize=(width, height), layout=layout)


def save(figure: Figure, path: Path) -> None:
    """Writes a PDF and a PNG; `path` has no suffix. Equal figures give equal bytes."""
    # Dates and versions would make equal figures differ.
    with atomic_write(path.with_name(f"{path.name}.pdf")) as file:
        figure.savefig(file, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    drawn, dpi = BytesIO(), 200
    figure.savefig(drawn, format="png", dpi=dpi)
    with atomic_write(path.with_name(f"{path.name}.png")) as file, Image.open(drawn) as image:
        # This cuts the size to a third: few colors are drawn, and 256 suffice even for their edges.
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True, dpi=(dpi, dpi))


def draw_legend(
    figure: Figure | SubFigure, handles: Mapping[str, Any], title: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Draws a legend of handles by name, outside the panels, in as few rows as fit the figure's width.

    title: text properties in which the first name differs from the others.
    """
    for rows in range(1, len(handles) + 1):
        columns = math.ceil(len(handles) / rows)
        legend = figure.legend(list(handles.values()), list(handles), ncols=columns, **LEGEND, **options)
        legend.get_texts()[0].set(**title or {})
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width - MARGIN * figure.dpi:
            break
        legend.remove()
    add_lines(figure, math.ceil(len(handles) / columns) - 1)


def wrap(text: Text, pixels: float) -> None:
    """Breaks a text, rotated or not, into as few lines as possible, none longer than this."""
    whole = text.get_text()
    for characters in range(len(whole), 0, -1):
        text.set_text("\n".join(textwrap.wrap(whole, characters)))
        if max(text.get_window_extent().size) <= pixels:
            break


def add_lines(figure: Figure | SubFigure, lines: int) -> None:
    """Makes the whole figure taller by some lines of text, so that its panels keep their height."""
    whole = figure.get_figure(root=True)
    whole.set_figheight(whole.get_figheight() + lines * LINE)
