"""HTML pages for the report: tables that sort and filter, and figures that can be enlarged.

A page is one file that loads nothing. Its tables can be read without JavaScript too.
"""

from __future__ import annotations

import base64
import gzip
import html
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mup_moe.analysis.markup import markdown_table, markdown_text
from mup_moe.analysis.names import MINUS
from mup_moe.files import write_text

if TYPE_CHECKING:
    from markdown_it.token import Token

    _Cell = tuple[Token, Token]  # the opening tag and the content

# By the stem of the file's name.
TITLES = {
    "claims": "What replicates",
    "tests": "All tests of the claims",
    "optima": "Best learning rates of all figures",
    "slopes": "Slopes of what the probe measured",
    "attribution": "What each group of roles contributes",
    "sensitivity": "What this set-up can detect",
    "comparison": "Rules side by side",
    "table1": "Parametrizations",
    "table2": "Models, sweeps and hyperparameters",
    "plan": "The bill",
}
# The columns of wide CSV files that a page shows.
_CHOSEN = {
    "tests": ("claim", "verdict", "result", "what", "kind", "expect", "estimate", "low", "high", "excess", "reason"),
    "optima": (
        *("figure", "panel", "axis", "value", "log2_lr", "log2_lr_low", "log2_lr_high", "at_edge", "best_loss"),
        *("regret", "drift", "drift_low", "drift_high", "seeds", "diverged", "missing"),
    ),
}
# Columns of names, which are shown as they are: a name may look like a number.
_NAMES = {"claim", "expect", "figure", "kind", "panel", "parametrization", "quantity", "reason", "result", "setup"}
_NAMES |= {"value", "verdict", "what"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 0; padding: 1.5rem 2rem 3rem }
h1 { font-size: 1.5rem; margin: 0 0 .75rem } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem } p, li { max-width: 48rem } code { background: #f1f5f4 }
table { border-collapse: collapse; margin: .75rem 0; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid #dde3e2 }
thead th { position: sticky; top: 0; z-index: 1; background: #fff; border-bottom: 2px solid #7b8794 }
td.number { text-align: right; white-space: nowrap } td.again { color: #66727f } td.wide { min-width: 16rem }
"""
# Over the style of DataTables, which stripes rows and draws boxes.
_TABLE_STYLE = """
div.dt-container { width: fit-content; max-width: none; margin: .5rem 0 1.5rem }
table.dataTable { margin: .25rem 0 !important; width: auto !important }
table.dataTable > thead > tr > th { padding: .35rem .75rem; font-weight: 600 }
table.dataTable > tbody > tr > td { padding: .35rem .75rem }
table.dataTable > tbody > tr:hover > td { background: #eef6f2 }
div.dt-container div.dt-layout-table > div { overflow: visible }
div.dt-container div.dt-layout-row:not(.dt-layout-table) { display: block; position: sticky; left: 2rem;
  width: fit-content; max-width: calc(100vw - 4rem); margin: .25rem 0 }
div.dt-container div.dt-layout-row:not(.dt-layout-table) div.dt-layout-cell { display: flex; flex-wrap: wrap;
  align-items: center; gap: .5rem 1rem; margin: 0; text-align: left }
div.dt-container div.dt-layout-row:not(.dt-layout-table) div.dt-layout-cell > * { margin: 0 }
div.dt-container .dt-search input { border: 1px solid #9aa5b1; border-radius: 4px; padding: .3rem .6rem; width: 14rem }
"""
# itables ships DataTables with its extensions as a module. Long tables get a search field and a filter per
# column.
_TABLE_SCRIPT = """
const unpack = async (packed, type) => {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Blob([await new Response(stream).blob()], { type });
};
const style = document.createElement("style");
style.textContent = await (await unpack("$STYLE$")).text();
document.head.prepend(style);
const { default: DataTable } = await import(URL.createObjectURL(await unpack("$CODE$", "text/javascript")));
for (const table of document.querySelectorAll("table")) {
  const rows = table.tBodies[0]?.rows ?? [], long = rows.length > 8;
  if (!rows.length) continue;
  const numbers = [...rows[0].cells].flatMap((cell, column) => cell.classList.contains("number") ? [column] : []);
  new DataTable(table, {
    autoWidth: false, order: [], paging: false, columnControl: long ? [["searchList"]] : [],
    columnDefs: long ? [{ targets: numbers, columnControl: [["search"]] }] : [],
    language: { search: "", searchPlaceholder: "Search", info: "_TOTAL_ rows", infoFiltered: "of _MAX_",
      infoEmpty: "0 rows", zeroRecords: "No row matches." },
    layout: {
      topStart: long ? ["search", "info"] : null,
      topEnd: null, bottomStart: null, bottomEnd: null,
    },
  });
}
"""
_FIGURE_STYLE = """
button { display: block; border: 0; padding: 0; background: none; width: 100%; cursor: zoom-in }
img { display: block; width: 100%; max-width: var(--width); height: auto }
.large { width: 200%; cursor: zoom-out } .large img { max-width: none }
"""
# A click enlarges the figure around the point that was clicked.
_FIGURE_SCRIPT = """
const button = document.querySelector("button"), image = button.firstElementChild;
button.addEventListener("click", (event) => {
  const box = image.getBoundingClientRect();
  const [x, y] = event.detail ? [event.clientX, event.clientY] : [0, 0];
  const [across, down] = [(x - box.left) / box.width, (y - box.top) / box.height];
  const large = button.classList.toggle("large");
  button.setAttribute("aria-pressed", large);
  const now = image.getBoundingClientRect();
  window.scrollBy(now.left + across * now.width - x, now.top + down * now.height - y);
});
"""
# A number, perhaps with a unit or an interval; or an interval alone.
_NUMBER = re.compile(r"[≥[]?\s*([+-]?(?:[\d,]*\.?\d+(?:e[+-]?\d+)?|inf))(?:\s?([kMGTP])?B?|x|, [^\]]*\]|\s\[[^\]]*\])")
_LARGE = 1e300  # which DataTables takes as a number, unlike infinity
_PREFIXES: dict[str | None, float] = {letter: 1000.0**power for power, letter in enumerate("kMGTP", 1)}
_NBSP = "\N{NO-BREAK SPACE}"
_NOTHING = {"", "--", "[none]"}


def write_page(path: Path, markdown: str) -> None:
    """Writes a table that we wrote in Markdown as it is and as a page: `path`.md and .html."""
    write_text(path.with_suffix(".md"), markdown)
    write_text(path.with_suffix(".html"), table_page(path.name, markdown))


def rows_page(name: str, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Returns a page of the rows of a CSV file, with numbers rounded to three decimals."""
    chosen = [column for column in _CHOSEN.get(name, columns) if column in columns]
    headings = [markdown_text(column.replace("_", " ")) for column in chosen]
    records = (dict(zip(columns, row, strict=True)) for row in rows)
    cells = (
        [markdown_text(str(record[column]) if column in _NAMES else _shown(record[column])) for column in chosen]
        for record in records
    )
    return table_page(name, markdown_table(headings, cells), grouped=False)


def write_rows_page(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes the page of the rows of a CSV file, titled by the stem of its name."""
    write_text(path, rows_page(path.stem, columns, rows))


def figure_page(name: str, png: bytes) -> str:
    """Returns a page that shows a picture, which a click enlarges."""
    width = int.from_bytes(png[16:20])  # of the header of any PNG
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    image = f"<img src='{source}' alt='{html.escape(name)}'>"
    button = f"<button aria-label='Enlarge' aria-pressed='false' style='--width: {width}px'>{image}</button>"
    return _page(name, f"{button}\n<script>{_FIGURE_SCRIPT}</script>", _FIGURE_STYLE)


def table_page(name: str, markdown: str, grouped: bool = True) -> str:
    """Returns a page of Markdown that we wrote, titled by the name of its file. grouped: as for `rendered`."""
    title = TITLES.get(name, name)
    heading = "" if markdown.startswith("# ") else f"<h1>{html.escape(title)}</h1>\n"
    return _page(title, heading + rendered(markdown, grouped), _TABLE_STYLE, _table_script())


def rendered(markdown: str, grouped: bool = True) -> str:
    """Returns Markdown that we wrote as HTML, with the values that its tables sort by.

    grouped: a row whose first cell is empty belongs to the row above, and repeats that one's first cell.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(markdown)
    rows: list[list[_Cell]] = []
    for opened, content in pairwise(tokens):
        if opened.type == "tbody_open":
            rows = []
        elif opened.type == "tr_open":
            rows.append([])
        elif opened.type == "td_open":
            rows[-1].append((opened, content))
        elif opened.type == "tbody_close":
            if grouped:
                _repeat_first(rows)
            for column in zip(*rows, strict=True):
                _mark(column)
    html_: str = parser.renderer.render(tokens, parser.options, {})
    return html_


def _repeat_first(rows: Iterable[Sequence[_Cell]]) -> None:
    above = None
    for (opened, content), *_ in rows:
        if not content.content and above:
            content.children = above
            opened.attrSet("class", "again")
        above = content.children


def _mark(column: Sequence[_Cell]) -> None:
    """Makes numbers sort and filter by value, whatever the unit, with missing ones first; gives long text room."""
    texts = ["".join(child.content for child in content.children or ()) for _, content in column]
    found = [_NUMBER.fullmatch(text.replace(MINUS, "-").replace(_NBSP, " ")) for text in texts]
    if any(found) and all(number or text in _NOTHING for number, text in zip(found, texts, strict=True)):
        for (opened, _), number in zip(column, found, strict=True):
            value = float(number[1].replace(",", "")) * _PREFIXES.get(number[2], 1.0) if number else -_LARGE
            opened.attrSet("class", "number")
            opened.attrSet("data-order", f"{max(-_LARGE, min(value, _LARGE)):.9g}")
            opened.attrSet("data-search", f"{value:.9g}" if number else "")
    elif max(map(len, texts)) > 30:
        for opened, _ in column:
            opened.attrJoin("class", "wide")


def _shown(value: Any) -> str:
    """Returns a value of a CSV file in the form that pages show."""
    text = {"True": "yes", "False": "no", "nan": ""}.get(str(value), str(value))
    try:
        return text if text.isdecimal() else f"{round(float(text), 3) + 0.0:.3f}".replace("-", MINUS)
    except ValueError:
        return text


@cache
def _table_script() -> str:
    # Not by an import: itables reads settings from the working folder and the home when it is imported.
    spec = find_spec("itables")
    assert spec, "a dependency"
    module = Path(str(spec.origin)).with_name("html") / "dt_bundle.js"
    packed = (gzip.compress(path.read_bytes(), mtime=0) for path in (module.with_suffix(".css"), module))
    style, code = (base64.b64encode(data).decode() for data in packed)
    return f"<script type='module'>{_TABLE_SCRIPT.replace('$STYLE$', style).replace('$CODE$', code)}</script>\n"


def _page(title: str, body: str, style: str, script: str = "") -> str:
    head = f"<meta charset='utf-8'>\n<title>{html.escape(title)}</title>\n{script}<style>{_STYLE}{style}</style>"
    return f"<!doctype html>\n<html lang='en'>\n{head}\n{body}\n"
