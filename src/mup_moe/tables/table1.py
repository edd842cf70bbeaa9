r"""Writes the parametrization table (paper, Table 1) as CSV, Markdown and LaTeX, from the table itself.

The CSV is long (a row per role) and reads back to the same parametrizations. The attention logits
have one factor, a multiplier. The LaTeX is a tabular that needs the package booktabs.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mup_moe.analysis.markup import html_page, latex_table, latex_text, markdown_table, markdown_text
from mup_moe.analysis.names import parametrization_title
from mup_moe.config.options import add_config_arguments, read_sweep
from mup_moe.files import write_csv, write_text
from mup_moe.parametrization import ATTENTION_LOGITS, FACTORS, Parametrization, Power

COLUMNS = ("parametrization", "role", *FACTORS)
_HEADINGS = ("Parametrization", "Role", "Init. variance", "Multiplier", "Learning rate", "Weight decay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `table1`."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes table1.csv, .md, .html and .tex."""
    sweep = read_sweep(arguments)
    write(sweep.parametrizations, sweep.results)


def write(table: Mapping[str, Parametrization], folder: Path) -> None:
    """Writes the table in all formats."""
    write_csv(folder / "table1.csv", COLUMNS, ([p, r, *map(_plain, f)] for p, r, f in _rows(table)))
    write_text(folder / "table1.md", markdown(table))
    write_text(folder / "table1.html", html_page("Parametrizations", markdown(table)))
    write_text(folder / "table1.tex", latex(table))


def markdown(table: Mapping[str, Parametrization]) -> str:
    """A Markdown table, a row per parametrization and role."""
    return markdown_table(_HEADINGS, _cells(table, markdown_text, _markdown_factor))


def latex(table: Mapping[str, Parametrization]) -> str:
    """A booktabs tabular, a row per parametrization and role."""
    return latex_table(_HEADINGS, _cells(table, latex_text, _latex_factor))


def _rows(table: Mapping[str, Parametrization]) -> Iterator[tuple[str, str, list[Power | None]]]:
    """(parametrization, role, its four factors; None where the role has no such factor)."""
    for name, parametrization in table.items():
        for role, rule in parametrization.rules.items():
            yield name, role, [getattr(rule, factor) for factor in FACTORS]
        logits = [parametrization.attention_logits if factor == "multiplier" else None for factor in FACTORS]
        yield name, ATTENTION_LOGITS, logits


def _cells(
    table: Mapping[str, Parametrization], text: Callable[[str], str], factor: Callable[[Power | None], str]
) -> Iterator[tuple[str, ...]]:
    """Rendered rows; a parametrization is named in its first row only."""
    previous = None
    for name, role, factors in _rows(table):
        title = text(parametrization_title(name)) if name != previous else ""
        yield (title, text(role.replace("_", " ")), *map(factor, factors))
        previous = name


def _plain(power: Power | None) -> str:
    return "" if power is None else str(power)


def _markdown_factor(power: Power | None) -> str:
    if power is None:
        return "--"
    return _quotient(
        power,
        name=markdown_text,
        root=lambda text: f"√{text}",
        raised=lambda text, exponent: f"{text}<sup>{exponent}</sup>",
        times=" ",
    )


def _latex_factor(power: Power | None) -> str:
    if power is None:
        return "--"
    quotient = _quotient(
        power,
        name=lambda text: rf"\mathrm{{{latex_text(text)}}}",
        root=lambda text: rf"\sqrt{{{text}}}",
        raised=lambda text, exponent: f"{text}^{{{exponent}}}",
        times=r"\,",
    )
    return f"${quotient}$"


def _quotient(
    power: Power,
    *,
    name: Callable[[str], str],
    root: Callable[[str], str],
    raised: Callable[[str, Any], str],
    times: str,
) -> str:
    """A product of powers as numerator/denominator, in the notation that the callables write."""

    def product(sign: int) -> list[str]:
        factors = []
        for variable, exponent in power.exponents:
            size, base = sign * exponent, name(variable)
            if size > 0:
                factors.append(base if size == 1 else root(base) if size * 2 == 1 else raised(base, size))
        return factors

    above, below = product(1), product(-1)
    numerator = times.join(above) or "1"
    if not below:
        return numerator
    denominator = times.join(below)
    return f"{numerator}/({denominator})" if len(below) > 1 else f"{numerator}/{denominator}"
