"""Trains the jobs of a list one by one, as far as time allows: python -m mup_moe run-jobs.

Run it on a machine that has neither Snakemake nor the config. It packs finished cells after every job; rerun the
same command to resume the other cells from their checkpoints.
"""

import argparse
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError, make_folder
from mup_moe.ops.heartbeat import Heartbeat
from mup_moe.ops.offsite.archive import CellArchives, pack_logs
from mup_moe.ops.offsite.job_list import ListedJob, read_jobs
from mup_moe.ops.offsite.job_time import JobTimes

# How long a job may take to stop, with and without writing checkpoints.
_GRACE_SECONDS, _END_SECONDS = 120.0, 10.0
_POLL_SECONDS = 0.2
# How long a compiler may run on after the job that it ran alongside; then it counts as hung.
_AHEAD_SECONDS = 60.0
# From this step on, no step is compiled or captured any more, so the rate is representative.
_WARM_UP_STEPS = 20
_OPTIONS = {"device": str, "replicas": str, "step": str, "threads": int, "checkpoint_seconds": float}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run-jobs`."""
    parser.add_argument("--jobs", type=Path, required=True, help="the list that export-jobs wrote")
    parser.add_argument("--results", type=Path, default=Path("results"), help="has data/; gets cells/ and logs/")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit; unfinished jobs are left")
    parser.add_argument("--archive", type=Path, help="folder for the finished cells (cells-000.tar.gz, ...) and logs")
    parser.add_argument("--archive-bytes", type=int, default=10_000_000, help="size at which an archive is full")
    help_measured = "output of benchmarks/look.py: skip jobs that cannot end in time from the first job on"
    parser.add_argument("--measured", type=Path, help=help_measured)
    help_ahead = "compile the steps of the next job while one trains (needs memory for both)"
    parser.add_argument("--compile-ahead", action="store_true", help=help_ahead)
    for option, kind in _OPTIONS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", default=None, type=kind, help="as in `train`")


def run(arguments: argparse.Namespace) -> int:
    """Trains and packs. Returns 1 if a job or packing failed; running out of time is not a failure.

    SIGTERM and SIGINT end the run as if time had run out. Raises UserError if the tokens are not those of the list.
    """
    jobs = read_jobs(arguments.jobs)
    if not jobs:
        print(f"{arguments.jobs} lists no jobs: there is nothing to train", flush=True)
        return 0
    vocabulary = {}
    for corpus, digest in {job.corpus: job.tokens for job in jobs}.items():
        folder = arguments.results / "data" / corpus
        tokens = Tokens.open(folder)
        if tokens.digest != digest:
            raise UserError(
                f"{folder} has different tokens from those of the list: copy the folder from the home machine again"
            )
        vocabulary[corpus] = tokens.vocabulary
    return _Visit(arguments, jobs, JobTimes(vocabulary, arguments.measured)).run()


class _Visit:
    """Runs the jobs of a list within a time limit."""

    def __init__(self, arguments: argparse.Namespace, jobs: Sequence[ListedJob], times: JobTimes) -> None:
        self._arguments, self._jobs, self._times = arguments, jobs, times
        self._results: Path = arguments.results
        self._deadline: float = time.monotonic() + 60 * arguments.minutes
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._archives = arguments.archive and CellArchives(arguments.archive, arguments.archive_bytes)
        self._keeps_checkpoints = arguments.checkpoint_seconds != math.inf
        self._ahead: subprocess.Popen[bytes] | None = None
        self._failed = 0

    def _stop(self, *_: object) -> None:
        self._deadline = 0.0

    @property
    def _seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def run(self) -> int:
        """Trains and packs; returns the exit status."""
        self._pack()
        try:
            for number, job in enumerate(self._jobs):
                left = job.left(self._results)
                if left.requests:
                    self._await_ahead()
                if not self._seconds_left:
                    break
                if left.requests and self._can_end(left):
                    self._train(job, left, self._jobs[number + 1 :])
                    self._pack()
                elif left.requests:
                    takes = f"it needs about {self._times.estimate(left):.0f} s, {self._seconds_left:.0f} s are left"
                    print(f"{job.figure} {job.name}: not started, {takes}", flush=True)
        finally:
            if self._ahead is not None:
                _end(self._ahead, _END_SECONDS)
        print(f"{len(self._done())} of {sum(len(job.requests) for job in self._jobs)} cells are done", flush=True)
        return 1 if self._failed else 0

    def _done(self) -> list[Path]:
        """Returns the folders of the finished cells."""
        left = {request.cell for job in self._jobs for request in job.left(self._results).requests}
        cells = [request.cell for job in self._jobs for request in job.requests if request.cell not in left]
        return [self._results / "cells" / cell.id for cell in cells]

    def _can_end(self, left: ListedJob) -> bool:
        """Returns whether a job should run: it has checkpoints, or it may end in the time that is left."""
        seconds = self._times.estimate(left)
        return self._keeps_checkpoints or seconds is None or seconds <= self._seconds_left

    def _train(self, job: ListedJob, left: ListedJob, later: Sequence[ListedJob]) -> None:
        """Runs `train` until it ends or time runs out."""
        start, rate, ahead = time.monotonic(), 0.0, not self._arguments.compile_ahead
        process = self._start(job)
        try:
            while process.poll() is None and self._seconds_left:
                time.sleep(_POLL_SECONDS)
                if sign := self._sign_of(left):
                    if not ahead:
                        # Wait until now: once a job takes steps, it has allocated the memory that it needs.
                        ahead = True
                        self._compile_ahead(later)
                    # Take the fastest rate, because the first ones include compilation.
                    rate = max(rate, (sign.step >= _WARM_UP_STEPS and sign.steps_per_second) or 0.0)
        finally:
            _end(process, _GRACE_SECONDS if self._keeps_checkpoints else _END_SECONDS)
        seconds = time.monotonic() - start
        if process.returncode == 0 and rate:
            self._times.learn(left, seconds, rate)
        stopped = not self._seconds_left
        ended = "" if process.returncode == 0 else ", stopped" if stopped else f", failed with {process.returncode}"
        done = len(job.requests) - len(job.left(self._results).requests)
        print(f"{job.figure} {job.name}: {done} of {len(job.requests)} cells after {seconds:.0f} s{ended}", flush=True)
        self._failed += process.returncode != 0 and not stopped

    def _sign_of(self, job: ListedJob) -> Heartbeat | None:
        """Returns a heartbeat of a training job after its first step; finished cells have no heartbeat."""
        signs = (Heartbeat.read(self._results / "cells" / request.cell.id) for request in job.requests)
        return next((sign for sign in signs if sign and sign.step > 0), None)

    def _start(self, job: ListedJob, *more: str) -> "subprocess.Popen[bytes]":
        log = self._log_of(job)
        make_folder(log.parent)
        command = [sys.executable, "-m", "mup_moe", "train", job.name, *more]
        command += ["--requests", str(self._arguments.jobs), "--results", str(self._results)]
        for option in _OPTIONS:
            if (value := getattr(self._arguments, option)) is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        with log.open("a") as file:
            return subprocess.Popen(command, stderr=file)  # noqa: S603 - our own command

    def _log_of(self, job: ListedJob) -> Path:
        return self._results / "logs" / "train" / f"{job.name}.log"

    def _compile_ahead(self, later: Sequence[ListedJob]) -> None:
        """Starts the compiler for the next job that will run."""
        for job in later:
            left = job.left(self._results)
            if left.requests and self._can_end(left):
                self._ahead = self._start(job, "--compile-only")
                return

    def _await_ahead(self) -> None:
        """Waits for a running compiler to finish: the next job needs its output and its memory."""
        if self._ahead is not None:
            patience = time.monotonic() + _AHEAD_SECONDS
            while self._ahead.poll() is None and self._seconds_left and time.monotonic() < patience:
                time.sleep(_POLL_SECONDS)
            _end(self._ahead, _END_SECONDS)
            self._ahead = None

    def _pack(self) -> None:
        """Packs finished cells and logs. If that fails, they are packed after the next job."""
        if self._archives is None:
            return
        try:
            for path in self._archives.add(self._done()):
                print(f"packed {path}", flush=True)
            pack_logs(map(self._log_of, self._jobs), self._arguments.archive / "logs.tar.gz")
        except (OSError, UserError) as error:
            print(f"not packed: {error}", file=sys.stderr, flush=True)
            self._failed += 1


def _end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Terminates a process, and kills it if it has not ended after `seconds`."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
