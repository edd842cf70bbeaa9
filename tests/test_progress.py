"""The progress line, for simulated runs with a fake clock, and the process that forecasts the costs."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, read_config
from mup_moe.model.inventory import size_of
from mup_moe.ops import heartbeat
from mup_moe.ops.heartbeat import Failure, Heartbeat
from mup_moe.ops.progress.forecast import CellForecast, Forecast, ask_forecast, makespan
from mup_moe.ops.progress.report import line
from mup_moe.ops.progress.watch import RunWatch, Standing
from mup_moe.tables.machine import START_SECONDS, Machine

START, STEPS, ELSEWHERE = 2.0, 300, "node7"


@dataclass
class Job:
    """One stack of cells. step_seconds: the forecast for a step of all of them together."""

    name: str
    cells: int
    step_seconds: float
    first: int = 0

    @property
    def ids(self) -> list[str]:
        return [f"{self.name}-{number}" for number in range(self.cells)]

    @property
    def seconds(self) -> float:
        return START + (STEPS - self.first) * self.step_seconds

    def forecast(self) -> dict[str, CellForecast]:
        return {cell: CellForecast(self.first, STEPS, self.step_seconds / self.cells) for cell in self.ids}


@dataclass
class Run:
    """Jobs on processes that take `slowness` times the forecast, and the files that training writes."""

    folder: Path
    jobs: list[Job]
    processes: int = 1
    slowness: float = 1.0
    now: float = 0.0
    begin: dict[str, float] = field(default_factory=dict)
    beats: dict[str, float] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        free = [0.0] * self.processes
        for job in self.jobs:
            self.begin[job.name] = min(free)
            free[free.index(min(free))] += self.slowness * job.seconds
        self.end = max(free)

    def watch(self, is_measured: bool = True, forecast: bool = True, **options) -> RunWatch:
        figures = {"figure1": [cell for job in self.jobs for cell in job.ids]}
        options = {"figures": figures, "processes": self.processes, "clock": lambda: self.now} | options
        watch = RunWatch([job.ids for job in self.jobs], self.folder, **options)
        if forecast:
            cells = {name: cell for job in self.jobs for name, cell in job.forecast().items()}
            watch.learn(Forecast(cells, START, is_measured))
        return watch

    def advance(self, until: float) -> None:
        """Writes the files that exist at this time."""
        self.now = until
        for number, job in enumerate(self.jobs):
            began = self.begin[job.name] + self.slowness * START
            step_seconds = self.slowness * job.step_seconds
            if until >= self.begin[job.name] + self.slowness * job.seconds:
                if job.name not in self.ended:
                    self.finish(job)
            elif until >= began:
                # The last heartbeat, by a clock that is a year behind.
                beat = began + math.floor((until - began) / heartbeat.SECONDS) * heartbeat.SECONDS
                step = job.first + int((beat - began) / step_seconds)
                rate = 1 / step_seconds if step > job.first else None
                if self.beats.get(job.name) != beat:
                    self.beats[job.name] = beat
                    self.beat(job, step, rate, beat - 3e7, pid=number)

    def beat(self, job: Job, step: int, rate: float | None = None, at: float = 0.0, pid: int = 1) -> None:
        for cell in job.ids:
            Heartbeat(step, STEPS, job.cells, rate, at, ELSEWHERE, pid, None).write(self.folder / cell)

    def finish(self, job: Job) -> None:
        self.ended.add(job.name)
        for cell in job.ids:
            (self.folder / cell).mkdir(parents=True, exist_ok=True)
            (self.folder / cell / "summary.json").write_text("{}")
            heartbeat.clear(self.folder / cell)


def looks(run: Run, watch: RunWatch, until: float = math.inf) -> list[tuple[float, Standing]]:
    """Looks at the run regularly, by default until it ends; returns each time with what was seen."""
    seen, every, until = [], max(5.0, run.end / 400), min(until, run.end)
    while not seen or run.now < until:
        run.advance(len(seen) * every)
        seen.append((run.now, watch.look()))
    return seen


# Any models, at widths with costs of a step that differ by a factor of up to 30.
job_lists = st.lists(
    st.tuples(st.integers(1, 3), st.floats(0.02, 0.6), st.sampled_from([0, 0, 0, 100])), min_size=1, max_size=8
)


@settings(deadline=None, max_examples=20)
@given(jobs=job_lists, processes=st.integers(1, 4), slowness=st.floats(0.4, 2.5))
def test_the_time_left_is_about_right_after_a_minute_and_converges(jobs, processes, slowness):
    jobs = [Job(f"job{number}", *job) for number, job in enumerate(jobs)]
    if processes > 1:
        # The widest have priority; this order matters only for several processes, which run out of jobs one by one.
        jobs.sort(key=lambda job: -job.seconds)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), jobs, processes, slowness)
        seen = looks(run, run.watch())
    shares = [standing.share for _, standing in seen]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)
    for now, standing in seen[:-1]:
        left, estimate = run.end - now, standing.seconds_left
        assert standing.cells < standing.total
        if now >= 60:
            assert estimate == pytest.approx(left, rel=0.3, abs=15)
        if now >= 300:
            assert estimate == pytest.approx(left, rel=0.15, abs=15)
    assert seen[-1][1].seconds_left == 0
    assert seen[-1][1].cells == seen[-1][1].total


def test_with_a_right_forecast_the_time_left_is_right_before_any_cell_begins(tmp_path):
    run = Run(tmp_path, [Job("wide", 6, 0.5), Job("narrow", 6, 0.1), Job("other", 6, 0.1)], processes=2)
    seen = looks(run, run.watch())
    assert [standing.seconds_left for _, standing in seen] == pytest.approx([run.end - now for now, _ in seen], abs=10)


def test_without_a_benchmark_the_run_itself_gives_the_time_left(tmp_path):
    run = Run(tmp_path, [Job("wide", 6, 0.5), Job("narrow", 6, 0.1)], slowness=4.0)
    seen = looks(run, run.watch(is_measured=False))
    assert seen[0][1].seconds_left is None
    for now, standing in seen:
        if now >= 0.1 * run.end:
            assert standing.seconds_left == pytest.approx(run.end - now, rel=0.1, abs=30)


def test_without_a_forecast_cells_are_counted_and_no_time_is_shown(tmp_path):
    run = Run(tmp_path, [Job("wide", 6, 0.5), Job("narrow", 2, 0.1)])
    seen = looks(run, run.watch(forecast=False))
    assert {standing.share for _, standing in seen} == {0, 6 / 8, 1}
    assert {standing.seconds_left for _, standing in seen} == {None, 0}


def test_on_a_cluster_the_number_of_processes_is_that_of_heartbeats(tmp_path):
    jobs = [Job(f"job{number}", 6, 0.5) for number in range(12)]
    run = Run(tmp_path, jobs, processes=4)
    watch = run.watch(processes=None)
    # An hour in the queue.
    for _ in range(3):
        run.now += 1200
        assert watch.look().seconds_left is None
    queued = run.now
    run.begin = {name: begin + queued for name, begin in run.begin.items()}
    for now in range(10, int(run.end), 10):
        run.advance(queued + now)
        standing = watch.look()
        if now >= 60:
            assert standing.seconds_left == pytest.approx(run.end - now, rel=0.15, abs=15)


def test_the_longest_job_determines_the_time_left(tmp_path):
    run = Run(tmp_path, [Job("wide", 1, 2.0), *(Job(f"narrow{number}", 6, 0.05) for number in range(4))], processes=4)
    for now, standing in looks(run, run.watch()):
        assert standing.seconds_left == pytest.approx(run.end - now, abs=15)
    assert run.end == pytest.approx(START + 600)


def test_work_done_before_the_run_does_not_count(tmp_path):
    run = Run(tmp_path, [Job("half", 6, 0.2, first=150), Job("kept", 6, 0.2, first=STEPS), Job("new", 6, 0.2)])
    seen = looks(run, run.watch())
    assert seen[0][1].share == 0
    at = dict(seen)
    assert at[35].share == pytest.approx(34 / 96, abs=0.1)
    assert seen[-1][1].share == pytest.approx(1)


def test_files_that_exist_before_the_run_do_not_count(tmp_path):
    jobs = [Job(name, 1, 0.1) for name in ("killed", "failed", "outdated")]
    run = Run(tmp_path, jobs)
    run.beat(jobs[0], 100, 10.0)
    Failure("no disk", 0.0).write(tmp_path / "failed-0")
    run.finish(jobs[2])
    watch = run.watch()
    for now in (0.0, 5.0, 100.0):
        run.now = now
        standing = watch.look()
        assert (standing.cells, standing.failed, standing.share, standing.figures) == (0, 0, 0, ())


def test_a_failed_job_is_not_waited_for_until_it_is_retried(tmp_path):
    jobs = [Job("wide", 2, 1.0), Job("narrow", 2, 0.1)]
    run = Run(tmp_path, jobs)
    watch = run.watch()
    _, standing = looks(run, watch, until=50)[-1]
    assert standing.seconds_left == pytest.approx(run.end - 50, abs=15)
    for cell in jobs[0].ids:
        heartbeat.clear(tmp_path / cell)
        Failure("no memory", 0.0).write(tmp_path / cell)
    run.now = 55
    standing = watch.look()
    assert standing.failed == 2
    assert standing.seconds_left == pytest.approx(jobs[1].seconds, abs=10)
    # The retry starts from its checkpoint; the files of the failure are still in the folders.
    run.beat(jobs[0], 40, 1.0, pid=2)
    run.now = 60
    retried = watch.look()
    assert retried.failed == 0
    assert retried.seconds_left == pytest.approx(260 + jobs[1].seconds, rel=0.25)
    assert retried.share >= standing.share


def test_if_a_failure_ends_the_run_only_running_jobs_are_waited_for(tmp_path):
    jobs = [Job("wide", 2, 1.0), Job("narrow", 2, 1.0), Job("waiting", 2, 1.0)]
    run = Run(tmp_path, jobs, processes=2)
    watch = run.watch(keep_going=False)
    _, standing = looks(run, watch, until=50)[-1]
    assert standing.seconds_left > 500
    for cell in jobs[0].ids:
        heartbeat.clear(tmp_path / cell)
        Failure("no memory", 0.0).write(tmp_path / cell)
    run.now = 55
    assert watch.look().seconds_left == pytest.approx(250, abs=15)


def test_a_process_that_falls_silent_has_failed(tmp_path):
    jobs = [Job("wide", 2, 1.0), Job("narrow", 2, 0.1)]
    run = Run(tmp_path, jobs)
    watch = run.watch()
    looks(run, watch, until=50)
    run.now += 60 + 10
    standing = watch.look()
    assert (standing.failed, standing.cells) == (2, 0)
    assert standing.seconds_left < jobs[0].seconds / 2
    run.finish(jobs[1])
    standing = watch.look()
    assert (standing.failed, standing.cells, standing.seconds_left) == (2, 2, 0)
    assert standing.share < 0.3


def test_each_running_cell_is_shown_under_its_first_figure(tmp_path):
    jobs = [Job(name, 2, 0.1) for name in ("a", "b", "c")]
    run = Run(tmp_path, jobs, processes=3)
    figures = {"made": jobs[0].ids, "other": [*jobs[0].ids, *jobs[1].ids]}
    watch = run.watch(figures=figures)
    assert watch.look().figures == ()
    run.beat(jobs[0], 10, pid=1)
    assert watch.look().figures == ("made",)
    run.beat(jobs[1], 10, pid=2)
    run.beat(jobs[2], 10, pid=3)  # in no figure
    assert watch.look().figures == ("made", "other")
    for job in jobs[:2]:
        run.finish(job)
    assert watch.look().figures == ("made", "other")  # until others are known


@given(
    running=st.lists(st.floats(0, 1e6), max_size=5),
    waiting=st.lists(st.floats(0, 1e6), max_size=20),
    processes=st.integers(1, 8),
)
def test_the_makespan_is_at_least_its_lower_bound_and_not_much_more(running, waiting, processes):
    jobs, processes = [*running, *waiting], max(processes, len(running))
    least = max([sum(jobs) / processes, *jobs])
    assert least * (1 - 1e-9) <= makespan(running, waiting, processes)
    assert makespan(running, waiting, processes) <= sum(jobs) / processes + max(jobs, default=0.0) + 1e-6


# ---------------------------------------------------------------- the line

STANDING = Standing(share=0.479, cells=30, total=63, failed=0, figures=("figure1",), seconds_left=660.0)


def test_the_line_shows_the_figure_the_progress_and_the_time_left():
    reported = line(STANDING, 60.0)
    assert re.fullmatch(r"figure1:  47%\|[#\d ]+\| 30/63 cells \[01:00 spent, about 11 min left\]", reported)
    assert len(reported) == 99
    assert "7 failed" in line(replace(STANDING, failed=7), 60.0)
    assert "left" not in line(replace(STANDING, seconds_left=None), 60.0)


def test_100_percent_is_shown_only_when_all_is_done():
    assert " 99%|" in line(replace(STANDING, share=0.9999), 60.0)
    assert "100%|" in line(replace(STANDING, share=1 - 1e-12), 60.0)


def test_until_a_cell_begins_the_line_shows_tokenizing_or_waiting():
    nothing = replace(STANDING, cells=0, figures=(), share=0.0)
    assert line(nothing, 60.0, tokenizing=True).startswith("tokenizing:   0%|")
    assert "left" not in line(nothing, 60.0, tokenizing=True)
    assert line(nothing, 60.0).startswith("waiting:   0%|")
    assert line(STANDING, 60.0, tokenizing=True) == line(STANDING, 60.0)


def test_the_names_of_many_figures_are_shortened():
    reported = line(replace(STANDING, figures=tuple(f"figure{number}" for number in range(9))), 60.0)
    assert reported.startswith("figure0, figure1, figure2, fi...: ")
    assert len(reported) == 99


# ---------------------------------------------------------------- the process that forecasts the costs


def test_the_forecast_agrees_with_the_plan(tmp_path):
    path = ROOT / "config.yaml"
    config = read_config(path)
    setup = config.setups[config.figures["figure1"].setup]
    cells = config.figures["figure1"].cells()[::17]
    benchmark = ROOT / "benchmarks" / "step.csv"
    forecast = ask_forecast(yaml.safe_load(path.read_text()), [cell.id for cell in cells], tmp_path, benchmark)
    assert forecast is not None
    assert (forecast.start_seconds, forecast.is_measured) == (START_SECONDS, True)
    machine = Machine.read(benchmark)
    for cell in cells:
        tokens = setup.training.batch_size * setup.model.sequence
        vocabulary = config.corpora["python"].vocabulary
        seconds = machine.seconds(tokens * size_of(cell, setup.model, vocabulary).flops_per_token, cell.width, "moe")
        assert forecast.cells[cell.id].seconds_of_step == pytest.approx(seconds)
        assert (forecast.cells[cell.id].step, forecast.cells[cell.id].steps) == (0, setup.training.steps)
    assert not ask_forecast(yaml.safe_load(path.read_text()), [cells[0].id], tmp_path, tmp_path / "none").is_measured
    assert ask_forecast({"figures": 3}, [cells[0].id], tmp_path, benchmark) is None


def test_the_forecast_process_ends_when_its_parent_closes_the_pipe(tmp_path):
    # A benchmark that nobody writes, so that its reader waits forever.
    os.mkfifo(tmp_path / "step.csv")
    document = yaml.safe_load((ROOT / "config.yaml").read_text())
    cell = "small_moe_mup_w32_e8_g1_lr2^-6_s0"
    request = {"document": document, "cells": [cell], "results": str(tmp_path), "benchmark": str(tmp_path / "step.csv")}
    process = subprocess.Popen(
        [sys.executable, "-m", "mup_moe.ops.progress.forecast"], stdin=subprocess.PIPE, text=True
    )
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    process.stdin.close()
    assert process.wait(timeout=300) == 3
