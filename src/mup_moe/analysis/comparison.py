"""Writes how rules compare on the same seeds: drift, regret, and the loss at the far end of the axis.

A rule is a panel of a figure, in a set-up of its own where it needs one. An under-driven expert costs loss that no
learning rate brings back, so that losses are compared too, at the learning rate that is best at the base. S: seeds.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mup_moe.analysis.excess import Transferred, over_seeds, transferred
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.markup import markdown_table, markdown_text, write_page
from mup_moe.analysis.names import axis_value, signed
from mup_moe.analysis.optima import read_optima
from mup_moe.analysis.runs import figure_curves, read_runs
from mup_moe.files import write_csv
from mup_moe.options import read_sweep, takes
from mup_moe.sweep import Sweep, one_of

add_arguments = takes("comparison", "its name in the config")


class ComparisonRow(NamedTuple):
    """One rule, at the far end of its axis and from the base there; nats per token, with Student's interval over seeds.

    drift: octaves of the best learning rate per octave of the axis. regret: what the base's best learning rate costs
    at the end. loss: what it comes to there. change: over the loss at the base. over_first: over the loss of the first
    rule, each at its own base's best learning rate; 0 for the first. An infinite upper bound: at least so much.
    """

    comparison: str
    rule: str
    figure: str
    panel: str
    axis: str
    base: int
    end: int
    seeds: int
    drift: float
    drift_low: float
    drift_high: float
    regret: float
    regret_low: float
    regret_high: float
    loss: float
    change: float
    change_low: float
    change_high: float
    over_first: float
    over_first_low: float
    over_first_high: float
    source: str


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/COMPARISON/comparison.csv, .md and .html. Raises UserError for runs that lack a cell."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.comparison, sweep.config.comparisons, "comparisons")
    rows = list(comparison_rows(sweep, name))
    out = sweep.results / name / "comparison"
    write_csv(out.with_suffix(".csv"), ComparisonRow._fields, rows)
    write_page(out, "Rules beyond the paper", page(rows))


def comparison_rows(sweep: Sweep, name: str) -> Iterator[ComparisonRow]:
    """A row per rule, in the order of the config. Raises UserError."""
    first: Transferred | None = None
    for title, rule in sweep.config.comparisons[name].items():
        spec = FigureSpec.of(sweep.config, rule.figure)
        panel = next(panel for panel in spec.panels if str(panel) == rule.panel)
        curves = figure_curves(read_runs(sweep.runs(rule.figure)), spec)[panel]
        drift = read_optima(sweep.optima(rule.figure), rule.figure, spec)[panel][0]
        end = max(value for value in spec.values if value != spec.base)
        there, here = (transferred(curves, value, spec.base, spec.analysis) for value in (end, spec.base))
        first = first or there
        regret, change, over_first = (
            over_seeds(nats_S, there.at_least, spec.analysis.confidence)
            for nats_S in (there.regrets_S, there.losses_S - here.losses_S, there.losses_S - first.losses_S)
        )
        yield ComparisonRow(
            comparison=name,
            rule=title,
            figure=rule.figure,
            panel=rule.panel,
            axis=spec.figure.curve,
            base=spec.base,
            end=end,
            seeds=len(there.losses_S),
            drift=drift.drift,
            drift_low=drift.drift_low,
            drift_high=drift.drift_high,
            regret=regret.nats,
            regret_low=regret.low,
            regret_high=regret.high,
            loss=float(there.losses_S.mean()),
            change=change.nats,
            change_low=change.low,
            change_high=change.high,
            over_first=over_first.nats,
            over_first_low=over_first.low,
            over_first_high=over_first.high,
            source=rule.source,
        )


def page(rows: Sequence[ComparisonRow]) -> str:
    """The comparison as Markdown: what is compared, and a line per rule."""
    first = rows[0]
    base, end = (axis_value(first.axis, value) for value in (first.base, first.end))
    headings = ("Rule", "Source", "Drift", "Regret", f"Loss at {end}", f"Over {base}", "Over the first rule")
    return "\n".join(
        [
            f"At {end}, with the learning rate that is best at {base}; nats per token, the mean of {first.seeds} seeds"
            " with Student's interval. A difference of losses is taken seed by seed.",
            "",
            markdown_table(headings, (_shown(row, row is first) for row in rows)),
        ]
    )


def _shown(row: ComparisonRow, first: bool) -> list[str]:
    return [
        markdown_text(row.rule),
        markdown_text(row.source),
        f"{signed(row.drift)} [{signed(row.drift_low)}, {signed(row.drift_high)}]",
        _nats(row.regret, row.regret_low, row.regret_high),
        f"{row.loss:.3f}",
        _nats(row.change, row.change_low, row.change_high),
        "--" if first else _nats(row.over_first, row.over_first_low, row.over_first_high),
    ]


def _nats(value: float, low: float, high: float) -> str:
    if math.isinf(high):
        return f"\N{GREATER-THAN OR EQUAL TO} {signed(value, 3)}"
    return f"{signed(value, 3)} [{signed(low, 3)}, {signed(high, 3)}]"
