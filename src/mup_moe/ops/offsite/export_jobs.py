"""Lists the jobs of some figures that are not done yet: python -m mup_moe export-jobs.

To be run at home, where the config is; the list and the folders of tokens that it names are all that
another machine needs.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

from mup_moe.config.cell import Cell
from mup_moe.config.jobs import jobs
from mup_moe.config.options import add_sweep_arguments, cells_of_figures, read_layers
from mup_moe.config.settings import Config
from mup_moe.data.tokens import MANIFEST, Tokens
from mup_moe.files import UserError
from mup_moe.ops.offsite.job_list import Job, write_jobs
from mup_moe.training.request import requests_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `export-jobs`."""
    add_sweep_arguments(parser, figures="in the order in which to train")
    parser.add_argument("--out", type=Path, required=True, help="the list, a .jsonl file")


def run(arguments: argparse.Namespace) -> None:
    """Writes the list and says what to take along. Raises UserError."""
    config = read_layers(arguments).config
    listed = list(open_jobs(config, arguments.figures, arguments.results))
    corpora = dict.fromkeys(job.corpus for job in listed)
    write_jobs(arguments.out, listed)
    cells = sum(len(job.requests) for job in listed)
    travels = [arguments.out, *(arguments.results / "data" / corpus for corpus in corpora)]
    named = " and ".join(f"{path} ({_bytes_of(path) / 1e6:.1f} MB)" for path in travels)
    print(f"{cells} cells in {len(listed)} jobs: take along {named}")


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def open_jobs(config: Config, figures: list[str], results: Path) -> Iterator[Job]:
    """The jobs of figures or compositions, in their order, without the cells that `results` has."""
    cells_of: dict[str, list[Cell]] = {}
    for figure, shown in cells_of_figures(config, figures).items():
        # A cell belongs to the first figure that shows it: whatever it shares a job with comes along anyway.
        before = {cell for cells in cells_of.values() for cell in cells}
        cells_of[figure] = [cell for cell in shown if cell not in before]
    request_of = {request.cell: request for request in requests_of(config, chain.from_iterable(cells_of.values()))}
    for name, cells in jobs(cells_of, config.execution.lockstep, config.execution.cells_per_job).items():
        corpus = config.setups[cells[0].setup].corpus
        requests = tuple(request_of[cell] for cell in cells)
        figure = next(figure for figure, shown in cells_of.items() if cells[0] in shown)
        job = Job(name, figure, corpus, _tokens_digest(results / "data" / corpus), requests)
        left = tuple(request for request in requests if not job.is_done(request, results))
        if left:
            yield replace(job, requests=left)


@cache
def _tokens_digest(folder: Path) -> str:
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder / MANIFEST} does not exist: make it first, by snakemake and the same preset")
    return Tokens.open(folder).digest
