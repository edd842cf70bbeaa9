"""Computes slopes of a probe's measurements, log2 of the quantity on log2 of the axis, with their intervals."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast, get_args

import numpy as np
import pandas as pd

from mup_moe.analysis.pages import write_rows_page
from mup_moe.analysis.runs import read_table
from mup_moe.analysis.transfer import regress
from mup_moe.config.settings import CurveAxis
from mup_moe.files import UserError, write_csv
from mup_moe.options import read_sweep, takes
from mup_moe.sweep import one_of

add_arguments = takes("probe", "its name in the config")

VALUES = {"parametrization": str, "seed": int, "step": int, "quantity": str, "block": str, "value": float}
# The axes that a probe may vary; the column of that name has each model's value.
OVER = get_args(CurveAxis)


class Slope(NamedTuple):
    """The slope of a quantity over the axis of its probe; NaN if the quantity is 0 or not finite in all models.

    block: "" outside the blocks. low, high: Student's interval (see `transfer.regress`). points: the number of models
    with a positive, finite value; models: the number of all models. lowest, highest: the range of the axis over all
    models.
    """

    parametrization: str
    quantity: str
    block: str
    step: int
    slope: float
    low: float
    high: float
    points: int
    models: int
    lowest: int
    highest: int


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/PROBE.csv and RESULTS/PROBE/slopes.html. Raises UserError for missing or damaged values."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.probe, sweep.config.probes, "probes")
    found = list(slopes(read_values(sweep.probe_values(name)), sweep.config.analysis.confidence))
    write_csv(sweep.slopes(name), Slope._fields, found)
    write_rows_page(sweep.results / name / "slopes.html", Slope._fields, found)


def read_values(path: Path) -> pd.DataFrame:
    """Reads what a probe measured. Raises UserError."""
    table = read_table(path, VALUES)
    axes = [axis for axis in OVER if axis in table.columns] or ["width"]
    table = read_table(path, VALUES | {axes[0]: int})
    if table.empty:
        raise UserError(f"{path} has no values: delete it and run the same command again")
    return table


def columns_over(axis: str) -> list[str]:
    """Returns the columns of values measured over an axis."""
    first, *others = VALUES
    return [first, axis, *others]


def over(values: pd.DataFrame) -> str:
    """Returns the axis over which values were measured, which is one of their columns."""
    axis: str = next(axis for axis in OVER if axis in values.columns)
    return axis


def log2_of_positive(values: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows with a positive, finite value, with log2 of the axis and of the value."""
    axis, positive = over(values), values[np.isfinite(values["value"]) & (values["value"] > 0)]
    found: pd.DataFrame = positive.assign(
        **{axis: np.log2(positive[axis].astype(float)), "value": np.log2(positive["value"])}
    )
    return found


def slopes(values: pd.DataFrame, confidence: float) -> Iterator[Slope]:
    """Yields a slope per parametrization, quantity, block and step, in the order of the values."""
    axis = over(values)
    for key, group in values.groupby(["parametrization", "quantity", "block", "step"], sort=False):
        logs = log2_of_positive(group)
        points = zip(logs["seed"], logs[axis], logs["value"], strict=True)
        slope, interval = regress(list(points), confidence)
        yield Slope(
            *cast(tuple[str, str, str, int], key),
            slope=slope,
            low=interval.low,
            high=interval.high,
            points=len(logs),
            models=len(group),
            lowest=int(group[axis].min()),
            highest=int(group[axis].max()),
        )
