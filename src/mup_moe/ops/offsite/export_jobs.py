"""Lists the unfinished jobs of some figures: python -m mup_moe export-jobs.

Run it on the home machine, where the config is. The other machine needs only the list and the token folders that
it names.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from mup_moe.data.tokens import MANIFEST, Tokens
from mup_moe.files import UserError
from mup_moe.ops.offsite.job_list import ListedJob, write_jobs
from mup_moe.options import add_sweep_arguments, read_layers
from mup_moe.sweep import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `export-jobs`."""
    add_sweep_arguments(parser, figures="figures or compositions, in the order in which to train them")
    parser.add_argument("--out", type=Path, required=True, help="the list to write, a .jsonl file")


def run(arguments: argparse.Namespace) -> None:
    """Writes the list and prints what to copy to the other machine. Raises UserError."""
    sweep = Sweep(read_layers(arguments).config, arguments.results)
    listed = list(open_jobs(sweep, arguments.figures))
    write_jobs(arguments.out, listed)
    if not listed:
        print(f"all cells of {', '.join(arguments.figures)} are done: {arguments.out} lists no jobs")
        return
    cells = sum(len(job.requests) for job in listed)
    travels = [arguments.out, *map(sweep.tokens, dict.fromkeys(job.corpus for job in listed))]
    named = " and ".join(f"{path} ({_bytes_of(path) / 1e6:.1f} MB)" for path in travels)
    print(f"{cells} cells in {len(listed)} jobs: copy {named} to the other machine")


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def open_jobs(sweep: Sweep, figures: Sequence[str]) -> Iterator[ListedJob]:
    """Yields the jobs of figures or compositions, in that order, without the cells that have a result."""
    shown = sweep.chosen(figures)
    # Assign each cell to the first figure that shows it; the cells that share its job are listed anyway.
    first = {cell: figure for figure in reversed(shown) for cell in shown[figure]}
    cells_of = {figure: [cell for cell in cells if first[cell] == figure] for figure, cells in shown.items()}
    for name, cells in sweep.jobs_of(cells_of).items():
        corpus, requests = sweep.corpus(cells[0]), tuple(map(sweep.request, cells))
        job = ListedJob(name, first[cells[0]], corpus, _tokens_digest(sweep.tokens(corpus)), requests)
        if (left := job.left(sweep.results)).requests:
            yield left


@cache
def _tokens_digest(folder: Path) -> str:
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder / MANIFEST} does not exist: create it by running snakemake with the same preset")
    return Tokens.open(folder).digest
