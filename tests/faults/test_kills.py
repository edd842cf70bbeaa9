"""Processes that are killed repeatedly at random moments."""

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
    file_names_in,
    finish,
    run,
    start,
    tokenize_command,
)
from faults.curve import Curve
from faults.inject import Inject
from faults.ledger import RESUMES, SAME_BYTES, Ledger
from mup_moe.data.tokenize import WORK
from mup_moe.data.tokens import MANIFEST
from test_data import committed

KILLS = 5

SIGNALS = "SIGKILL or SIGTERM"
# A process that handles a signal exits with 128 + its number; otherwise the signal ends it.
STATUSES = {0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM}


def kill(
    chance: random.Random, inject: Inject, among: tuple[int, int], seconds: float, **settings: Any
) -> dict[str, str]:
    """Makes the environment of a kill at a random count within `among`, or up to `seconds` later."""
    after = chance.choice([0, chance.uniform(0, seconds)])
    return inject(chance.choice(SIGNALS.split(" or ")), number=chance.randint(*among), after=after, **settings)


# Seconds between checkpoints, what is counted, and the range of counts to kill at.
MOMENTS: dict[str, tuple[float, str, tuple[int, int]]] = {
    "while training": (0.02, "step", (1, 30)),
    "while checkpoints are written": (0, "file", (1, 300)),
    "while results are written": (1000, "file", (30, 115)),
}


@pytest.mark.parametrize("where", MOMENTS)
def test_training_resumes_however_often_it_is_killed(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve, tmp_path: Path, where: str
) -> None:
    seconds, at, among = MOMENTS[where]
    with ledger.trial(SIGNALS, where, RESUMES if seconds < 1 else SAME_BYTES) as trial:
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
                # A process that is killed early has not reported anything yet.
                assert said == [step] * (step > 0) or (done.returncode and not said), (said, step)
                if done.returncode:
                    trial.struck(curve.out)
                if stopped := re.search(r"stopped by SIGTERM at step (\d+): rerun the command", done.stderr):
                    assert curve.next_step() == int(stopped[1])
            curve.assert_as_undisturbed()


def test_tokenization_resumes_however_often_it_is_killed(
    ledger: Ledger, chance: random.Random, inject: Inject, corpus_json: str, tokens_folder: Path, tmp_path: Path
) -> None:
    # Otherwise a corpus of this size is one batch, and nothing is committed on the way.
    often = {"mup_moe.data.documents.BATCH_CHARACTERS": 2**13, "mup_moe.data.work.COMMIT_SECONDS": 0}
    with ledger.trial(SIGNALS, "while a corpus is tokenized", SAME_BYTES) as trial:
        while trial.strikes < KILLS:
            out = tmp_path / f"tokens{trial.strikes}"
            done = None
            while done is None or done.returncode != 0:
                # Work without an owner was finished and was being removed.
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


def test_aggregation_finishes_however_often_it_is_killed(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve, tmp_path: Path
) -> None:
    finish(curve.within(curve.undisturbed).aggregate(tmp_path / "runs.csv"))
    curve = curve.within(shutil.copytree(curve.undisturbed, tmp_path / "out" / "cells"))
    table = tmp_path / "out" / "tables" / "runs.csv"
    with ledger.trial(SIGNALS, "while results are aggregated", SAME_BYTES) as trial:
        trial.must_keep(curve.out)
        while trial.strikes < KILLS:
            shutil.rmtree(table.parent, ignore_errors=True)
            # So that aggregation also has something to restore.
            damage(chance, chance.choice(curve.cells) / chance.choice(["history.csv", "summary.json"]))
            done = None
            while done is None or done.returncode != 0:
                fault = kill(chance, inject, (1, 40), 0.001, at="file", folder=str(tmp_path / "out"))
                done = run(curve.aggregate(table), fault if trial.strikes < KILLS else {})
                assert done.returncode in STATUSES, done.stderr
                trial.strikes += done.returncode != 0
            assert table.read_bytes() == (tmp_path / "runs.csv").read_bytes()
            assert file_names_in(table.parent) == {"runs.csv"}
            curve.assert_as_undisturbed()


def test_a_process_that_waits_for_a_killed_one_resumes_from_its_checkpoint(
    ledger: Ledger, chance: random.Random, inject: Inject, curve: Curve
) -> None:
    command = curve.train("--checkpoint-seconds", "0")
    with ledger.trial("two processes", "on the same cells, the first one killed", RESUMES) as trial:
        # Stop the first process, so that the second one starts in time.
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
        "two processes", "on the same cells at once", "one waits for the other; no cell is trained twice"
    ) as trial:
        processes = [start(curve.train()) for _ in range(2)]
        said = [end(process) for process in processes]
        trial.strikes += 1
        assert [done.returncode for done in said] == [0, 0], said
        # Only the process that trains shows progress.
        assert sorted("3 cells: " in done.stderr for done in said) == [False, True]
        curve.assert_as_undisturbed()
