"""Clocks, memory and GPUs that fail, and processes that hang."""

import random
import signal
from pathlib import Path

import pytest

from conftest import make_request, wait_until
from faults.commands import continued_steps, end, finish, one_sentence, run, start
from faults.curve import Curve
from faults.inject import Inject, is_stopped
from faults.ledger import GOES_ON, Ledger
from mup_moe.files import read_json
from mup_moe.ops.heartbeat import Failure

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
SENTENCE_AND_ON = f"one sentence; run again, {GOES_ON}"


def is_told(cell: Path, said: str) -> bool:
    """Whether the reason that a command gave is in the cell's folder, too."""
    failure = Failure.read(cell)
    return failure is not None and failure.reason == said.removeprefix("mup-moe: ")


def test_a_clock_that_is_turned_back(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve, tmp_path: Path
) -> None:
    if FAKETIME is None:
        pytest.skip("a clock that is turned back while a process runs: libfaketime is not installed")
    offset = tmp_path / "offset"
    offset.write_text("+0")
    clock = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1"}
    # Seconds since the machine was started go on.
    clock |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    command = curve.train("--checkpoint-seconds", "0")
    with ledger.trial("clock turned back a day", "in the middle of a run that was killed before", GOES_ON) as trial:
        run(command, inject("SIGKILL", number=chance.randint(15, 30)) | clock)
        trial.struck(curve.out)
        step = curve.next_step()
        assert step > 0
        said = finish(command, inject("turn_back_clock", number=chance.randint(5, 25)) | clock)
        assert offset.read_text() == "-1d"
        assert continued_steps(said) == [step]
        curve.assert_as_undisturbed()
        # Today again: nothing is trained, whatever the files are dated.
        trial.keeps(curve.out)
        assert "step/s" in said
        assert "step/s" not in finish(command)
        curve.assert_as_undisturbed()


def test_a_process_that_hangs_is_ended(ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve) -> None:
    command = curve.train("--checkpoint-seconds", "0")
    with ledger.trial("a process hangs", "at some step", SENTENCE_AND_ON) as trial:
        said = one_sentence(run(command, inject("hang", number=chance.randint(20, 55))))
        assert "no step for 1800 s" in said
        trial.struck(curve.out)
        for cell in curve.cells[:2]:
            assert is_told(cell, said)
        step = curve.next_step()
        assert step > 0
        assert continued_steps(finish(command)) == [step]
        curve.assert_as_undisturbed()


def test_a_process_that_is_suspended_goes_on(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    command = curve.train()
    expected = "goes on where it was, and is not taken to hang"
    with ledger.trial("a process is suspended", "at some step, for longer than hang_seconds", expected) as trial:
        process = start(command, inject("suspend", number=chance.randint(20, 55)))
        wait_until(lambda: is_stopped(process.pid), process)
        trial.struck(curve.out)
        process.send_signal(signal.SIGCONT)
        done = end(process)
        assert done.returncode == 0, done.stderr
        curve.assert_as_undisturbed()


def test_a_gpu_that_disappears(ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve) -> None:
    command = curve.train("--checkpoint-seconds", "0")
    with ledger.trial("the GPU disappears (simulated)", "at some step", SENTENCE_AND_ON) as trial:
        said = one_sentence(run(command, inject("lose_gpu", number=chance.randint(20, 55))))
        assert "the GPU failed: rerun the same command" in said
        trial.struck(curve.out)
        assert is_told(curve.cells[0], said)
        step = curve.next_step()
        assert step > 0
        assert continued_steps(finish(command)) == [step]
        curve.assert_as_undisturbed()


def test_memory_of_the_gpu_that_is_too_small(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    command = curve.train("--checkpoint-seconds", "0")
    expected = "goes on in smaller stacks, to the same bytes"
    with ledger.trial("too little memory of the GPU (simulated)", "a stack, at some step", expected) as trial:
        # While the stack has all three, the first of its blocks.
        said = finish(command, inject("fill_gpu", number=chance.randint(10, 19)))
        trial.struck(curve.out)
        assert "3 cells do not fit in the GPU's memory together: trying 2" in said
        first, *_ = continued_steps(said)
        assert first > 0
        curve.assert_as_undisturbed()


def test_memory_of_the_machine_that_is_too_small(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    large = make_request(width=64, steps=4, batch_size=1024)
    command = curve.train(also=[large])
    where = "models of one shape among others that fit"
    expected = "one sentence, and the others are trained; run again with more memory, those are, too"
    with ledger.trial("too little memory of the machine", where, expected) as trial:
        leave = chance.randrange(40 * 2**20)
        said = one_sentence(run(command, inject("fill_memory", number=chance.randint(10, 55), leave=leave)))
        assert "the memory is too small" in said
        trial.struck(curve.out)
        curve.assert_as_undisturbed()
        finish(command)
        assert read_json(curve.out / large.cell.id / "summary.json")["status"] == "finished"
        curve.assert_as_undisturbed()
