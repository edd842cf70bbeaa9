r"""Tables as Markdown and LaTeX.

In both, rows whose first cell is empty belong to the row above. The LaTeX is a tabular that needs
the package booktabs.
"""

import re
from collections.abc import Iterable, Sequence

_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "μ": r"$\mu$"}


def markdown_text(text: str) -> str:
    """Returns text that Markdown shows verbatim, on one line."""
    escaped = re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", " ".join(text.split()))
    # At the start of a paragraph these would begin a list or a rule.
    return re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[-+](?:\s|$)|---))", r"\1\\", escaped)


def latex_text(text: str) -> str:
    """Returns text that LaTeX shows verbatim."""
    return "".join(_TEX.get(letter, rf"\{letter}" if letter in "#$%&_{}" else letter) for letter in text)


def grouped(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Returns the rows with a first cell only where it changes."""
    found: list[list[str]] = []
    previous = None
    for first, *rest in rows:
        found.append(["" if first == previous else first, *rest])
        previous = first
    return found


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table of cells that are Markdown already."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a booktabs tabular of cells that are LaTeX already, with a rule above each group of rows."""
    lines = [rf"\begin{{tabular}}{{{'l' * len(headings)}}}", r"\toprule", " & ".join(headings) + r" \\"]
    for cells in rows:
        lines += [r"\midrule"] if cells[0] else []
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
