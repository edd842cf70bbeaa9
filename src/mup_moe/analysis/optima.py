"""Writes the optimum of every curve of a figure, with drift and regret."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.runs import figure_curves, read_rows, read_runs
from mup_moe.analysis.transfer import measure_transfer
from mup_moe.files import UserError, write_csv
from mup_moe.options import read_sweep, takes
from mup_moe.sweep import one_of

add_arguments = takes("figure", "its name in the config")


class OptimumRow(NamedTuple):
    """One curve of one figure. Learning rates are in log2, losses in nats; NaN is written as an empty field.

    Where a figure tunes a group of roles, its learning rates are factors on that group's own.

    drift belongs to the panel and is repeated on each of its rows. fit, interval and drift_interval name the method
    behind a number: see `curve` and `transfer`. points and diverged count learning rates of the curve; missing counts
    its cells that the runs lack.
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


def run(arguments: argparse.Namespace) -> None:
    """Writes a figure's optima. Raises UserError if its runs lack a cell that may not be left out."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.figure, sweep.config.figures, "figures")
    found = optimum_rows(read_runs(sweep.runs(name)), name, FigureSpec.of(sweep.config, name))
    write_csv(sweep.optima(name), OptimumRow._fields, found)


def optimum_rows(runs: pd.DataFrame, name: str, spec: FigureSpec) -> Iterator[OptimumRow]:
    """Yields a row per curve: panels in the config's order, curve values ascending."""
    for panel, curves in figure_curves(runs, spec).items():
        transfer = measure_transfer(curves, spec.base, spec.analysis)
        for value, curve in curves.items():
            best, interval = transfer.optima[value], transfer.intervals[value]
            yield OptimumRow(
                figure=name,
                setup=spec.figure.setup,
                panel=str(panel),
                parametrization=spec.parametrization(panel),
                axis=spec.figure.curve,
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


def read_optima(path: Path, name: str, spec: FigureSpec) -> dict[Any, list[OptimumRow]]:
    """Reads the rows of one figure: panel -> rows, curve value ascending. Raises UserError."""
    rows = sorted(read_rows(path, OptimumRow), key=lambda row: row.value)
    panels = {panel: [row for row in rows if (row.figure, row.panel) == (name, str(panel))] for panel in spec.panels}
    if any(tuple(row.value for row in of_panel) != spec.values for of_panel in panels.values()):
        raise UserError(f"{path} does not contain the curves of {name}: remake it with the same config")
    return panels
