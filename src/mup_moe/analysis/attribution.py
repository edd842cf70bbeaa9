"""Writes what each group of roles contributes to transfer: the drift and excess of every row of a figure.

A row `RULE-without-GROUP` leaves one group of roles as under SP; `RULE-only-GROUP` applies the rule to one group only.
"""

import argparse
import math
from collections.abc import Iterator
from typing import NamedTuple

from mup_moe.analysis.excess import over_lowest
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.markup import markdown_table, markdown_text
from mup_moe.analysis.names import parametrization_title, signed
from mup_moe.analysis.optima import read_optima
from mup_moe.analysis.pages import write_page
from mup_moe.analysis.runs import figure_curves, read_runs
from mup_moe.files import write_csv
from mup_moe.options import read_sweep, takes
from mup_moe.parametrization import CONTROL, STANDARD
from mup_moe.sweep import one_of

add_arguments = takes("figure", "its name in the config")

_HEADINGS = ("Row", "Drift", "Interval", "Excess", "Drift by the change", "Excess by the change")


class AttributionRow(NamedTuple):
    """One panel of a figure; missing numbers are NaN.

    of: the row that this one differs from in one group of roles; "" for a row of the table, which has no changes.
    drift: octaves of learning rate per octave of the axis. excess: nats at the far end of the axis
    (`analysis.excess`), a lower bound if excess_high is infinite. drift_change, excess_change: the difference from the
    values of `of`.
    """

    figure: str
    panel: str
    of: str
    group: str
    drift: float
    drift_low: float
    drift_high: float
    excess: float
    excess_low: float
    excess_high: float
    drift_change: float = math.nan
    excess_change: float = math.nan


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/FIGURE/attribution.csv, .md and .html. Raises UserError if the runs lack a cell."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.figure, sweep.config.figures, "figures")
    spec = FigureSpec.of(sweep.config, name)
    panels = figure_curves(read_runs(sweep.runs(name)), spec)
    optima = read_optima(sweep.optima(name), name, spec)
    found: dict[str, AttributionRow] = {}
    for panel, rows in optima.items():
        cost = over_lowest(panels, panel, spec.base, spec.analysis)
        of, group = _varied(str(panel))
        drift = (rows[0].drift, rows[0].drift_low, rows[0].drift_high)
        found[str(panel)] = AttributionRow(name, str(panel), of, group, *drift, cost.nats, cost.low, cost.high)
    rows_ = list(_with_changes(found))
    out = sweep.results / name / "attribution"
    write_csv(out.with_suffix(".csv"), AttributionRow._fields, rows_)
    write_page(out, markdown_table(_HEADINGS, map(_shown, rows_)))


def _varied(panel: str) -> tuple[str, str]:
    """Returns the row that a control varies and the group of roles in which it does."""
    match = CONTROL.fullmatch(panel)
    if match is None:
        return "", ""
    return (match["row"] if match["what"] == "without" else STANDARD), match["group"]


def _with_changes(rows: dict[str, AttributionRow]) -> Iterator[AttributionRow]:
    for row in rows.values():
        whole = rows.get(row.of)
        changes = (row.drift - whole.drift, row.excess - whole.excess) if whole else (math.nan, math.nan)
        yield row._replace(drift_change=changes[0], excess_change=changes[1])


def _shown(row: AttributionRow) -> list[str]:
    def number(value: float) -> str:
        return "--" if math.isnan(value) else signed(value)

    bound = "\N{GREATER-THAN OR EQUAL TO} " if math.isinf(row.excess_high) else ""
    return [
        markdown_text(parametrization_title(row.panel)),
        number(row.drift),
        f"[{number(row.drift_low)}, {number(row.drift_high)}]",
        "--" if math.isnan(row.excess) else f"{bound}{row.excess:.3f}",
        number(row.drift_change),
        number(row.excess_change),
    ]
