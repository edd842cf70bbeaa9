"""Brings home the cells that run-jobs packed: python -m mup_moe import-cells ARCHIVE ...

Afterwards Snakemake finds them as if it had trained them.
"""

import argparse
from pathlib import Path

from mup_moe.files import claim_folder
from mup_moe.ops.cell_folder import HISTORY, SUMMARY, Result
from mup_moe.ops.offsite.archive import read_archive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import-cells`."""
    parser.add_argument("archives", type=Path, nargs="+", help="the archives of run-jobs")
    parser.add_argument("--results", type=Path, default=Path("results"))


def run(arguments: argparse.Namespace) -> None:
    """Writes every whole cell of the archives. Raises UserError for an archive that holds anything else."""
    new = known = 0
    for path in arguments.archives:
        for cell, files in read_archive(path):
            folder = arguments.results / "cells" / cell.id
            with claim_folder(folder):
                adopted = Result(folder).adopt(files[HISTORY], files[SUMMARY])
            new, known = new + adopted, known + (not adopted)
    print(f"{new} cells are new in {arguments.results / 'cells'}, {known} were there: run snakemake for their figures")
