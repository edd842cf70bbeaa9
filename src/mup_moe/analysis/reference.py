"""Compares a figure's losses with published ones, point by point: python -m mup_moe reference."""

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mup_moe.analysis.curve import Curve
from mup_moe.analysis.published import Point, check_reference, read_published
from mup_moe.analysis.request import FigureRequest, parse_json
from mup_moe.analysis.runs import figure_curves, read_runs
from mup_moe.files import UserError, write_csv

COLUMNS = ("parametrization", "width", "learning_rate", "published_loss", "our_loss", "difference")
SAME = 1e-9  # relative: learning rates that differ by less are one, spelled differently


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `reference`."""
    parser.add_argument("--runs", type=Path, required=True, help="the CSV that `aggregate` wrote")
    parser.add_argument("--figure", required=True, help="JSON object: the figure_request(), with its reference")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")


def run(arguments: argparse.Namespace) -> None:
    """Writes a row per published point. Raises UserError for runs or a reference that do not serve."""
    request = FigureRequest.parse(parse_json(arguments.figure, "--figure"))
    if request.figure.reference is None:
        raise UserError("the figure's request names no reference: pass what the workflow passes")
    curves = figure_curves(read_runs(arguments.runs), request)
    rows = compare(published_points(request), curves)
    write_csv(arguments.out, COLUMNS, rows)


def published_points(request: FigureRequest) -> list[Point]:
    """What the figure's reference holds; nothing where it has none. Raises UserError."""
    if request.figure.reference is None:
        return []
    path = Path(request.figure.reference)
    points = read_published(path, request.analysis.loss)
    check_reference(request.figure, points, path)
    return points


def published_curves(points: Iterable[Point]) -> dict[str, dict[int, Curve]]:
    """Parametrization -> width (ascending) -> the published curve, as if of one seed."""
    found: dict[str, dict[int, list[Point]]] = {}
    for point in sorted(points):
        found.setdefault(point.parametrization, {}).setdefault(point.width, []).append(point)
    return {
        parametrization: {
            width: Curve(
                np.log2([point.learning_rate for point in of_width]), np.array([[point.loss for point in of_width]])
            )
            for width, of_width in of_panel.items()
        }
        for parametrization, of_panel in found.items()
    }


def compare(points: Iterable[Point], curves: Mapping[Any, Mapping[int, Curve]]) -> Iterator[tuple[Any, ...]]:
    """A row (COLUMNS) per point; None where no cell of ours stands there, or where it diverged or was left out."""
    for point in points:
        curve = curves.get(point.parametrization, {}).get(point.width)
        ours = None if curve is None else _loss_there(curve, point.learning_rate)
        yield (*point, ours, None if ours is None else ours - point.loss)


def _loss_there(curve: Curve, learning_rate: float) -> float | None:
    """The mean loss over seeds at exactly this learning rate."""
    for log2_lr, loss in zip(curve.log2_lr.tolist(), curve.mean.tolist(), strict=True):
        if math.isclose(2.0**log2_lr, learning_rate, rel_tol=SAME) and math.isfinite(loss):
            return float(loss)
    return None
