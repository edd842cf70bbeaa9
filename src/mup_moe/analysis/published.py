"""Reads published losses from the CSV that `figures.*.reference` names.

Uses only the standard library, so that a Snakefile can import it.
"""

import csv
import io
import math
import os
from pathlib import Path
from typing import NamedTuple

from mup_moe.config.cell import LearningRate
from mup_moe.config.settings import Config, FigureSettings
from mup_moe.encoding import read_text
from mup_moe.files import UserError, expand_home
from mup_moe.sweep import one_of

CHECKOUT = Path(__file__).parents[3]


class Point(NamedTuple):
    """One published run; `loss` in nats."""

    parametrization: str
    width: int
    learning_rate: float
    loss: float


def read_published(path: Path, loss: str) -> list[Point]:
    """Reads the points of a CSV with the columns parametrization, width, learning_rate and `loss`.

    Raises UserError, naming the file, if it is missing or damaged, or lists a point twice.
    """
    try:
        text = read_text(path)
        separator = max(",;\t", key=text.partition("\n")[0].count)
        rows = csv.DictReader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        absent = [
            name for name in ("parametrization", "width", "learning_rate", loss) if name not in (rows.fieldnames or ())
        ]
        if absent:
            raise UserError(f"{path} lacks the column `{absent[0]}`: see reference/README.md for the format")
        points = [_point(row, loss, f"{path}, line {rows.line_num}") for row in rows]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: set `reference` to a CSV of published losses, or to null") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read as CSV ({error}): set `reference` to a CSV of published losses, or to null"
        ) from None
    places = [point[:3] for point in points]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice:
        raise UserError(f"{path} lists {twice[0]}, width {twice[1]}, learning rate {twice[2]:g} twice: remove one")
    return points


def find_reference(config: Config, name: str) -> Path:
    """Returns the path of a figure's reference, relative to the working folder or else to the checkout.

    Raises UserError if there is none, or if it does not suit the figure.
    """
    reference = config.figures[one_of(name, config.figures, "figures")].reference
    if reference is None:
        raise UserError(f"`figures.{name}` has no `reference`: set it to a CSV of published losses")
    path = expand_home(reference)
    if not path.exists():
        path = Path(os.path.relpath(CHECKOUT / path))
    check_reference(config.figures[name], read_published(path, config.analysis.loss), path)
    return path


def check_reference(figure: FigureSettings, points: list[Point], path: Path) -> None:
    """Raises UserError if none of the points belongs to a curve of the figure."""
    axes = (figure.panel, figure.curve, figure.axes.architecture)
    if axes != ("parametrization", "width", ("moe",)):
        raise UserError(
            f"{path} is for figures of MoE models with a panel per parametrization and a curve per width:"
            " set the `reference` of other figures to null"
        )
    if not any(
        point.parametrization in figure.axes.parametrization and point.width in figure.axes.width for point in points
    ):
        raise UserError(
            f"{path} has none of the figure's parametrizations and widths: set `reference` to another file, or to null"
        )


def _point(row: dict[str, str | None], loss: str, where: str) -> Point:
    try:
        parametrization, loss_there = row["parametrization"] or "", float(row[loss] or "")
        width = float(row["width"] or "")  # pandas writes an integer column with a missing value as floats
        if not width.is_integer():
            raise ValueError(f"the width {row['width']} is not a whole number")
        point = Point(parametrization, int(width), LearningRate(row["learning_rate"] or ""), loss_there)
    except ValueError as error:
        raise UserError(f"{where}: {error}; give a number in every field") from None
    if not (point.parametrization and point.width > 0 and math.isfinite(point.loss)):
        raise UserError(f"{where} must name a parametrization, a positive width and a finite loss")
    return point
