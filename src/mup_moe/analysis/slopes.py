"""Slopes of what a probe measured, log2 of the quantity on log2 of the axis, with their intervals."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast, get_args

import numpy as np
import pandas as pd

from mup_moe.analysis.pages import rows_page
from mup_moe.analysis.runs import read_table
from mup_moe.analysis.transfer import regress
from mup_moe.config.settings import CurveAxis
from mup_moe.files import UserError, write_csv, write_text
from mup_moe.options import read_sweep, takes
from mup_moe.sweep import one_of

add_arguments = takes("probe", "its name in the config")

VALUES = {"parametrization": str, "seed": int, "step": int, "quantity": str, "block": str, "value": float}
# What a probe may go over: the column of that name has each model's.
OVER = get_args(CurveAxis)


class Slope(NamedTuple):
    """A quantity's slope over the axis of its probe; NaN where it is 0 or not finite in all models.

    block: "" outside of the blocks. low, high: Student's interval, seeds with intercepts of their
    own. points: models that enter; models: all. lowest, highest: on the axis, of all models.
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
    write_text(sweep.results / name / "slopes.html", rows_page("slopes", Slope._fields, found))


def read_values(path: Path) -> pd.DataFrame:
    """What a probe measured. Raises UserError."""
    table = read_table(path, VALUES)
    axes = [axis for axis in OVER if axis in table.columns] or ["width"]
    table = read_table(path, VALUES | {axes[0]: int})
    if table.empty:
        raise UserError(f"{path} holds no value: delete it and run the same command again")
    return table


def columns_over(axis: str) -> list[str]:
    """The columns of values that go over an axis."""
    first, *others = VALUES
    return [first, axis, *others]


def over(values: pd.DataFrame) -> str:
    """The axis that values go over: the column of theirs that is one."""
    axis: str = next(axis for axis in OVER if axis in values.columns)
    return axis


def log2_of_positive(values: pd.DataFrame) -> pd.DataFrame:
    """The rows whose value is positive and finite, with log2 of their axis and of values."""
    axis, positive = over(values), values[np.isfinite(values["value"]) & (values["value"] > 0)]
    found: pd.DataFrame = positive.assign(
        **{axis: np.log2(positive[axis].astype(float)), "value": np.log2(positive["value"])}
    )
    return found


def slopes(values: pd.DataFrame, confidence: float) -> Iterator[Slope]:
    """A row per parametrization, quantity, block and step, in the order of the values."""
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
