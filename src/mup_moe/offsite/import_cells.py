"""Brings home the cells that run-jobs packed: python -m mup_moe import-cells ARCHIVE ...

Afterwards Snakemake finds them as if it had trained them.
"""

import argparse
import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from mup_moe.config.cell import Cell
from mup_moe.files import UserError, claim_folder
from mup_moe.training.result import HISTORY, SUMMARY, Result

# More than any history of 100,000 steps; a damaged archive must not fill the disk.
_MOST_BYTES = 64 * 2**20


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


def read_archive(path: Path) -> Iterator[tuple[Cell, dict[str, bytes]]]:
    """Each cell of an archive with its two files. Raises UserError."""
    found: dict[str, dict[str, bytes]] = {}
    try:
        # The whole of it first: only at its end does gzip say whether a byte has changed.
        with gzip.open(path) as packed:
            content = packed.read()
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                cell, _, name = member.name.partition("/")
                Cell.parse(cell)
                if not member.isfile() or name not in (HISTORY, SUMMARY) or member.size > _MOST_BYTES:
                    raise ValueError(f"{member.name!r} is no part of a cell")
                file = tar.extractfile(member)
                assert file is not None, "a regular file"
                found.setdefault(cell, {})[name] = file.read()
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path} is not an archive of cells ({error}): pack and copy it again") from None
    for cell, files in found.items():
        if set(files) != {HISTORY, SUMMARY}:
            raise UserError(f"{path} has only a part of {cell}: pack and copy it again")
        yield Cell.parse(cell), files
