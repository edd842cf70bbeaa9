"""Collects the summaries of finished cells into one table: a row per cell, in the order asked for."""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mup_moe.analysis.foreign import SHARED, foreign_cells, mixtures, shortened, told_by_reason
from mup_moe.config.cell import Cell, LearningRate
from mup_moe.config.options import add_config_arguments, read_sweep
from mup_moe.files import UserError, write_csv
from mup_moe.ops.cell_folder import DamagedResultError, Result, read_result
from mup_moe.sweep import one_of

# Columns that a summary has under the same name.
_COPIED = (
    "steps",
    "tokens",
    "wall_seconds",
    "flops",
    "parameters",
    "active_parameters",
    "device",
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
    "torch",
    "fingerprint",
)
STATUSES = ("finished", "diverged")
LOSSES = ("train_loss", "valid_loss")
_Table = dict[str, dict[str, Any]]  # by the cell's id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aggregate`."""
    parser.add_argument("figure", help="its name in the config")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes a figure's runs. Raises UserError when results are missing, damaged or, unless left out, foreign."""
    sweep = read_sweep(arguments)
    cells = sweep.figures[one_of(arguments.figure, sweep.config.figures, "figures")]
    rows = collect(
        ((cell.id, sweep.request(cell).digest) for cell in cells),
        sweep.cells,
        # They need not be there: cells that were brought home without them are none the worse.
        sweep.tokens(sweep.corpus(cells[0])),
        leave_out=sweep.config.analysis.foreign_cells == "leave_out",
    )
    write_csv(sweep.runs(arguments.figure), COLUMNS, ([row[column] for column in COLUMNS] for row in rows))


def collect(
    cells: Iterable[tuple[str, str]], results: Path, tokens: Path | None = None, leave_out: bool = False
) -> list[dict[str, Any]]:
    """A row (keys: COLUMNS) per distinct id of (id, request's digest); a diverged cell's losses are None.

    A result that is damaged is restored from its kept copy, which is said on stderr. So are the cells
    that `foreign_cells` names, with `leave_out`: they get no row. So are the devices and versions of torch,
    where the rows of a set-up have several. Raises UserError, naming the cells, for results that are
    missing, damaged beyond that, or foreign.
    """
    requests = dict(cells)
    rows, summaries = _read_results(requests, results)
    foreign = foreign_cells(requests, summaries, tokens)
    if foreign and not leave_out:
        raise UserError(
            f"cells that cannot be compared with the rest: {told_by_reason(foreign)}: delete their folders in"
            f" {results} and run the same command again (for one precision, on a machine like that of the rest),"
            " or set `analysis.foreign_cells` to leave_out"
        )
    for name, reason in foreign.items():
        print(f"left out {name}: {reason}", file=sys.stderr)
    kept = [row for name, row in rows.items() if name not in foreign]
    for sentence in mixtures(kept):
        print(sentence, file=sys.stderr)
    return kept


def _read_results(requests: Mapping[str, str], results: Path) -> tuple[_Table, _Table]:
    """The row and the summary of every cell. Raises UserError for what is missing or damaged."""
    rows, summaries, damaged = {}, {}, {}
    for name, request in requests.items():
        try:
            cell = Cell.parse(name)
        except ValueError as error:
            raise UserError(f"{error}: list the ids of cells, one per line") from None
        try:
            summary = _read_result(results / name, request)
            rows[name] = _row(cell, summary)
            summaries[name] = {key: summary.get(key) for key in ("cell", "request", *SHARED)}
        except DamagedResultError as error:
            damaged[name] = error.reason
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            damaged[name] = f"summary.json is not this cell's: {error}"
    if damaged:
        reason = next(iter(damaged.values()))
        raise UserError(
            f"{results} has {len(damaged)} of {len(requests)} results damaged: {shortened(list(damaged))} ({reason}):"
            " delete their folders and run the same command again"
        )
    return rows, summaries


def _read_result(folder: Path, request: str) -> dict[str, Any]:
    """A cell's summary, by way of its kept copy where that has to be. Raises DamagedResultError."""
    try:
        return read_result(folder)
    except DamagedResultError as error:
        if not Result(folder).mend(request):
            raise
        print(f"{folder} was damaged ({error.reason}): restored from its kept copy", file=sys.stderr)
        return read_result(folder)


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
        | {"torch": summary["versions"]["torch"], "fingerprint": summary["fingerprint"]}
    )


def _loss(summary: dict[str, Any], name: str) -> float | None:
    value = summary[name]
    if value is not None and math.isfinite(value):
        return float(value)
    if summary["status"] == "finished":
        raise ValueError(f"its {name} is {value} although it finished")
    return None
