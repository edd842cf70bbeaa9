"""Compares a figure's losses with published ones, point by point: python -m mup_moe reference NAME."""

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mup_moe.analysis.curve import Curve
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.published import Point, find_reference, read_published
from mup_moe.analysis.runs import figure_curves, read_runs, read_table
from mup_moe.config.cell import LearningRate
from mup_moe.files import write_csv
from mup_moe.options import read_layers, takes

add_arguments = takes("name", "a figure of the config that has a `reference`")

COLUMNS = ("parametrization", "width", "learning_rate", "published_loss", "our_loss", "difference")
SAME = 1e-9  # relative tolerance: learning rates that differ by less are the same one, spelled differently


def run(arguments: argparse.Namespace) -> None:
    """Writes a row per published point. Raises UserError for unusable runs or an unusable reference."""
    name, config = arguments.name, read_layers(arguments).config
    path = find_reference(config, name)
    points = read_published(path, config.analysis.loss)
    folder = arguments.results / name
    curves = figure_curves(read_runs(folder / "runs.csv"), FigureSpec.of(config, name))
    write_csv(folder / "reference.csv", COLUMNS, compare(points, curves))


def read_reference(path: Path) -> list[Point]:
    """Reads the published points from the CSV that `reference` wrote. Raises UserError."""
    types = {"parametrization": str, "width": int, "learning_rate": str, "published_loss": float}
    table = read_table(path, types)[list(types)]
    return [
        Point(parametrization, width, LearningRate(rate), loss)
        for parametrization, width, rate, loss in table.itertuples(index=False, name=None)
    ]


def published_curves(points: Iterable[Point]) -> dict[str, dict[int, Curve]]:
    """Returns parametrization -> width (ascending) -> the published curve, treated as one seed."""
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
    """Yields a row (COLUMNS) per point; our loss is None where our cell does not exist, diverged or was left out."""
    for point in points:
        curve = curves.get(point.parametrization, {}).get(point.width)
        ours = None if curve is None else _loss_there(curve, point.learning_rate)
        yield (*point, ours, None if ours is None else ours - point.loss)


def _loss_there(curve: Curve, learning_rate: float) -> float | None:
    """Returns the mean loss over seeds at exactly this learning rate."""
    for log2_lr, loss in zip(curve.log2_lr.tolist(), curve.mean.tolist(), strict=True):
        if math.isclose(2.0**log2_lr, learning_rate, rel_tol=SAME) and math.isfinite(loss):
            return float(loss)
    return None
