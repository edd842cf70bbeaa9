"""Writes what a set-up can see: the nats that it loses when one group of roles has another learning rate.

A set-up that loses nothing cannot distinguish a right rule for these roles from a wrong one.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from mup_moe.analysis.markup import markdown_table, markdown_text
from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.pages import write_page
from mup_moe.analysis.runs import lacks, read_rows, read_runs
from mup_moe.config.cell import GroupRate
from mup_moe.files import write_csv
from mup_moe.options import read_sweep, takes
from mup_moe.sweep import Sweep, one_of

add_arguments = takes("figure", "its name in the config")


class SensitivityRow(NamedTuple):
    """One group of roles at one factor of its learning rate, with everything else as its rule says.

    settings: a digest that identifies the set-up, whatever its name. log2_factor: octaves. log2_lr: the best of the
    measured global learning rates. loss, lost: nats, the mean over seeds; lost is relative to factor 1, and infinite
    if a seed diverged.
    """

    figure: str
    setup: str
    settings: str
    parametrization: str
    width: int
    group: str
    log2_factor: float
    log2_lr: float
    loss: float
    lost: float


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/FIGURE/sensitivity.csv, .md and .html. Raises UserError if the runs lack a cell."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.figure, sweep.config.figures, "figures")
    rows = list(sensitivity_rows(read_runs(sweep.runs(name)), name, sweep))
    out = sweep.results / name / "sensitivity"
    write_csv(out.with_suffix(".csv"), SensitivityRow._fields, rows)
    write_page(out, _page(rows))


def sensitivity_rows(runs: pd.DataFrame, name: str, sweep: Sweep) -> Iterator[SensitivityRow]:
    """Yields a row per model, group of roles and factor, including factor 1.

    A seed with a missing cell at a learning rate does not count at that learning rate. Raises UserError for a cell that
    `runs` lacks unless the config leaves out foreign cells.
    """
    figure, column = sweep.config.figures[name], sweep.config.analysis.loss
    settings = sweep.setup_digest(figure.setup)
    losses = runs[column].where(runs["status"] == "finished", math.inf)
    known = dict(zip(runs.index, losses, strict=True))
    absent = [cell for cell in figure.cells() if cell.id not in known]
    if absent and sweep.config.analysis.foreign_cells == "stop":
        raise lacks(absent[0])
    compared = attrgetter("parametrization", "width", "learning_rate", "seed")
    without = set(map(compared, absent))
    of_seeds: dict[tuple[str, int], dict[float, dict[str, list[float]]]] = {}
    for cell in figure.cells():
        if compared(cell) not in without:
            rates = of_seeds.setdefault((cell.parametrization, cell.width), {})
            factors = rates.setdefault(math.log2(cell.learning_rate), {})
            factors.setdefault(cell.learning_rate_of, []).append(known[cell.id])
    for model, rates in of_seeds.items():
        means = {rate: {of: float(np.mean(seeds)) for of, seeds in of_rate.items()} for rate, of_rate in rates.items()}
        best = min(means, key=lambda rate: means[rate].get("", math.inf))
        plain = means[best].get("", math.nan)
        tried = [(GroupRate.parse(of), loss) for of, loss in means[best].items() if of]
        for group in figure.axes.learning_rate_of:
            found = {0.0: plain} | {math.log2(of.factor): loss for of, loss in tried if of.group == group}
            for octaves, loss in sorted(found.items()):
                yield SensitivityRow(name, figure.setup, settings, *model, group, octaves, best, loss, loss - plain)


def lost_at(rows: Iterable[SensitivityRow], octaves: float) -> dict[str, float]:
    """Returns group of roles -> nats lost with its learning rate this many octaves too high; NaN if not measured."""
    found: dict[str, float] = {}
    for group, of_group in _by_group(rows).items():
        x, y = [row.log2_factor for row in of_group], [row.lost for row in of_group]
        # interp returns NaN between two factors if one of them diverged.
        found[group] = float(np.interp(octaves, x, y, left=np.nan, right=np.nan)) if x else math.nan
    return found


def seen(rows: Sequence[SensitivityRow], octaves: float, margin: float) -> str:
    """Says in a sentence what a sweep over this many octaves of width can see.

    At its far end, a rule that leaves a group's learning rate unchanged has it this many octaves too high.
    """
    lost = lost_at(rows, octaves)
    sees = [group for group, nats in lost.items() if nats >= margin]
    blind = [group for group, nats in lost.items() if nats < margin]
    unknown = [group for group in lost if group not in (*sees, *blind)]
    parts = [f"will see: {', '.join(sees) or 'nothing'}", f"not: {', '.join(blind) or 'nothing'}"]
    parts += [f"not measured so far: {', '.join(unknown)}"] if unknown else []
    return "; ".join(parts)


def measured(paths: Iterable[Path]) -> dict[str, list[SensitivityRow]]:
    """Reads the sensitivities of set-ups from tables, by their settings; the first match wins. Raises UserError."""
    found: dict[str, list[SensitivityRow]] = {}
    for path in paths:
        rows = read_rows(path, SensitivityRow)
        for settings in {row.settings for row in rows} - found.keys():
            found[settings] = [row for row in rows if row.settings == settings]
    return found


def _by_group(rows: Iterable[SensitivityRow]) -> Mapping[str, list[SensitivityRow]]:
    found: dict[str, list[SensitivityRow]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def _page(rows: Sequence[SensitivityRow]) -> str:
    """Returns a table per model: nats lost by group of roles and factor, and nats per octave to either side."""
    parts = []
    for model in dict.fromkeys((row.parametrization, row.width) for row in rows):
        of_model = [row for row in rows if (row.parametrization, row.width) == model]
        factors = sorted({row.log2_factor for row in of_model})
        lines = []
        for group, of_group in _by_group(of_model).items():
            lost = {row.log2_factor: row.lost for row in of_group}
            ends = [_per_octave(lost, min(lost)), _per_octave(lost, max(lost))]
            lines.append([group, *(_nats(lost.get(factor, math.nan)) for factor in factors), *ends])
        headings = ["learning rate of", *(f"2<sup>{factor:+g}</sup>" for factor in factors)]
        parts += [
            f"**{markdown_text(parametrization_title(model[0]))}, width {model[1]}**: nats lost, at the global"
            f" learning rate 2<sup>{of_model[0].log2_lr:g}</sup>, by the factor on one group's own",
            "",
            markdown_table([*headings, "per octave down", "per octave up"], lines),
        ]
    return "\n".join(parts)


def _per_octave(lost: Mapping[float, float], end: float) -> str:
    return _nats(lost[end] / abs(end)) if end else "--"


def _nats(value: float) -> str:
    if math.isnan(value):
        return "--"
    return "diverged" if math.isinf(value) else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
