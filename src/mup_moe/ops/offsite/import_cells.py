"""Imports the cells that run-jobs packed: python -m mup_moe import-cells ARCHIVE ...

Afterwards, Snakemake treats them as if it had trained them.
"""

import argparse
from pathlib import Path

from mup_moe.files import claim_folder
from mup_moe.ops.cell_folder import HISTORY, SUMMARY, Result
from mup_moe.ops.offsite.archive import read_archive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `import-cells`."""
    parser.add_argument("archives", type=Path, nargs="+", help="the archives that run-jobs wrote")
    parser.add_argument("--results", type=Path, default=Path("results"))


def run(arguments: argparse.Namespace) -> None:
    """Imports every cell of the archives. Raises UserError for an archive with anything but whole cells."""
    new = known = 0
    for path in arguments.archives:
        for cell, files in read_archive(path):
            folder = arguments.results / "cells" / cell.id
            with claim_folder(folder):
                adopted = Result(folder).adopt(files[HISTORY], files[SUMMARY])
            new, known = new + adopted, known + (not adopted)
    print(f"{new} new cells in {arguments.results / 'cells'}, {known} already there: run snakemake for their figures")
