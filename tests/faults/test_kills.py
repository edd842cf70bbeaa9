"""Processes that are killed, at random moments and again and again."""

import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from conftest import wait_until
from faults.commands import (
    assert_same_files,
    continued_steps,
    damage,
    end,
    finish,
    left_in,
    run,
    start,
    tokenize_command,
)
from faults.curve import Curve
from faults.inject import Inject
from faults.ledger import GOES_ON, SAME_BYTES, Ledger
from mup_moe.data.tokenize import WORK
from mup_moe.data.tokens import MANIFEST
from test_data import committed

KILLS = 5

SIGNALS = "SIGKILL or SIGTERM"
# Who hears of a signal says so; who does not is ended by it.
STATUSES = {0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM}


def kill(chance: random.Random, inject: Inject, among: tuple[int, int], seconds: float, **told: Any) -> dict[str, str]:
    """A kill at one of the moments with these numbers, or soon after it."""
    after = chance.choice([0, chance.uniform(0, seconds)])
    return inject(chance.choice(SIGNALS.split(" or ")), number=chance.randint(*among), after=after, **told)


# Seconds between checkpoints, and what is counted from which number to which.
MOMENTS: dict[str, tuple[float, str, tuple[int, int]]] = {
    "while training": (0.02, "step", (1, 30)),
    "while checkpoints are written": (0, "file", (1, 300)),
    "while results are written": (1000, "file", (30, 115)),
}


@pytest.mark.parametrize("where", MOMENTS)
def test_training_that_is_killed_again_and_again_goes_on(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve, tmp_path: Path, where: str
) -> None:
    seconds, at, among = MOMENTS[where]
    with ledger.trial(SIGNALS, where, GOES_ON if seconds < 1 else SAME_BYTES) as trial:
        while trial.strikes < KILLS:
            curve = curve.within(tmp_path / f"cells{trial.strikes}")
            command = curve.train("--checkpoint-seconds", str(seconds))
            done = None
            while done is None or done.returncode != 0:
                step = curve.next_step()
                fault = kill(chance, inject, among, 0.01, at=at, folder=str(curve.out)) if trial.strikes < KILLS else {}
                done = run(command, fault)
                assert done.returncode in STATUSES, done.stderr
                assert "starting from step 0" not in done.stderr
                said = continued_steps(done.stderr)
                # Who is killed early has said nothing yet.
                assert said == [step] * (step > 0) or (done.returncode and not said), (said, step)
                if done.returncode:
                    trial.struck(curve.out)
                if stopped := re.search(r"stopped by SIGTERM at step (\d+): rerun the command", done.stderr):
                    assert curve.next_step() == int(stopped[1])
            curve.assert_as_undisturbed()


def test_tokenization_that_is_killed_again_and_again_goes_on(
    ledger: Ledger, chance: random.Random, inject: Inject, corpus_json: str, tokens_folder: Path, tmp_path: Path
) -> None:
    # A corpus of a test's size has one batch otherwise, and nothing worth a commit.
    often = {"mup_moe.data.documents.BATCH_CHARACTERS": 2**13, "mup_moe.data.work.COMMIT_SECONDS": 0}
    with ledger.trial(SIGNALS, "while a corpus is tokenized", SAME_BYTES) as trial:
        while trial.strikes < KILLS:
            out = tmp_path / f"tokens{trial.strikes}"
            done = None
            while done is None or done.returncode != 0:
                # What has no owner any more was done, and on its way out.
                begun = committed(out) if (out / WORK / "owner.json").exists() else 0
                at = "file" if trial.strikes < KILLS else "never"
                fault = kill(chance, inject, (1, 150), 0.01, at=at, folder=str(out), set=often)
                done = run(tokenize_command(corpus_json, out), fault)
                assert done.returncode in STATUSES, done.stderr
                assert done.returncode or not begun or "continuing after" in done.stderr
                if done.returncode:
                    trial.struck(out)
                    assert committed(out) >= begun or (out / MANIFEST).exists()
            assert_same_files(out, tokens_folder)


def test_aggregation_that_is_killed_again_and_again_is_done_at_last(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve, tmp_path: Path
) -> None:
    finish(curve.within(curve.undisturbed).aggregate(tmp_path / "runs.csv"))
    curve = curve.within(shutil.copytree(curve.undisturbed, tmp_path / "out" / "cells"))
    table = tmp_path / "out" / "tables" / "runs.csv"
    with ledger.trial(SIGNALS, "while results are aggregated", SAME_BYTES) as trial:
        trial.keeps(curve.out)
        while trial.strikes < KILLS:
            shutil.rmtree(table.parent, ignore_errors=True)
            # So that there is something to restore, too, on the way.
            damage(chance, chance.choice(curve.cells) / chance.choice(["history.csv", "summary.json"]))
            done = None
            while done is None or done.returncode != 0:
                fault = kill(chance, inject, (1, 40), 0.001, at="file", folder=str(tmp_path / "out"))
                done = run(curve.aggregate(table), fault if trial.strikes < KILLS else {})
                assert done.returncode in STATUSES, done.stderr
                trial.strikes += done.returncode != 0
            assert table.read_bytes() == (tmp_path / "runs.csv").read_bytes()
            assert left_in(table.parent) == {"runs.csv"}
            curve.assert_as_undisturbed()


def test_a_process_that_waits_for_one_that_is_killed_goes_on_from_its_checkpoint(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    command = curve.train("--checkpoint-seconds", "0")
    with ledger.trial("two processes", "the same cells, the first one killed", GOES_ON) as trial:
        # Stopped rather than fast, so that the second is there in time.
        first = start(command, inject("SIGSTOP", number=chance.randint(20, 55)))
        wait_until(curve.next_step, first)
        second = start(command)
        assert second.stderr is not None
        assert "another process is working in" in second.stderr.readline()
        first.kill()
        assert end(first).returncode == -signal.SIGKILL
        trial.struck(curve.out)
        step = curve.next_step()
        done = end(second)
        assert done.returncode == 0, done.stderr
        assert continued_steps(done.stderr) == [step]
        assert step > 0
        curve.assert_as_undisturbed()


def test_two_processes_train_nothing_twice(ledger: Ledger, curve: Curve) -> None:
    with ledger.trial(
        "two processes", "the same cells, at once", "one waits for the other; no cell is trained twice"
    ) as trial:
        processes = [start(curve.train()) for _ in range(2)]
        said = [end(process) for process in processes]
        trial.strikes += 1
        assert [done.returncode for done in said] == [0, 0], said
        # Who trains shows how far it is.
        assert sorted("3 cells: " in done.stderr for done in said) == [False, True]
        curve.assert_as_undisturbed()
