"""Full disks and read-only folders."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.commands import (
    assert_same_files,
    file_names_in,
    finish,
    one_sentence,
    run,
    tokenize_command,
)
from faults.curve import Curve
from faults.inject import Inject
from faults.ledger import ONE_SENTENCE, Ledger
from mup_moe.ops.checkpoint import CHECKPOINT

FULL = 2
DISK_BYTES = 8 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk, mounted for one test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk: there is no `mount` command")
    if done.returncode != 0:
        pytest.skip("a full disk: mounting a small one is not permitted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fills a disk except for `leave` bytes; returns the file to delete."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(max(0, free - leave)))
    return filler


def bytes_in(*folders: Path) -> int:
    """Returns the total size of the files in these folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def test_tokenization_survives_a_full_disk(
    ledger: Ledger, chance: random.Random, corpus_json: str, tokens_folder: Path, disk: Path
) -> None:
    out = disk / "tokens"
    with ledger.trial("full disk", "while a corpus is tokenized", ONE_SENTENCE) as trial:
        for _ in range(FULL):
            # The work in progress takes as much space again, plus the text.
            filler = fill(disk, chance.randrange(bytes_in(tokens_folder)))
            said = one_sentence(run(tokenize_command(corpus_json, out)))
            assert "No space left on device" in said
            assert "free space" in said
            trial.struck(out)
            filler.unlink()
        finish(tokenize_command(corpus_json, out))
        assert_same_files(out, tokens_folder)


def test_training_survives_a_full_disk(
    ledger: Ledger, chance: random.Random, curve: Curve, interrupted: Path, disk: Path
) -> None:
    curve = curve.within(disk / "cells")
    done, *others = (cell.name for cell in curve.cells)
    shutil.copytree(curve.undisturbed / done, curve.out / done)
    # Seconds between checkpoints, and a bound on the free space, which must not hold all that is to be written. Each
    # cell has two checkpoints, so one generation of them takes half of the bytes.
    cases = {
        "checkpoints": ("0", bytes_in(*(interrupted / cell for cell in others)) // 2),
        "results": ("1000", bytes_in(*(curve.undisturbed / cell for cell in others))),
    }
    for what, (seconds, size) in cases.items():
        with ledger.trial("full disk", f"while {what} are written", ONE_SENTENCE) as trial:
            command = curve.train("--checkpoint-seconds", seconds)
            filler = fill(disk, chance.randrange(size * 3 // 4))
            said = one_sentence(run(command))
            assert "No space left on device" in said
            assert "free space" in said
            trial.struck(curve.out)
            filler.unlink()
            if what == "results":
                finish(command)
                curve.assert_as_undisturbed()


def test_aggregation_survives_a_full_disk(ledger: Ledger, curve: Curve, disk: Path) -> None:
    table = disk / "runs.csv"
    command = curve.within(curve.undisturbed).aggregate(table)
    with ledger.trial("full disk", "while a table is written", ONE_SENTENCE) as trial:
        finish(command)
        filler = fill(disk, 0)
        assert "No space left on device" in one_sentence(run(command))
        trial.struck(disk)
        filler.unlink()
        finish(command)
        assert file_names_in(disk) == {"runs.csv"}


def test_a_read_only_results_folder_stops_every_command_in_one_sentence(
    ledger: Ledger, curve: Curve, corpus_json: str, tokens_folder: Path, bound: list[str]
) -> None:
    shutil.copytree(curve.undisturbed, out := curve.out)
    done, unfinished, _ = curve.cells
    shutil.rmtree(unfinished)
    aggregate = curve.within(curve.undisturbed).aggregate(out / "runs.csv")
    finish(aggregate)
    commands = [curve.train(), tokenize_command(corpus_json, out / "tokens"), aggregate]
    with ledger.trial("read-only folder", "the folder of all results", ONE_SENTENCE) as trial:
        out.chmod(0o555)
        for command in commands:
            said = one_sentence(run([*bound, *command]))
            assert "Permission denied" in said
            assert "permit writing there" in said
            trial.struck(out)
        out.chmod(0o755)
        for command in commands:
            finish(command)
        curve.assert_as_undisturbed()
        assert_same_files(out / "tokens", tokens_folder)
        assert done.exists()


def test_a_read_only_cell_folder_stops_training_in_one_sentence(
    ledger: Ledger,
    chance: random.Random,
    inject: Inject,
    curve: Curve,
    interrupted: Path,
    bound: list[str],
    tmp_path: Path,
) -> None:
    def refused(curve: Curve, command: list[str], environment: dict[str, str] | None = None) -> None:
        said = one_sentence(run([*bound, *command], environment))
        assert "Permission denied" in said
        assert "permit writing there" in said
        for cell in curve.cells:
            cell.chmod(0o755)

    with ledger.trial("read-only folder", "a cell's folder, from some step on", ONE_SENTENCE) as trial:
        curve = curve.within(tmp_path / "from some step on")
        # If no checkpoint is due, it is the result that cannot be written.
        command = curve.train("--checkpoint-seconds", chance.choice(["0", "1000"]))
        refused(curve, command, inject("forbid_writing", number=chance.randint(10, 40), folder=str(curve.out)))
        trial.struck(curve.out)
        finish(curve.train())
        curve.assert_as_undisturbed()
    with ledger.trial("read-only folder", "a cell's folder, after a kill", ONE_SENTENCE) as trial:
        curve = curve.within(shutil.copytree(interrupted, tmp_path / "after a kill"))
        # The state after a kill while the next checkpoint is being written.
        for cell in curve.cells:
            (cell / CHECKPOINT).rename(cell / f".{CHECKPOINT}.x.part")
            cell.chmod(0o555)
        refused(curve, curve.train())
        trial.struck(curve.out)
        finish(curve.train())
        curve.assert_as_undisturbed()
