"""Writes the optimum of every curve of every figure, with what it says of transfer."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import pandas as pd

from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.runs import figure_curves, read_runs, read_table
from mup_moe.analysis.transfer import measure_transfer
from mup_moe.config.options import add_config_arguments, read_sweep
from mup_moe.files import UserError, write_csv
from mup_moe.sweep import one_of


class Row(NamedTuple):
    """One curve of one figure. Learning rates in log2, losses in nats; NaN is an empty field.

    drift belongs to the panel, and is repeated on each of its rows. fit, interval and
    drift_interval say how a number came about: see `curve` and `transfer`. points and diverged
    count the curve's learning rates, missing its cells that the runs lack.
    """

    figure: str
    setup: str
    panel: str
    parametrization: str
    axis: str
    value: int
    log2_lr: float
    log2_lr_low: float
    log2_lr_high: float
    interval: str
    at_edge: bool
    fit: str
    best_loss: float
    regret: float
    regret_at_least: bool
    drift: float
    drift_low: float
    drift_high: float
    drift_interval: str
    seeds: int
    points: int
    diverged: int
    missing: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `optima`."""
    parser.add_argument("figure", help="its name in the config")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes a figure's optima. Raises UserError where its runs lack a cell that may not be left out."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.figure, sweep.config.figures, "figures")
    found = rows(read_runs(sweep.runs(name)), {name: FigureSpec.of(sweep.config, name)})
    write_csv(sweep.optima(name), Row._fields, found)


def rows(runs: pd.DataFrame, figures: Mapping[str, FigureSpec]) -> Iterator[Row]:
    """A row per figure, panel in the config's order, and curve value ascending."""
    for name, request in figures.items():
        for panel, curves in figure_curves(runs, request).items():
            transfer = measure_transfer(curves, request.base, request.analysis)
            for value, curve in curves.items():
                best, interval = transfer.optima[value], transfer.intervals[value]
                yield Row(
                    figure=name,
                    setup=request.figure.setup,
                    panel=str(panel),
                    parametrization=request.parametrization(panel),
                    axis=request.figure.curve,
                    value=value,
                    log2_lr=best.log2_lr,
                    log2_lr_low=interval.low,
                    log2_lr_high=interval.high,
                    interval=interval.kind,
                    at_edge=best.at_edge,
                    fit=best.fit,
                    best_loss=best.loss,
                    regret=transfer.regrets[value].nats,
                    regret_at_least=transfer.regrets[value].at_least,
                    drift=transfer.drift,
                    drift_low=transfer.drift_interval.low,
                    drift_high=transfer.drift_interval.high,
                    drift_interval=transfer.drift_interval.kind,
                    seeds=curve.seeds,
                    points=int(np.isfinite(curve.mean).sum()),
                    diverged=int(curve.diverged.sum()),
                    missing=curve.missing,
                )


def read_rows(path: Path) -> list[Row]:
    """Reads what `optima` wrote. Raises UserError."""
    table = read_table(path, get_type_hints(Row))
    return [Row(*record) for record in table[list(Row._fields)].itertuples(index=False, name=None)]


def read_optima(path: Path, name: str, request: FigureSpec) -> dict[Any, list[Row]]:
    """The rows of one figure: panel -> rows, curve value ascending. Raises UserError."""
    found: dict[str, list[Row]] = {}
    for row in read_rows(path):
        if row.figure == name:
            found.setdefault(row.panel, []).append(row)
    panels = {panel: sorted(found.get(str(panel), []), key=lambda row: row.value) for panel in request.panels}
    if any(tuple(row.value for row in of_panel) != request.values for of_panel in panels.values()):
        raise UserError(f"{path} does not hold the curves of {name}: make it anew from the same config")
    return panels
