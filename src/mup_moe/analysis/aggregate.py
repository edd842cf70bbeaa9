"""Collects the summaries of finished cells into one table: a row per cell, in the requested order.

Reports which cells cannot be compared with the rest, and which can although they were trained elsewhere.
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
# Columns with the same name in a summary.
_COPIED = ("steps", "tokens", "wall_seconds", "flops", "parameters", "active_parameters", "device")
COLUMNS = (
    *("cell", "setup", "architecture", "parametrization", "width", "learning_rate", "log2_learning_rate"),
    *("granularity", "experts", "seed", "learning_rate_of", "status", *LOSSES, *_COPIED, "torch", "fingerprint"),
)
# What cells of one set-up must share, and how cells that differ are described.
SHARED = {"tokens_digest": "on other tokens", "version": "by another version", "precision": "in another precision"}
# What they may differ in, since it only changes rounding, and how a mixture and each of its parts are described.
VARYING = {"device": ("devices", "on {}"), "torch": ("versions of torch", "with torch {}")}
_SHOWN = 3
_Table = dict[str, dict[str, Any]]  # by the cell's id


def run(arguments: argparse.Namespace) -> None:
    """Writes a figure's runs. Raises UserError if results are missing, damaged, or foreign and not left out."""
    sweep = read_sweep(arguments)
    cells = sweep.figures[one_of(arguments.figure, sweep.config.figures, "figures")]
    rows = run_rows(
        ((cell.id, sweep.request(cell).digest) for cell in cells),
        sweep.cells,
        # The tokens may be absent, since cells can be copied back without them.
        sweep.tokens(sweep.corpus(cells[0])),
        leave_out=sweep.config.analysis.foreign_cells == "leave_out",
    )
    write_csv(sweep.runs(arguments.figure), COLUMNS, ([row[column] for column in COLUMNS] for row in rows))


def run_rows(
    cells: Iterable[tuple[str, str]], results: Path, tokens: Path | None = None, leave_out: bool = False
) -> list[dict[str, Any]]:
    """Returns a row (keys: COLUMNS) per distinct id of (id, request's digest); a diverged cell's losses are None.

    Restores a damaged result from its kept copy. With `leave_out`, the cells that `foreign_cells` names get no row.
    Reports both on stderr, as well as a mixture of devices or torch versions within a set-up. Raises UserError, naming
    the cells, for results that are missing, damaged beyond repair, or foreign and not left out.
    """
    requests = dict(cells)
    rows, summaries = _read_results(requests, results)
    foreign = foreign_cells(requests, summaries, tokens)
    if foreign and not leave_out:
        raise UserError(
            f"some cells cannot be compared with the rest: {by_reason(foreign)}: delete their folders in {results} and"
            " run the same command again (if the precision differs, on a machine like that of the rest), or set"
            " `analysis.foreign_cells` to leave_out"
        )
    for name, reason in foreign.items():
        print(f"left out {name}: {reason}", file=sys.stderr)
    kept = [row for name, row in rows.items() if name not in foreign]
    for sentence in mixtures(kept):
        print(sentence, file=sys.stderr)
    return kept


def _read_results(requests: Mapping[str, str], results: Path) -> tuple[_Table, _Table]:
    """Returns the row and the summary of every cell. Raises UserError for missing or damaged results."""
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
            damaged[name] = f"summary.json does not belong to this cell: {error}"
    if damaged:
        reason = next(iter(damaged.values()))
        raise UserError(
            f"{len(damaged)} of {len(requests)} results in {results} are damaged: {shortened(list(damaged))} ({reason})"
            ": delete their folders and run the same command again"
        )
    return rows, summaries


def _read_result(folder: Path, request: str) -> dict[str, Any]:
    """Reads a cell's summary, restoring it from the kept copy if necessary. Raises DamagedResultError."""
    try:
        return read_result(folder)
    except DamagedResultError as error:
        if not Result(folder).restore(request):
            raise
        print(f"{folder} was damaged ({error.reason}): restored from its kept copy", file=sys.stderr)
        return read_result(folder)


def _row(cell: Cell, summary: dict[str, Any]) -> dict[str, Any]:
    """Returns one row. Raises KeyError, TypeError or ValueError for a summary that cannot belong to this cell."""
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
    """Finds the cells that do not belong in one table with the rest: id -> reason.

    requests: id -> the digest of the training request that the config asks for. summaries: id -> summary. tokens: the
    folder of the config's corpus, if known.

    A cell made for another request is foreign. The other cells of a set-up must agree in tokens, version and precision.
    If they do not, one group that agrees is kept and the other groups are foreign. The kept group is the one trained on
    the tokens in that folder; ties go to the group of this version, then to the largest, then to the first named. A set
    that agrees throughout therefore has no foreign cells, whatever version made it, and a cell that is deleted and
    retrained joins the kept group if it has the same precision.
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
            how = [text for text, ours, kept in zip(SHARED.values(), group, home, strict=True) if ours != kept]
            if how:
                reasons |= dict.fromkeys(names, f"trained {' and '.join(how)}")
    return {name: reasons[name] for name in summaries if name in reasons}


def mixtures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each set-up with cells that differ in a property of `VARYING`.

    rows: rows of runs.csv.
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
            sentences.append(f"cells of {setup} were trained on {several}: {by_reason(how)}")
    return sentences


def by_reason(reasons: Mapping[str, str]) -> str:
    """Groups cells by reason, as part of a sentence."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return "; ".join(f"{len(names)} {reason} ({shortened(names)})" for reason, names in grouped.items())


def shortened(names: Sequence[str]) -> str:
    """Returns the first few names, and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _home(groups: Mapping[tuple[str, ...], list[str]], tokens: Path | None) -> tuple[str, ...]:
    today = _digest_of(tokens)
    return max(groups, key=lambda group: (group[0] == today, group[1] == str(VERSION), len(groups[group])))


def _digest_of(tokens: Path | None) -> str | None:
    """Returns the digest of the tokens in a folder; None if it has no usable tokens."""
    try:
        return Tokens.open(tokens).digest if tokens is not None else None
    except UserError:
        return None
