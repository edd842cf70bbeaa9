"""Trains cells, those of one shape in lockstep: python -m mup_moe train."""

import argparse
import contextlib
import resource
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

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
from mup_moe.training.request import TrainingRequest, read_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    help_request = "a training request as JSON, whose `cell` may be a list; - reads stdin, which has one a line"
    parser.add_argument("--request", required=True, action="append", dest="requests", help=help_request)
    parser.add_argument("--tokens", required=True, type=Path, help="folder of a tokenized corpus")
    parser.add_argument("--out", required=True, type=Path, help="the folder that has a folder for each cell")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--replicas", default="auto", help="cells trained at once, or auto")
    parser.add_argument("--step", default="auto", choices=["auto", *STEPS])
    parser.add_argument("--threads", default=1, type=int)
    help_checkpoints = "between checkpoints; inf: none, not even when it is stopped"
    parser.add_argument("--checkpoint-seconds", default=60.0, type=float, help=help_checkpoints)
    parser.add_argument("--hang-seconds", default=1800.0, type=float, help="without a step, after which it ends")
    help_compile = "fill the compiler's cache for these cells, beside another job, and train none"
    parser.add_argument("--compile-only", action="store_true", help=help_compile)


def run(arguments: argparse.Namespace) -> int:
    """Trains to the end, each cell from its own checkpoint or result if that belongs to this very run."""
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()
    keep_compiled_code_apart()
    asked = sys.stdin if arguments.requests == ["-"] else arguments.requests
    requests = read_lines(asked)
    if arguments.compile_only:
        cells, tokens = _open(arguments, requests)
        with claim_device(arguments.device, beside=True) as device:
            _job(arguments, cells, [], tokens, device).compile()
        return 0
    with _keeping_reasons([arguments.out / request.cell.id for request in requests]) as unfinished:
        cells, tokens = _open(arguments, requests)
        for part in _parts(arguments, cells, tokens):
            with contextlib.ExitStack() as held:
                # In one order for everybody: two processes must not wait for each other.
                for folder in sorted(cell.folder for cell in part):
                    held.enter_context(claim_folder(folder))
                for cell in part:
                    if cell.publish():
                        unfinished.remove(cell.folder)
                left = [cell for cell in part if cell.folder in unfinished]
                if left:
                    device = held.enter_context(claim_device(arguments.device))
                    _job(arguments, cells, unfinished, tokens, device).run(left)
    return 0


def _parts(arguments: argparse.Namespace, cells: Sequence[CellFiles], tokens: Tokens) -> Sequence[Sequence[CellFiles]]:
    """The cells in parts that a process may hold at once: one, but for a low limit of open files."""
    most = _most_locks(len(cells))
    if len(cells) <= most:
        return [cells]
    print(f"{len(cells)} cells are more than the open files that are allowed: {most} at a time", file=sys.stderr)
    shapes = stacks_of_shapes(cells, tokens, type_of(arguments.device), arguments.replicas)
    parts: list[list[CellFiles]] = [[]]
    # Whole stacks as far as they fit, so that cells are trained together as without the limit.
    for stack in chain.from_iterable(shapes):
        for piece in even_parts(stack, most):
            if len(parts[-1]) + len(piece) > most:
                parts.append([])
            parts[-1] += piece
    return parts


def _most_locks(wanted: int) -> int:
    """How many of so many locks, an open file each, this process may hold: one at least.

    Half of the files that it may have open are for libraries, drivers and what is being written. The soft
    limit is raised to what that takes, as far as the hard one permits.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    # macOS has limits beside the hard one.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    return max(1, min(wanted, soft // 2))


def _open(arguments: argparse.Namespace, requests: Sequence[TrainingRequest]) -> tuple[list[CellFiles], Tokens]:
    tokens = Tokens.open(arguments.tokens, verify=True)
    return [CellFiles(request, tokens.digest, arguments.out) for request in requests], tokens


def _job(
    arguments: argparse.Namespace,
    cells: Sequence[CellFiles],
    unfinished: list[Path],
    tokens: Tokens,
    device: torch.device,
) -> Job:
    options = {name: getattr(arguments, name) for name in ("step", "replicas", "checkpoint_seconds", "hang_seconds")}
    return Job(cells=cells, unfinished=unfinished, tokens=tokens, device=device, **options)


@contextlib.contextmanager
def _keeping_reasons(folders: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields the folders, for the block to remove from; those left have the error that ends it as their reason."""
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
