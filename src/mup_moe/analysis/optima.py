"""Writes the optimum of every curve of every figure, with what it says of transfer."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mup_moe.analysis.request import FigureRequest, parse_json
from mup_moe.analysis.runs import figure_curves, read_runs
from mup_moe.analysis.transfer import measure_transfer
from mup_moe.files import write_csv

COLUMNS = (
    "figure",
    "panel",
    "parametrization",
    "axis",
    "value",
    "log2_lr",
    "log2_lr_low",
    "log2_lr_high",
    "interval",
    "at_edge",
    "fit",
    "best_loss",
    "regret",
    "drift",
    "drift_low",
    "drift_high",
    "drift_interval",
    "seeds",
    "points",
    "diverged",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `optima`."""
    parser.add_argument("--runs", type=Path, required=True, help="the CSV that `aggregate` wrote")
    parser.add_argument("--figures", required=True, help="JSON object: a figure's name -> its figure_request()")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")


def run(arguments: argparse.Namespace) -> None:
    """Writes optima.csv. Raises UserError when the runs lack a cell of a figure."""
    requests = parse_json(arguments.figures, "--figures")
    figures = {name: FigureRequest.of(request) for name, request in requests.items()}
    write_csv(arguments.out, COLUMNS, rows(read_runs(arguments.runs), figures))


def rows(runs: pd.DataFrame, figures: Mapping[str, FigureRequest]) -> Iterator[list[Any]]:
    """A row (COLUMNS) per figure, panel in the config's order, and curve value ascending."""
    for name, request in figures.items():
        for panel, curves in figure_curves(runs, request).items():
            transfer = measure_transfer(curves, request.base, request.analysis)
            drift = transfer.drift_interval
            for value, curve in curves.items():
                best, interval = transfer.optima[value], transfer.intervals[value]
                points = int(np.isfinite(curve.mean).sum())
                row = [name, panel, request.parametrization(panel), request.figure.curve, value]
                row += [best.log2_lr, interval.low, interval.high, interval.kind, best.at_edge, best.fit]
                row += [best.loss, transfer.regrets[value], transfer.drift, drift.low, drift.high, drift.kind]
                row += [curve.seeds, points, curve.mean.size - points]
                # NaN is an empty field, as everywhere in our tables.
                yield ["" if isinstance(field, float) and np.isnan(field) else field for field in row]
