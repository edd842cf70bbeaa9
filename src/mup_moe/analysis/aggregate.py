"""Collects the summaries of finished cells into one table: a row per cell, in the order asked for."""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mup_moe.config.cell import Cell
from mup_moe.config.learning_rate import LearningRate
from mup_moe.files import UserError, read_json, write_csv

# Columns that a summary has under the same name.
_COPIED = (
    "steps",
    "tokens",
    "wall_seconds",
    "flops",
    "parameters",
    "active_parameters",
    "device",
    "fingerprint",
)
COLUMNS = (
    "cell",
    "setup",
    "architecture",
    "parametrization",
    "width",
    "learning_rate",
    "log2_learning_rate",
    "granularity",
    "experts",
    "seed",
    "status",
    "train_loss",
    "valid_loss",
    *_COPIED,
)
STATUSES = ("finished", "diverged")
LOSSES = ("train_loss", "valid_loss")
# What cells of one set-up must share for their losses to be compared.
_SHARED = {"code": "code", "precision": "precision", "tokens_digest": "tokens"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aggregate`."""
    parser.add_argument(
        "--cells",
        required=True,
        help="text file with a cell's id and its training request's digest per line; - reads standard input",
    )
    parser.add_argument("--results", type=Path, required=True, help="folder that holds CELL/summary.json")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")


def run(arguments: argparse.Namespace) -> None:
    """Writes runs.csv. Raises UserError when a summary is missing, damaged or not comparable."""
    rows = collect(_read_cells(arguments.cells), arguments.results)
    write_csv(arguments.out, COLUMNS, ([row[column] for column in COLUMNS] for row in rows))


def collect(cells: Iterable[tuple[str, str]], results: Path) -> list[dict[str, Any]]:
    """A row (keys: COLUMNS) per distinct (id, request's digest); a diverged cell's losses are None.

    Raises UserError for a summary that is missing, damaged, another cell's or made by another
    request, and for two cells of one set-up that were trained by different code, in different
    precision or on different tokens.
    """
    rows = []
    first_of_setup: dict[str, tuple[str, dict[str, Any]]] = {}
    for text, request in dict.fromkeys(cells):
        try:
            cell = Cell.parse(text)
        except ValueError as error:
            raise UserError(f"{error}: list the ids of cells, one per line") from None
        path = results / text / "summary.json"
        summary = read_json(path)
        try:
            rows.append(_row(cell, summary))
            asked_for = summary["request"] == request
            other, reference = first_of_setup.setdefault(cell.setup, (text, summary))
            differing = [noun for key, noun in _SHARED.items() if summary[key] != reference[key]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not this cell's summary ({error}): delete it and run the same command again"
            ) from None
        if not asked_for:
            raise UserError(f"{path} was made under another config: delete it and run the same command again")
        if differing:
            raise UserError(
                f"cells {other} and {text} were trained with different {' and '.join(differing)}: "
                "delete the older one's folder and run the same command again"
            )
    return rows


def _read_cells(source: str) -> list[tuple[str, str]]:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read ({error}): give a text file with a cell per line") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not all(len(line) == 2 for line in lines):
        raise UserError(f"{source} must hold a cell's id and its training request's digest per line")
    return [(cell, request) for cell, request in lines]


def _row(cell: Cell, summary: dict[str, Any]) -> dict[str, Any]:
    """One row. Raises KeyError, TypeError or ValueError for a summary that cannot be this cell's."""
    axes = summary["cell"]
    trained = Cell(**axes | {"learning_rate": LearningRate(axes["learning_rate"])})
    if trained != cell or summary["id"] != cell.id:
        raise ValueError(f"it holds cell {trained.id}")
    status = summary["status"]
    if status not in STATUSES:
        raise ValueError(f"its status is {status!r}")
    rate = float(cell.learning_rate)
    return (
        vars(cell)
        | {"cell": cell.id, "learning_rate": rate, "log2_learning_rate": math.log2(rate), "status": status}
        | {name: _loss(summary, name) for name in LOSSES}
        | {name: summary[name] for name in _COPIED}
    )


def _loss(summary: dict[str, Any], name: str) -> float | None:
    value = summary[name]
    if value is not None and math.isfinite(value):
        return float(value)
    if summary["status"] == "finished":
        raise ValueError(f"its {name} is {value} although it finished")
    return None
