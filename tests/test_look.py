"""The look at a GPU, run on a CPU: results are written as soon as they are known, whatever fails."""

import argparse
import json
import signal
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT, make_request
from mup_moe.ops.offsite.job_list import ListedJob, write_jobs
from mup_moe.training.stack import Stack

sys.path.append(str(ROOT / "benchmarks"))

import look
from sweep import write_tokens

# Enough for a machine of any speed.
SECONDS = 1e6


@pytest.fixture
def options(tmp_path):
    """The options of a short look at a CPU, with a list of one job and its tokens."""
    folder = tmp_path / "results" / "data" / "toy"
    folder.mkdir(parents=True)
    write_tokens(folder)
    requests = tuple(make_request(width=32, base_width=32, seed=seed) for seed in (0, 1))
    write_jobs(tmp_path / "jobs.jsonl", [ListedJob("job", "figure1", "toy", "digest", requests)])
    return argparse.Namespace(
        jobs=tmp_path / "jobs.jsonl",
        results=tmp_path / "results",
        out=tmp_path / "out",
        seconds=SECONDS,
        steps=["eager"],
        stacks=["2x32", "1x32"],
        profiled=["1x32"],
        blocks=1,
    )


def lines(options):
    return [json.loads(line) for line in (options.out / "look.jsonl").read_text().splitlines()]


def parts(rows):
    return list(dict.fromkeys(row["part"] for row in rows))


def test_every_part_reports_what_it_measured(options):
    assert look.Look(options, torch.device("cpu")).run() == 0
    rows = lines(options)
    assert parts(rows) == ["facts", "smoke", "rates", "stack", "attention", "kernels"]
    assert not any("failed" in row or "left_out" in row for row in rows)
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    smoke = [row for row in rows if row["part"] == "smoke"]
    assert [(row["step"], row["precision"]) for row in smoke] == [("eager", "float32"), ("eager", "bfloat16")]
    # In float32, the device is compared with itself.
    assert smoke[0]["nats_to_cpu"] == 0 < smoke[1]["nats_to_cpu"]
    assert (options.out / "kernels-1x32.csv").read_text().startswith("kernel,launches,ms")


def test_a_part_that_fails_does_not_affect_the_others(options, monkeypatch):
    def broken(*_args, **_options):
        raise ValueError("out of\norder")

    monkeypatch.setattr(look.Look, "_rates", broken)
    options.stacks = ["99x32", "1x32"]
    assert look.Look(options, torch.device("cpu")).run() == 1
    rows = lines(options)
    failed = {row["part"]: row["failed"] for row in rows if "failed" in row}
    assert failed["rates"] == "ValueError: out of order"
    assert "no job with 99 cells of width 32" in failed["stack"]
    assert [row["which"] for row in rows if "step_ms" in row] == ["1x32"]


def test_a_step_that_cannot_be_compiled_ends_the_look_and_is_named(options, monkeypatch):
    options.steps = ["eager", "compiled"]

    def fail(*_args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda _function, **_options: fail)
    assert look.Look(options, torch.device("cpu")).run() == 2
    rows = lines(options)
    assert parts(rows) == ["facts", "smoke", "end"]
    assert "cannot be compiled here (RuntimeError: no compiler)" in rows[-2]["failed"]
    assert rows[-1]["reason"].startswith("a step cannot be compiled in float32")


def test_without_time_every_part_is_left_out(options):
    options.seconds = 0.0
    assert look.Look(options, torch.device("cpu")).run() == 0
    assert all("left_out" in row for row in lines(options))


def test_a_part_that_takes_too_long_is_ended_and_the_next_is_tried(options, monkeypatch):
    def forever(*_args):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(Stack, "advance", forever)
    for part in ("smoke", "stack"):
        monkeypatch.setitem(look.LIMITS, part, 0.2 * look.SHORT_LOOK / SECONDS)
    assert look.Look(options, torch.device("cpu")).run() == 1
    rows = lines(options)
    assert all("took more than" in row["failed"] for row in rows if row["part"] in ("smoke", "stack"))
    assert [row for row in rows if row["part"] == "rates" and "copy_tb_s" in row]


def test_a_nested_part_leaves_the_outer_clock_running():
    # The test itself may run under such a clock.
    before = signal.getitimer(signal.ITIMER_REAL)[0]

    def outer():
        with look._at_most(0.3):
            with look._at_most(60.0):
                pass
            signal.pause()

    with pytest.raises(look._OverError):
        outer()
    after = signal.getitimer(signal.ITIMER_REAL)[0]
    assert after <= before
    assert (after > 0) == (before > 0)


def test_a_stack_has_the_cells_of_the_list(options):
    first = look.Look(options, torch.device("cpu"))
    job, requests = first._requests(2, 32)
    assert tuple(requests) == job.requests
    assert len(first._requests(1, 32)[1]) == 1
