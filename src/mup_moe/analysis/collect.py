"""Puts the tables of several figures under each other: python -m mup_moe collect.

Standard library only, so that a Snakefile can import it.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from mup_moe.files import UserError, write_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `collect`."""
    parser.add_argument("tables", type=Path, nargs="+", help="CSVs with the same columns")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")


def run(arguments: argparse.Namespace) -> None:
    """Writes the rows of all tables."""
    collect_tables(arguments.tables, arguments.out)


def collect_tables(tables: Sequence[Path], out: Path) -> None:
    """Writes the distinct rows of the tables that exist, in order; nothing where none does.

    Of a cell that figures share, the row of the newest table counts. Raises UserError where columns
    differ.
    """
    header: list[str] = []
    newest: dict[tuple[str, ...], tuple[int, list[str]]] = {}
    for path in filter(Path.exists, tables):
        with path.open(encoding="utf-8", newline="") as file:
            columns, *lines = csv.reader(file)
        if header and columns != header:
            raise UserError(f"{path} has other columns than {tables[0]}: delete both and run the same command again")
        header = columns
        stamp = path.stat().st_mtime_ns
        for line in lines:
            key = tuple(line[:1]) if header[0] == "cell" else tuple(line)
            if key not in newest or newest[key][0] < stamp:
                newest[key] = stamp, line
    if header:
        write_csv(out, header, [line for _, line in newest.values()])
