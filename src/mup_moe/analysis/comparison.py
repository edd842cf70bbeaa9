"""Compares rules on the same seeds: drift, regret, and the loss at the far end of the axis.

A rule is a panel of a figure, in a separate set-up if it needs one. An under-driven expert costs loss that no learning
rate recovers, so losses are compared too, at the learning rate that is best at the base.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mup_moe.analysis.curve import find_optimum
from mup_moe.analysis.excess import UNKNOWN, Excess, Losses, difference, losses_at
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.markup import markdown_table, markdown_text
from mup_moe.analysis.names import axis_value, signed
from mup_moe.analysis.optima import read_optima
from mup_moe.analysis.pages import write_page
from mup_moe.analysis.runs import figure_curves, read_runs
from mup_moe.files import write_csv
from mup_moe.options import read_sweep, takes
from mup_moe.sweep import Sweep, one_of

add_arguments = takes("comparison", "its name in the config")


class ComparisonRow(NamedTuple):
    """One rule, at the far end of its axis and on the way there from the base.

    drift: octaves of the best learning rate per octave of the axis. loss: nats per token at the far end, at the base's
    best learning rate. regret, change, over_first: the mean over seeds of that loss minus another one, in nats per
    token: the loss at the end's own best learning rate (regret), the loss at the base (change), and the end's loss of
    the first rule at the best learning rate of its own base (over_first; NaN for the first rule). low, high: Student's
    interval over seeds, which ignores the noise in those learning rates; NaN for one seed, and infinite if a loss is
    only bounded. at_edge: whether an optimum is at the end of the grid. missing: cells that were left out of the runs.
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
    at_edge: bool
    missing: int
    source: str

    @property
    def title(self) -> str:
        """The rule's name, with a note if optima are not bracketed or cells are missing."""
        lacks = ["not bracketed"] if self.at_edge else []
        lacks += [f"{self.missing} missing"] if self.missing else []
        return f"{self.rule} ({', '.join(lacks)})" if lacks else self.rule


def run(arguments: argparse.Namespace) -> None:
    """Writes RESULTS/COMPARISON/comparison.csv, .md and .html. Raises UserError if the runs lack a cell."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.comparison, sweep.config.comparisons, "comparisons")
    rows = list(comparison_rows(sweep, name))
    out = sweep.results / name / "comparison"
    write_csv(out.with_suffix(".csv"), ComparisonRow._fields, rows)
    write_page(out, page(rows))


def comparison_rows(sweep: Sweep, name: str) -> Iterator[ComparisonRow]:
    """Yields a row per rule, in the order of the config. Raises UserError."""
    specs = {figure: FigureSpec.of(sweep.config, figure) for figure in sweep.config.parts[name]}
    all_curves = {figure: figure_curves(read_runs(sweep.runs(figure)), spec) for figure, spec in specs.items()}
    all_optima = {figure: read_optima(sweep.optima(figure), figure, spec) for figure, spec in specs.items()}
    first: Losses | None = None
    for title, rule in sweep.config.comparisons[name].items():
        spec = specs[rule.figure]
        panel = next(panel for panel in spec.panels if str(panel) == rule.panel)
        curves, optima = all_curves[rule.figure][panel], all_optima[rule.figure][panel]
        end, confidence = max(spec.values), spec.analysis.confidence
        best = {value: find_optimum(curves[value], spec.analysis.fit_points).log2_lr for value in (spec.base, end)}
        here, there = (losses_at(curves[value], best[spec.base], spec.analysis) for value in (spec.base, end))
        regret = difference(there, losses_at(curves[end], best[end], spec.analysis), confidence)
        change = difference(there, here, confidence)
        over_first = difference(there, first, confidence) if first else UNKNOWN
        first = first or there
        seeds = len(there.nats_S)
        yield ComparisonRow(
            name,
            title,
            rule.figure,
            rule.panel,
            spec.figure.curve,
            spec.base,
            end,
            seeds,
            *(optima[0].drift, optima[0].drift_low, optima[0].drift_high),
            *_bounded(regret, seeds),
            float(there.nats_S.mean()),
            *_bounded(change, seeds),
            *_bounded(over_first, seeds),
            at_edge=any(row.at_edge or math.isnan(row.log2_lr) for row in optima),
            missing=sum(row.missing for row in optima),
            source=rule.source,
        )


def _bounded(found: Excess, seeds: int) -> tuple[float, float, float]:
    """Returns value, low and high; one seed has no interval."""
    low, high = (bound if seeds > 1 or math.isinf(bound) else math.nan for bound in (found.low, found.high))
    return found.nats, low, high


def page(rows: Sequence[ComparisonRow]) -> str:
    """Returns the comparison as Markdown: what is compared, and a line per rule."""
    first = rows[0]
    base, end = (axis_value(first.axis, value) for value in (first.base, first.end))
    headings = ("Rule", "Source", "Drift", "Regret", f"Loss at {end}", f"Over {base}", "Over the first rule")
    seeds = f"the mean of {first.seeds} seeds with Student's interval" if first.seeds > 1 else "one seed, no interval"
    return "\n".join(
        [
            f"At {end}, with the learning rate that is best at {base}; nats per token, {seeds}. A difference of losses"
            " is taken seed by seed.",
            "",
            markdown_table(headings, map(_shown, rows)),
        ]
    )


def _shown(row: ComparisonRow) -> list[str]:
    bound = "\N{GREATER-THAN OR EQUAL TO}\N{NO-BREAK SPACE}" if math.isinf(row.change_high) else ""
    return [
        markdown_text(row.title),
        markdown_text(row.source),
        _number(row.drift, row.drift_low, row.drift_high, 2),
        _number(row.regret, row.regret_low, row.regret_high, 3),
        "--" if math.isnan(row.loss) else f"{bound}{row.loss:.3f}",
        _number(row.change, row.change_low, row.change_high, 3),
        _number(row.over_first, row.over_first_low, row.over_first_high, 3),
    ]


def _number(value: float, low: float, high: float, decimals: int) -> str:
    """Formats a number with its interval or bound, if it has one."""
    if math.isnan(value):
        return "--"
    shown = signed(value, decimals)
    if math.isinf(low) or math.isinf(high):
        bound = "\N{GREATER-THAN OR EQUAL TO}" if math.isinf(high) else "\N{LESS-THAN OR EQUAL TO}"
        return "--" if math.isinf(low) and math.isinf(high) else f"{bound} {shown}"
    return shown if math.isnan(low) else f"{shown} [{signed(low, decimals)}, {signed(high, decimals)}]"
