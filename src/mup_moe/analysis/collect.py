"""Concatenates the tables of all figures: python -m mup_moe collect runs. Does not need pandas."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from mup_moe.analysis.pages import write_rows_page
from mup_moe.files import UserError, cannot_be_read, write_csv
from mup_moe.options import add_config_arguments, read_sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `collect`."""
    parser.add_argument("table", choices=["runs", "optima"], help="which table of each figure to collect")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the rows of all figures' tables to one table. Raises UserError."""
    sweep = read_sweep(arguments)
    of_figure = sweep.runs if arguments.table == "runs" else sweep.optima
    join_tables([of_figure(name) for name in sweep.config.figures], sweep.results / f"{arguments.table}.csv")


def join_tables(tables: Sequence[Path], out: Path) -> None:
    """Writes the distinct rows of the tables that exist, in order, and optima as a page too; nothing if none exists.

    If figures share a cell, the row of the newest table counts. Raises UserError if columns differ or a table is empty.
    """
    header: list[str] = []
    newest: dict[tuple[str, ...], tuple[int, list[str]]] = {}
    for path in filter(Path.exists, tables):
        columns, *lines = _read_lines(path) or [[]]
        if not columns:
            raise UserError(f"{path} is empty: delete it and run the same command again")
        if header and columns != header:
            raise UserError(
                f"{path} has different columns from another figure's table, probably from another version: delete it"
                " and run the same command again"
            )
        header = columns
        stamp = path.stat().st_mtime_ns
        for line in lines:
            key = tuple(line[:1]) if header[0] == "cell" else tuple(line)
            if key not in newest or newest[key][0] < stamp:
                newest[key] = stamp, line
    if header:
        rows = [line for _, line in newest.values()]
        write_csv(out, header, rows)
        if out.stem == "optima":
            write_rows_page(out.with_suffix(".html"), header, rows)


def join_finished_tables(results: Path, figures: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Writes runs.csv and optima.csv with every figure finished so far, if its table matches its current cells.

    figures: figure -> the fingerprints of its cells, as for `is_of`. Returns a sentence for each problem.
    """
    problems = []
    finished: dict[str, list[Path]] = {"runs.csv": [], "optima.csv": []}
    for figure, fingerprints in figures.items():
        runs, optima = (results / figure / table for table in finished)
        try:
            if is_of(runs, fingerprints):
                finished[runs.name].append(runs)
                # Older optima belong to other runs.
                if optima.exists() and optima.stat().st_mtime >= runs.stat().st_mtime:
                    finished[optima.name].append(optima)
        except UserError as error:
            problems.append(f"{results / 'runs.csv'} lacks {figure}: {error}")
    for table, paths in finished.items():
        try:
            join_tables(paths, results / table)
        except UserError as error:
            problems.append(f"{results / table} is not updated: {error}")
    return problems


def is_of(runs: Path, fingerprints: Mapping[str, str]) -> bool:
    """Whether a figure's runs.csv exists and all its rows belong to these cells with these fingerprints.

    fingerprints: cell id -> fingerprint; "" matches any. Raises UserError if the table cannot be read.
    """
    if not runs.exists():
        return False
    columns, *lines = _read_lines(runs) or [[]]
    rows = [dict(zip(columns, line, strict=False)) for line in lines]
    return bool(rows) and all(fingerprints.get(row.get("cell", "")) in ("", row.get("fingerprint", "")) for row in rows)


def _read_lines(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the same command again") from None
