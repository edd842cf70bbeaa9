"""Prints the verdicts of several recorded sweeps side by side, as a table in Markdown."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from mup_moe.analysis.markup import markdown_table, markdown_text
from mup_moe.analysis.names import parametrization_title
from mup_moe.analysis.runs import read_table

_COLUMNS = {"claim": str, "says": str, "controls": str, "verdict": str}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    help_folders = "folders that contain a claims.csv, such as results/recorded/default"
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=help_folders)


def run(arguments: argparse.Namespace) -> None:
    """Prints a row per claim and a column per folder. Raises UserError for a missing or damaged table."""
    names = [folder.name for folder in arguments.folders]
    named = zip(names if len(set(names)) == len(names) else map(str, arguments.folders), arguments.folders, strict=True)
    print(side_by_side({name: folder / "claims.csv" for name, folder in named}), end="")


def side_by_side(tables: Mapping[str, Path]) -> str:
    """Returns a Markdown table of the verdicts of each sweep, noting controls that pass. Raises UserError."""
    read = {name: read_table(path, _COLUMNS).set_index("claim") for name, path in tables.items()}
    claims = dict.fromkeys(claim for table in read.values() for claim in table.index)
    rows = []
    for claim in claims:
        found = [_shown(table.loc[claim]) if claim in table.index else "--" for table in read.values()]
        rows.append([markdown_text(str(claim)), *found])
    return markdown_table(["claim", *map(markdown_text, read)], rows)


def _shown(row: Mapping[str, str]) -> str:
    passing = dict.fromkeys(name for name, fate in _fates(row["controls"].split("; ")) if fate == "passes")
    titles = " and ".join(map(parametrization_title, passing))
    blind = passing and row["verdict"] == "inconclusive"
    note = f": cannot tell, {titles} {'passes' if len(passing) == 1 else 'pass'} too" if blind else ""
    return markdown_text(f"{row['verdict']}{note}")


def _fates(controls: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, fate) for name, _, fate in (text.partition(" ") for text in controls) if name]
