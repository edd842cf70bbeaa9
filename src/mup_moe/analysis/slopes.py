"""Slopes of what a probe measured, log2 of the quantity on log2 of the width, with their intervals."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd

from mup_moe.analysis.runs import read_table
from mup_moe.analysis.transfer import regress
from mup_moe.files import UserError, write_csv
from mup_moe.options import read_sweep, takes
from mup_moe.sweep import one_of

add_arguments = takes("probe", "its name in the config")

VALUES = {"parametrization": str, "width": int, "seed": int, "step": int, "quantity": str, "block": str, "value": float}


class Slope(NamedTuple):
    """A quantity's slope over the widths; NaN where it is 0 or not finite in all models.

    block: "" outside of the blocks. low, high: Student's interval, seeds with intercepts of their
    own. points: models that enter; models: all. lowest_width, highest_width: of all models.
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
    lowest_width: int
    highest_width: int


def run(arguments: argparse.Namespace) -> None:
    """Writes a probe's slopes. Raises UserError for values that are missing or damaged."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.probe, sweep.config.probes, "probes")
    found = slopes(read_values(sweep.probe_values(name)), sweep.config.analysis.confidence)
    write_csv(sweep.slopes(name), Slope._fields, found)


def read_values(path: Path) -> pd.DataFrame:
    """What a probe measured. Raises UserError."""
    table = read_table(path, VALUES)
    if table.empty:
        raise UserError(f"{path} holds no value: delete it and run the same command again")
    return table


def log2_of_positive(values: pd.DataFrame) -> pd.DataFrame:
    """The rows whose value is positive and finite, with log2 of widths and of values."""
    positive = values[np.isfinite(values["value"]) & (values["value"] > 0)]
    found: pd.DataFrame = positive.assign(width=np.log2(positive["width"]), value=np.log2(positive["value"]))
    return found


def slopes(values: pd.DataFrame, confidence: float) -> Iterator[Slope]:
    """A row per parametrization, quantity, block and step, in the order of the values."""
    for key, group in values.groupby(["parametrization", "quantity", "block", "step"], sort=False):
        logs = log2_of_positive(group)
        points = zip(logs["seed"], logs["width"], logs["value"], strict=True)
        slope, interval = regress(list(points), confidence)
        widths = group["width"]
        yield Slope(
            *cast(tuple[str, str, str, int], key),
            slope=slope,
            low=interval.low,
            high=interval.high,
            points=len(logs),
            models=len(group),
            lowest_width=int(widths.min()),
            highest_width=int(widths.max()),
        )
