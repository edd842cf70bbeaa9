r"""Writes the config's parametrization table (paper, Table 1) as CSV, Markdown and LaTeX.

The CSV has a row per role and reads back to the same parametrizations. The attention logits have only one factor, a
multiplier. The LaTeX is a tabular that needs the package booktabs.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mup_moe.analysis.markup import grouped, latex_table, latex_text, markdown_table, markdown_text
from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.pages import write_page
from mup_moe.files import write_csv, write_text
from mup_moe.options import read_sweep
from mup_moe.parametrization import ATTENTION_LOGITS, FACTORS, Parametrization, Power

COLUMNS = ("parametrization", "role", *FACTORS)
_HEADINGS = ("Parametrization", "Role", "Init. variance", "Multiplier", "Learning rate", "Weight decay")
_Row = tuple[str, str, list[Power | None]]  # parametrization, role, factors; None: the role has no such factor


class _Notation(NamedTuple):
    """How a format writes text, a variable, its root and its power, the sign between factors, and a formula."""

    text: Callable[[str], str]
    variable: str
    root: str
    raised: str
    times: str
    formula: str


_MARKDOWN = _Notation(markdown_text, "{}", "√{}", "{}<sup>{}</sup>", " ", "{}")
_LATEX = _Notation(latex_text, r"\mathrm{{{}}}", r"\sqrt{{{}}}", "{}^{{{}}}", r"\,", "${}$")


def run(arguments: argparse.Namespace) -> None:
    """Writes table1.csv, .md, .html and .tex."""
    sweep = read_sweep(arguments)
    write(sweep.parametrizations, sweep.results)


def write(table: Mapping[str, Parametrization], folder: Path) -> None:
    """Writes the table in all formats, a row per parametrization and role."""
    rows = list(_rows(table))
    write_csv(folder / "table1.csv", COLUMNS, ([name, role, *factors] for name, role, factors in rows))
    write_page(folder / "table1", markdown_table(_HEADINGS, _cells(rows, _MARKDOWN)))
    write_text(folder / "table1.tex", latex_table(_HEADINGS, _cells(rows, _LATEX)))


def _rows(table: Mapping[str, Parametrization]) -> Iterator[_Row]:
    for name, parametrization in table.items():
        for role, rule in parametrization.rules.items():
            yield name, role, [getattr(rule, factor) for factor in FACTORS]
        logits = [parametrization.attention_logits if factor == "multiplier" else None for factor in FACTORS]
        yield name, ATTENTION_LOGITS, logits


def _cells(rows: Iterable[_Row], notation: _Notation) -> list[list[str]]:
    return grouped(
        [
            *(notation.text(parametrization_title(name)), notation.text(role.replace("_", " "))),
            *("--" if power is None else notation.formula.format(_quotient(power, notation)) for power in factors),
        ]
        for name, role, factors in rows
    )


def _quotient(power: Power, notation: _Notation) -> str:
    """Formats a product of powers as numerator/denominator."""

    def product(sign: int) -> list[str]:
        factors = []
        for variable, exponent in power.exponents:
            size, base = sign * exponent, notation.variable.format(notation.text(variable))
            if size > 0:
                shape = "{}" if size == 1 else notation.root if size * 2 == 1 else notation.raised
                factors.append(shape.format(base, size))
        return factors

    above, below = product(1), product(-1)
    numerator, denominator = notation.times.join(above) or "1", notation.times.join(below)
    if not below:
        return numerator
    return f"{numerator}/({denominator})" if len(below) > 1 else f"{numerator}/{denominator}"
