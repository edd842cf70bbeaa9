r"""Writes tables as Markdown and LaTeX.

In both formats, rows with an empty first cell belong to the row above. The LaTeX is a tabular that needs the package
booktabs.
"""

import re
from collections.abc import Iterable, Sequence

_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "μ": r"$\mu$"}


def markdown_text(text: str) -> str:
    """Escapes text so that Markdown shows it literally, on one line."""
    escaped = re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", " ".join(text.split()))
    # At the start of a paragraph, these would make it a list or a rule.
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+](?:\s|$)|---))", r"\1\\", escaped)


def latex_text(text: str) -> str:
    """Escapes text so that LaTeX shows it literally."""
    return "".join(_TEX.get(letter, rf"\{letter}" if letter in "#$%&_{}" else letter) for letter in text)


def grouped(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Returns the rows, with the first cell empty where it repeats."""
    found: list[list[str]] = []
    previous = None
    for first, *rest in rows:
        found.append(["" if first == previous else first, *rest])
        previous = first
    return found


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; the cells are already Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a booktabs tabular with a rule above every row with a first cell; the cells are already LaTeX."""
    lines = [rf"\begin{{tabular}}{{{'l' * len(headings)}}}", r"\toprule", " & ".join(headings) + r" \\"]
    for cells in rows:
        lines += [r"\midrule"] if cells[0] else []
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
