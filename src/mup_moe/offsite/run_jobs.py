"""Trains the jobs of a list, one after the other, as far as the time goes: python -m mup_moe run-jobs.

To be run where neither Snakemake nor the config is. What is done is packed into archives of whole
cells; what is not goes on from its checkpoints when the same command runs again.
"""

import argparse
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mup_moe.files import atomic_write, make_folder
from mup_moe.offsite.job_list import Job, read_jobs
from mup_moe.training.code import code_digest
from mup_moe.training.request import TrainingRequest
from mup_moe.training.result import Result

# What a job may take to write its checkpoints once it is asked to stop.
_GRACE_SECONDS = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `run-jobs`."""
    parser.add_argument("--jobs", type=Path, required=True, help="the list that export-jobs wrote")
    parser.add_argument("--results", type=Path, default=Path("results"), help="has data/; gets cells/ and logs/")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which the rest is left")
    parser.add_argument("--archive", type=Path, help="folder for cells-000.tar.gz, ... with all that is done")
    parser.add_argument("--archive-bytes", type=int, default=15_000_000, help="of one archive, about")
    for option in ("device", "replicas", "step", "threads"):
        parser.add_argument(f"--{option}", default=None, help="as of `train`")


def run(arguments: argparse.Namespace) -> int:
    """Trains, then packs. Returns 1 if a job failed; running out of time is no failure."""
    deadline = time.monotonic() + 60 * arguments.minutes
    results: Path = arguments.results
    failed = 0
    jobs = read_jobs(arguments.jobs)
    for job in jobs:
        left = [request for request in job.requests if not _is_done(request, results)]
        if not left:
            continue
        if time.monotonic() >= deadline:
            break
        start = time.monotonic()
        code = _train(job, left, arguments, deadline)
        done = sum(_is_done(request, results) for request in job.requests)
        print(f"{job.figure} {job.name}: {done} of {len(job.requests)} cells", end="", flush=True)
        print(f" after {time.monotonic() - start:.0f} s" + ("" if code in (0, 143) else f", failed with {code}"))
        failed += code not in (0, 143)
    finished = [r for job in jobs for r in job.requests if _is_done(r, results)]
    print(f"{len(finished)} of {sum(len(job.requests) for job in jobs)} cells are done", flush=True)
    if arguments.archive is not None:
        for path in archive(finished, results, arguments.archive, arguments.archive_bytes):
            print(f"packed {path}")
    return 1 if failed else 0


def _is_done(request: TrainingRequest, results: Path) -> bool:
    return Result(results / "cells" / request.cell.id).answers(request.digest, code_digest())


def _train(job: Job, left: Sequence[TrainingRequest], arguments: argparse.Namespace, deadline: float) -> int:
    """Runs `train`; its exit status, 143 where the time ran out and it wrote checkpoints."""
    log = arguments.results / "logs" / "train" / f"{job.name}.log"
    make_folder(log.parent)
    command = [sys.executable, "-m", "mup_moe", "train"]
    for request in left:
        command += ["--request", request.to_json()]
    command += ["--tokens", str(arguments.results / "data" / job.corpus), "--out", str(arguments.results / "cells")]
    for option in ("device", "replicas", "step", "threads"):
        if getattr(arguments, option) is not None:
            command += [f"--{option}", str(getattr(arguments, option))]
    with log.open("a") as file, subprocess.Popen(command, stderr=file) as process:  # noqa: S603 - our own command
        try:
            # Popen takes no infinite timeout.
            wait = deadline - time.monotonic()
            return process.wait(timeout=None if wait == float("inf") else max(wait, 0.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        # One that was asked to stop while it still started has nothing to save.
        return 143 if code == -signal.SIGTERM else code


def archive(requests: Sequence[TrainingRequest], results: Path, folder: Path, part_bytes: int) -> Iterator[Path]:
    """Packs the results of cells into archives of about that size, each of whole cells; yields their paths."""
    make_folder(folder)
    number, rest = 0, list(requests)
    while rest:
        path = folder / f"cells-{number:03d}.tar.gz"
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            while rest and file.tell() < part_bytes:
                cell = rest.pop(0).cell.id
                for source in Result(results / "cells" / cell).kept_files:
                    tar.add(source, arcname=f"{cell}/{source.name}", recursive=False)
        yield path
        number += 1
