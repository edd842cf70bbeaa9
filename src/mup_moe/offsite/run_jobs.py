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

from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError, atomic_write, make_folder
from mup_moe.offsite.job_list import Job, read_jobs
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
    """Trains, then packs. Returns 1 if a job failed; running out of time is no failure.

    SIGTERM and SIGINT end the time. Raises UserError where tokens are not those of the list.
    """
    results: Path = arguments.results
    jobs = read_jobs(arguments.jobs)
    for corpus, tokens in {job.corpus: job.tokens for job in jobs}.items():
        if Tokens.open(results / "data" / corpus).digest != tokens:
            raise UserError(
                f"{results / 'data' / corpus} has other tokens than the list: copy the folder from home again"
            )
    clock = _Clock(60 * arguments.minutes)
    failed = 0
    for job in jobs:
        left = [request for request in job.requests if not job.is_done(request, results)]
        if not left:
            continue
        if clock.is_over:
            break
        start = time.monotonic()
        code = _train(job, left, arguments, clock)
        done = sum(job.is_done(request, results) for request in job.requests)
        ended = "" if code == 0 else ", stopped" if clock.is_over else f", failed with {code}"
        seconds = time.monotonic() - start
        print(f"{job.figure} {job.name}: {done} of {len(job.requests)} cells after {seconds:.0f} s{ended}", flush=True)
        failed += code != 0 and not clock.is_over
    finished = [request for job in jobs for request in job.requests if job.is_done(request, results)]
    print(f"{len(finished)} of {sum(len(job.requests) for job in jobs)} cells are done", flush=True)
    if arguments.archive is not None:
        for path in archive(finished, results, arguments.archive, arguments.archive_bytes):
            print(f"packed {path}")
    return 1 if failed else 0


class _Clock:
    """The time that is given, which a signal ends."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self._deadline = 0.0

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._deadline


def _train(job: Job, left: Sequence[TrainingRequest], arguments: argparse.Namespace, clock: _Clock) -> int:
    """Runs `train` until it ends or the time does; its exit status."""
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
        while process.poll() is None and not clock.is_over:
            time.sleep(0.2)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    return process.returncode


def archive(requests: Sequence[TrainingRequest], results: Path, folder: Path, part_bytes: int) -> Iterator[Path]:
    """Packs cells into archives of about that size, in place of those there; yields their paths."""
    make_folder(folder)
    for before in folder.glob("cells-*.tar.gz"):
        before.unlink()
    number, rest = 0, list(requests)
    while rest:
        path = folder / f"cells-{number:03d}.tar.gz"
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            first = len(rest)
            while rest and (len(rest) == first or file.tell() < part_bytes):
                cell = rest.pop(0).cell.id
                for source in Result(results / "cells" / cell).kept_files:
                    tar.add(source, arcname=f"{cell}/{source.name}", recursive=False)
        yield path
        number += 1
