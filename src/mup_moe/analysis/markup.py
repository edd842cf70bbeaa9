r"""Writes tables as Markdown and LaTeX, and Markdown as HTML.

In both formats, rows with an empty first cell belong to the row above. The LaTeX is a tabular that needs the package
booktabs.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mup_moe.files import write_text

_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "μ": r"$\mu$"}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;margin:2em auto;padding:0 1.5em;"
    "width:fit-content;max-width:70em}"
    "p,li{max-width:60em}table{border-collapse:collapse;margin:1em 0}th,td{padding:.35em .7em;text-align:left;"
    "border-bottom:1px solid #ddd;vertical-align:top}th{border-bottom:2px solid #888}code{background:#f3f3f3}"
)


def html_page(title: str, markdown: str) -> str:
    """Renders Markdown that we wrote as a standalone page, which is also readable in a frame."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    head = f"<meta charset='utf-8'>\n<title>{title}</title>\n<style>{_STYLE}</style>"
    return f"<!doctype html>\n{head}\n{body}"


def write_page(path: Path, title: str, markdown: str) -> None:
    """Writes Markdown both verbatim and as a page: `path`.md and .html."""
    write_text(path.with_suffix(".md"), markdown)
    write_text(path.with_suffix(".html"), html_page(title, markdown))


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
