"""Collects the summaries of finished cells into one table: a row per cell, in the order asked for.

It tells which cells cannot be compared with the rest, and which can but were trained elsewhere.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mup_moe.config.cell import Cell, LearningRate
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError, write_csv
from mup_moe.ops.cell_folder import DamagedResultError, Result, read_result
from mup_moe.options import read_sweep, takes
from mup_moe.sweep import one_of
from mup_moe.training.version import VERSION

add_arguments = takes("figure", "its name in the config")

STATUSES = ("finished", "diverged")
LOSSES = ("train_loss", "valid_loss")
# Columns that a summary has under the same name.
_COPIED = ("steps", "tokens", "wall_seconds", "flops", "parameters", "active_parameters", "device")
COLUMNS = (
    *("cell", "setup", "architecture", "parametrization", "width", "learning_rate", "log2_learning_rate"),
    *("granularity", "experts", "seed", "learning_rate_of", "status", *LOSSES, *_COPIED, "torch", "fingerprint"),
)
# What cells of one set-up must share, and what is said of those that do not.
SHARED = {"tokens_digest": "on other tokens", "version": "by another version", "precision": "in another precision"}
# What they may differ in, as it changes rounding only: what is said of a mixture, and of each part of it.
VARYING = {"device": ("devices", "on {}"), "torch": ("versions of torch", "with torch {}")}
_SHOWN = 3
_Table = dict[str, dict[str, Any]]  # by the cell's id


def run(arguments: argparse.Namespace) -> None:
    """Writes a figure's runs. Raises UserError when results are missing, damaged or, unless left out, foreign."""
    sweep = read_sweep(arguments)
    cells = sweep.figures[one_of(arguments.figure, sweep.config.figures, "figures")]
    rows = run_rows(
        ((cell.id, sweep.request(cell).digest) for cell in cells),
        sweep.cells,
        # They need not be there: cells that were brought home without them are none the worse.
        sweep.tokens(sweep.corpus(cells[0])),
        leave_out=sweep.config.analysis.foreign_cells == "leave_out",
    )
    write_csv(sweep.runs(arguments.figure), COLUMNS, ([row[column] for column in COLUMNS] for row in rows))


def run_rows(
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


def foreign_cells(
    requests: Mapping[str, str], summaries: Mapping[str, Mapping[str, Any]], tokens: Path | None
) -> dict[str, str]:
    """Which cells do not belong in one table with the rest: id -> why.

    requests: id -> the training request's digest by the config. summaries: id -> summary. tokens: the
    folder of the corpus by the config, if that is known.

    A cell of another request is foreign. Of the rest, those of one set-up must agree in tokens, version
    and precision. Where they do not, one group that agrees is at home and the others are foreign: the
    group on the tokens in that folder if there is one, then the one by this version, then the
    largest, then the first named. So nothing is foreign in a set that is alike throughout, whatever
    version made it; and what is deleted and trained anew joins the group at home, if it has its precision.
    """
    reasons = {}
    of_setup: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for name, summary in summaries.items():
        if summary["request"] != requests[name]:
            reasons[name] = "made under another config"
        else:
            groups = of_setup.setdefault(summary["cell"]["setup"], {})
            groups.setdefault(tuple(str(summary[key]) for key in SHARED), []).append(name)
    for groups in of_setup.values():
        home = _home(groups, tokens) if len(groups) > 1 else next(iter(groups))
        for group, names in groups.items():
            how = [told for told, ours, homes in zip(SHARED.values(), group, home, strict=True) if ours != homes]
            if how:
                reasons |= dict.fromkeys(names, f"trained {' and '.join(how)}")
    return {name: reasons[name] for name in summaries if name in reasons}


def mixtures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each set-up whose cells differ in what `VARYING` names.

    rows: as of runs.csv.
    """
    of_setup: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_setup.setdefault(row["setup"], []).append(row)
    sentences = []
    for setup, alike in of_setup.items():
        differing = [key for key in VARYING if len({row[key] for row in alike}) > 1]
        if differing:
            several = " and ".join(f"several {VARYING[key][0]}" for key in differing)
            how = {row["cell"]: " ".join(VARYING[key][1].format(row[key]) for key in differing) for row in alike}
            sentences.append(f"cells of {setup} were trained on {several}: {told_by_reason(how)}")
    return sentences


def told_by_reason(reasons: Mapping[str, str]) -> str:
    """Cells by what is said of each, as a part of a sentence."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{len(names)} {reason} ({shortened(names)})" for reason, names in by_reason.items())


def shortened(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _home(groups: Mapping[tuple[str, ...], list[str]], tokens: Path | None) -> tuple[str, ...]:
    today = _digest_of(tokens)
    return max(groups, key=lambda group: (group[0] == today, group[1] == str(VERSION), len(groups[group])))


def _digest_of(tokens: Path | None) -> str | None:
    """The digest of the tokens in a folder; None where there are none to train on."""
    try:
        return Tokens.open(tokens).digest if tokens is not None else None
    except UserError:
        return None
