"""Clocks, memory and GPUs that fail, and processes that hang."""

import random
import signal
from pathlib import Path

import pytest

from conftest import make_request, wait_until
from faults.commands import continued_steps, end, finish, one_sentence, run, start
from faults.curve import Curve
from faults.inject import Inject, is_stopped
from faults.ledger import RESUMES, Ledger
from mup_moe.files import read_json
from mup_moe.ops.heartbeat import Failure

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
SENTENCE_THEN_RESUMES = f"stops with a one-sentence error; a rerun {RESUMES}"


def has_reason(cell: Path, said: str) -> bool:
    """Returns whether the cell's folder also has the reason that a command gave."""
    failure = Failure.read(cell)
    return failure is not None and failure.reason == said.removeprefix("mup-moe: ")


def test_a_clock_that_is_turned_back_changes_nothing(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve, tmp_path: Path
) -> None:
    if FAKETIME is None:
        pytest.skip("a clock that is turned back while a process runs: libfaketime is not installed")
    offset = tmp_path / "offset"
    offset.write_text("+0")
    clock = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1"}
    # The monotonic clock is not faked.
    clock |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    command = curve.train("--checkpoint-seconds", "0")
    with ledger.trial("clock turned back a day", "in the middle of a run that resumes after a kill", RESUMES) as trial:
        run(command, inject("SIGKILL", number=chance.randint(15, 30)) | clock)
        trial.struck(curve.out)
        step = curve.next_step()
        assert step > 0
        said = finish(command, inject("turn_back_clock", number=chance.randint(5, 25)) | clock)
        assert offset.read_text() == "-1d"
        assert continued_steps(said) == [step]
        curve.assert_as_undisturbed()
        # On the right day again, nothing is trained, whatever the dates of the files.
        trial.must_keep(curve.out)
        assert "step/s" in said
        assert "step/s" not in finish(command)
        curve.assert_as_undisturbed()


def test_a_hung_process_exits_and_a_rerun_resumes(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    command = curve.train("--checkpoint-seconds", "0")
    with ledger.trial("a process hangs", "at some step", SENTENCE_THEN_RESUMES) as trial:
        said = one_sentence(run(command, inject("hang", number=chance.randint(20, 55))))
        assert "no step for 1800 s" in said
        trial.struck(curve.out)
        for cell in curve.cells[:2]:
            assert has_reason(cell, said)
        step = curve.next_step()
        assert step > 0
        assert continued_steps(finish(command)) == [step]
        curve.assert_as_undisturbed()


def test_a_suspended_process_continues(ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve) -> None:
    command = curve.train()
    expected = "continues where it was and is not mistaken for a hang"
    with ledger.trial("a process is suspended", "at some step, for longer than hang_seconds", expected) as trial:
        process = start(command, inject("suspend", number=chance.randint(20, 55)))
        wait_until(lambda: is_stopped(process.pid), process)
        trial.struck(curve.out)
        process.send_signal(signal.SIGCONT)
        done = end(process)
        assert done.returncode == 0, done.stderr
        curve.assert_as_undisturbed()


def test_a_rerun_resumes_after_the_gpu_disappears(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    command = curve.train("--checkpoint-seconds", "0")
    with ledger.trial("the GPU disappears (simulated)", "at some step", SENTENCE_THEN_RESUMES) as trial:
        said = one_sentence(run(command, inject("lose_gpu", number=chance.randint(20, 55))))
        assert "the GPU failed: rerun the same command" in said
        trial.struck(curve.out)
        assert has_reason(curve.cells[0], said)
        step = curve.next_step()
        assert step > 0
        assert continued_steps(finish(command)) == [step]
        curve.assert_as_undisturbed()


def test_a_stack_that_does_not_fit_on_the_gpu_is_split(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    command = curve.train("--checkpoint-seconds", "0")
    expected = "continues in smaller stacks and ends with the same bytes"
    with ledger.trial("too little GPU memory (simulated)", "a stack, at some step", expected) as trial:
        # In the first block of steps, while the stack still has all three cells.
        said = finish(command, inject("fill_gpu", number=chance.randint(10, 19)))
        trial.struck(curve.out)
        assert "3 cells do not fit in the GPU's memory together: trying 2" in said
        first, *_ = continued_steps(said)
        assert first > 0
        curve.assert_as_undisturbed()


def test_cells_that_do_not_fit_in_main_memory_do_not_stop_the_others(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    large = make_request(width=64, steps=4, batch_size=1024)
    command = curve.train(also=[large])
    where = "models of one shape among others that fit"
    expected = "stops with a one-sentence error after training the others; a rerun with more memory trains those too"
    with ledger.trial("too little main memory", where, expected) as trial:
        leave = chance.randrange(40 * 2**20)
        said = one_sentence(run(command, inject("fill_memory", number=chance.randint(10, 55), leave=leave)))
        assert "the memory is too small" in said
        trial.struck(curve.out)
        curve.assert_as_undisturbed()
        finish(command)
        assert read_json(curve.out / large.cell.id / "summary.json")["status"] == "finished"
        curve.assert_as_undisturbed()
