"""Trains cells, with cells of one shape in lockstep: python -m mup_moe train."""

import argparse
import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mup_moe.config.jobs import even_parts
from mup_moe.config.settings import STEPS
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError, claim_folder, explain_disk_error
from mup_moe.ops import heartbeat
from mup_moe.ops.cell_folder import CellFiles
from mup_moe.ops.device import (
    claim_device,
    explain_lost_device,
    explain_out_of_memory,
    keep_compiled_code_apart,
    keep_freed_pages,
    type_of,
)
from mup_moe.ops.job import Job, stacks_of_shapes
from mup_moe.ops.offsite.job_list import chosen_jobs, read_jobs
from mup_moe.options import add_config_arguments, read_sweep
from mup_moe.training.request import TrainingRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    help_names = "ids of cells of one corpus; with --requests, names of jobs in the list (default: all of them)"
    parser.add_argument("names", nargs="*", metavar="CELL", help=help_names)
    add_config_arguments(parser)
    help_requests = "train jobs from a list that export-jobs wrote; needs no config, YAML or pydantic"
    parser.add_argument("--requests", type=Path, metavar="FILE", help=help_requests)
    how = parser.add_argument_group("how to train (default: `execution` of the config)")
    how.add_argument("--device", choices=["auto", "cpu", "cuda"])
    how.add_argument("--replicas", metavar="N", help="number of cells trained at once, or auto")
    how.add_argument("--step", choices=["auto", *STEPS])
    how.add_argument("--threads", type=int, metavar="N")
    help_checkpoints = "seconds between checkpoints; inf: write none, not even when stopped"
    how.add_argument("--checkpoint-seconds", type=float, metavar="S", help=help_checkpoints)
    how.add_argument("--hang-seconds", type=float, metavar="S", help="seconds without a step after which it exits")
    help_compile = "only fill the compiler's cache for these cells, while another job may use the GPU"
    how.add_argument("--compile-only", action="store_true", help=help_compile)


# Defaults for --requests, which reads no config.
_HOW = {"device": "auto", "replicas": "auto", "step": "auto", "threads": 1}
_HOW |= {"checkpoint_seconds": 60.0, "hang_seconds": 1800.0}


def run(arguments: argparse.Namespace) -> int:
    """Trains the cells to the end. Each resumes from its checkpoint or reuses its result if it is from the same run."""
    requests, folder, how = _asked(arguments)
    for name, value in how.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    options = {name: getattr(arguments, name) for name in ("step", "replicas", "checkpoint_seconds", "hang_seconds")}
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()
    keep_compiled_code_apart()
    out: Path = arguments.results / "cells"
    if arguments.compile_only:
        cells, tokens = _open(requests, folder, out)
        with claim_device(arguments.device, shared=True) as device:
            Job(cells=cells, unfinished=[], tokens=tokens, device=device, **options).compile()
        return 0
    with _keeping_reasons([out / request.cell.id for request in requests]) as unfinished:
        cells, tokens = _open(requests, folder, out)
        for part in _parts(arguments, cells, tokens):
            with contextlib.ExitStack() as held:
                # Lock in a fixed order, so that two processes never wait for each other.
                for folder in sorted(cell.folder for cell in part):
                    held.enter_context(claim_folder(folder))
                for cell in part:
                    if cell.publish():
                        unfinished.remove(cell.folder)
                left = [cell for cell in part if cell.folder in unfinished]
                if left:
                    device = held.enter_context(claim_device(arguments.device))
                    Job(cells=cells, unfinished=unfinished, tokens=tokens, device=device, **options).run(left)
    return 0


def _asked(arguments: argparse.Namespace) -> tuple[list[TrainingRequest], Path, Mapping[str, Any]]:
    """Returns the cells to train, the folder of their tokens, and default options. Raises UserError."""
    if arguments.requests is not None:
        jobs = chosen_jobs(read_jobs(arguments.requests), arguments.names)
        requests, corpora = [request for job in jobs for request in job.requests], {job.corpus for job in jobs}
        tokens, how = {corpus: arguments.results / "data" / corpus for corpus in corpora}, _HOW
    else:
        sweep = read_sweep(arguments)
        requests, corpora = [sweep.request(name) for name in arguments.names], set(map(sweep.corpus, arguments.names))
        tokens, execution = {corpus: sweep.tokens(corpus) for corpus in corpora}, sweep.config.execution
        how = {name: getattr(execution, name) for name in _HOW} | {"replicas": str(execution.replicas)}
    if len(corpora) != 1:
        problem = f"the cells are of several corpora ({', '.join(sorted(corpora))})" if corpora else "no cell is named"
        raise UserError(f"{problem}: give the ids of cells of one corpus")
    return requests, tokens[corpora.pop()], how


def _parts(arguments: argparse.Namespace, cells: Sequence[CellFiles], tokens: Tokens) -> Sequence[Sequence[CellFiles]]:
    """Splits the cells into parts that a process can lock at once: one part, unless the open-file limit is low."""
    most = _most_locks(len(cells))
    if len(cells) <= most:
        return [cells]
    print(f"{len(cells)} cells exceed the limit of open files: training {most} at a time", file=sys.stderr)
    shapes = stacks_of_shapes(cells, tokens, type_of(arguments.device), arguments.replicas)
    parts: list[list[CellFiles]] = [[]]
    # Keep stacks whole where they fit, so that cells are trained together as without the limit.
    for stack in chain.from_iterable(shapes):
        for piece in even_parts(stack, most):
            if len(parts[-1]) + len(piece) > most:
                parts.append([])
            parts[-1] += piece
    return parts


def _most_locks(wanted: int) -> int:
    """Returns how many of the `wanted` locks this process can hold, at least one; each is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted  # the other half is for libraries, drivers and files being written
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    # macOS has further limits besides the hard one.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    return max(1, min(wanted, soft // 2))


def _open(requests: Sequence[TrainingRequest], folder: Path, out: Path) -> tuple[list[CellFiles], Tokens]:
    tokens = Tokens.open(folder, verify=True)
    return [CellFiles(request, tokens.digest, out) for request in requests], tokens


@contextlib.contextmanager
def _keeping_reasons(folders: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields the folders, from which the block removes finished ones; an error is recorded in those that are left."""
    unfinished = list(folders)
    try:
        yield unfinished
    except Exception as error:
        known = str(error) if isinstance(error, UserError) else explain_out_of_memory(error)
        known = known or explain_lost_device(error) or explain_disk_error(error)
        heartbeat.keep_reason(unfinished, known or f"{type(error).__name__}: {error}")
        if known is None or isinstance(error, UserError):
            raise
        raise UserError(known) from None
