"""Disks that are full, and folders that cannot be written."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from faults.commands import (
    aggregate_command,
    assert_same_files,
    assert_same_results,
    finish,
    left_in,
    one_sentence,
    run,
    tokenize_command,
)
from faults.conftest import Inject, TrainCommand
from faults.ledger import ONE_SENTENCE, Ledger
from mup_moe.training.checkpoint import CHECKPOINT
from mup_moe.training.request import TrainingRequest

FULL = 2
DISK_BYTES = 8 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk: there is no mount")
    if done.returncode != 0:
        pytest.skip("a full disk: mounting a small one is not permitted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fills a disk but for so many bytes; returns the file to delete."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(max(0, free - leave)))
    return filler


def bytes_in(*folders: Path) -> int:
    """What a disk has to hold of these files."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_is_full_of_tokens(
    ledger: Ledger, chance: random.Random, corpus_json: str, tokens_folder: Path, disk: Path
) -> None:
    out = disk / "tokens"
    with ledger.trial("full disk", "while a corpus is tokenized", ONE_SENTENCE) as trial:
        for _ in range(FULL):
            # The work takes as much again, and the text.
            filler = fill(disk, chance.randrange(bytes_in(tokens_folder)))
            said = one_sentence(run(tokenize_command(corpus_json, out)))
            assert "No space left on device" in said
            assert "free space" in said
            trial.struck(out)
            filler.unlink()
        finish(tokenize_command(corpus_json, out))
        assert_same_files(out, tokens_folder)


def test_a_disk_that_is_full_of_cells(
    ledger: Ledger,
    chance: random.Random,
    curve: Sequence[TrainingRequest],
    train: TrainCommand,
    undisturbed: Path,
    interrupted: Path,
    disk: Path,
) -> None:
    out = disk / "cells"
    done, *others = (request.cell.id for request in curve)
    shutil.copytree(undisturbed / done, out / done)
    # Seconds between checkpoints, and no more room than for some of what is to be written: a generation is half of two.
    cases = {
        "checkpoints": ("0", bytes_in(*(interrupted / cell for cell in others)) // 2),
        "results": ("1000", bytes_in(*(undisturbed / cell for cell in others))),
    }
    for what, (seconds, size) in cases.items():
        with ledger.trial("full disk", f"while {what} are written", ONE_SENTENCE) as trial:
            command = train(out, "--checkpoint-seconds", seconds)
            filler = fill(disk, chance.randrange(size * 3 // 4))
            said = one_sentence(run(command))
            assert "No space left on device" in said
            assert "free space" in said
            trial.struck(out)
            filler.unlink()
            if what == "results":
                finish(command)
                assert_same_results(curve, out, undisturbed)


def test_a_disk_that_is_full_of_tables(
    ledger: Ledger, curve: Sequence[TrainingRequest], undisturbed: Path, disk: Path
) -> None:
    table = disk / "runs.csv"
    command = aggregate_command(curve, undisturbed, table)
    with ledger.trial("full disk", "while a table is written", ONE_SENTENCE) as trial:
        finish(command)
        filler = fill(disk, 0)
        assert "No space left on device" in one_sentence(run(command))
        trial.struck(disk)
        filler.unlink()
        finish(command)
        assert left_in(disk) == {"runs.csv"}


def test_folders_that_cannot_be_written(
    ledger: Ledger,
    curve: Sequence[TrainingRequest],
    train: TrainCommand,
    corpus_json: str,
    tokens_folder: Path,
    undisturbed: Path,
    bound: list[str],
    tmp_path: Path,
) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    done, unfinished = (out / request.cell.id for request in curve[:2])
    shutil.rmtree(unfinished)
    finish(aggregate_command(curve, undisturbed, out / "runs.csv"))
    commands: dict[str, list[str]] = {
        "train": train(out),
        "tokenize": tokenize_command(corpus_json, out / "tokens"),
        "aggregate": aggregate_command(curve, undisturbed, out / "runs.csv"),
    }
    with ledger.trial("read-only folder", "that of all results", ONE_SENTENCE) as trial:
        out.chmod(0o555)
        for command in commands.values():
            said = one_sentence(run([*bound, *command]))
            assert "Permission denied" in said
            assert "permit writing there" in said
            trial.struck(out)
        out.chmod(0o755)
        for command in commands.values():
            finish(command)
        assert_same_results(curve, out, undisturbed)
        assert_same_files(out / "tokens", tokens_folder)
        assert done.exists()


def test_folders_of_cells_that_cannot_be_written(
    ledger: Ledger,
    chance: random.Random,
    inject: Inject,
    curve: Sequence[TrainingRequest],
    train: TrainCommand,
    undisturbed: Path,
    interrupted: Path,
    bound: list[str],
    tmp_path: Path,
) -> None:
    def refused(out: Path, command: list[str], environment: dict[str, str] | None = None) -> None:
        said = one_sentence(run([*bound, *command], environment))
        assert "Permission denied" in said
        assert "permit writing there" in said
        for cell in out.iterdir():
            cell.chmod(0o755)

    with ledger.trial("read-only folder", "a cell's, from some step on", ONE_SENTENCE) as trial:
        out = tmp_path / "from some step on"
        # With no checkpoint, it is the result that cannot be written.
        command = train(out, "--checkpoint-seconds", chance.choice(["0", "1000"]))
        refused(out, command, inject("forbid_writing", number=chance.randint(10, 40), folder=str(out)))
        trial.struck(out)
        finish(train(out))
        assert_same_results(curve, out, undisturbed)
    with ledger.trial("read-only folder", "a cell's, after a kill", ONE_SENTENCE) as trial:
        out = shutil.copytree(interrupted, tmp_path / "after a kill")
        # As the kill leaves it between a checkpoint and the next, which was being written.
        for cell in out.iterdir():
            (cell / CHECKPOINT).rename(cell / f".{CHECKPOINT}.x.part")
            cell.chmod(0o555)
        refused(out, train(out))
        trial.struck(out)
        finish(train(out))
        assert_same_results(curve, out, undisturbed)
