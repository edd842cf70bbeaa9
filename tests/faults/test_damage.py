"""Files that are not what was written."""

import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from faults.commands import (
    aggregate_command,
    assert_same_files,
    assert_same_results,
    continued_steps,
    damage,
    finish,
    one_sentence,
    run,
    saved_steps,
    tokenize_command,
)
from faults.conftest import TrainCommand
from faults.ledger import ONE_SENTENCE, Ledger
from mup_moe.training import checkpoint
from mup_moe.training.checkpoint import CHECKPOINT, PREVIOUS, DamagedCheckpointError
from mup_moe.training.request import TrainingRequest

DAMAGES = 2
# A bit of its header can say so, too.
TOLD = r"is damaged \(.*\)|is of another config, corpus or version"


def damage_checkpoint(chance: random.Random, path: Path) -> None:
    """Damages a checkpoint for certain: some of its white space means nothing."""
    whole = path.read_bytes()
    while True:
        damage(chance, path)
        try:
            checkpoint.load(path)
        except DamagedCheckpointError:
            return
        path.write_bytes(whole)


def test_a_damaged_checkpoint_leaves_the_one_before(
    ledger: Ledger,
    chance: random.Random,
    curve: Sequence[TrainingRequest],
    train: TrainCommand,
    undisturbed: Path,
    interrupted: Path,
    tmp_path: Path,
) -> None:
    with ledger.trial("damaged file", "a checkpoint", "goes on from the one before, and says so") as trial:
        for number in range(DAMAGES):
            out = shutil.copytree(interrupted, tmp_path / str(number))
            path = out / chance.choice(curve).cell.id / CHECKPOINT
            _, before = saved_steps(path.parent)
            damage_checkpoint(chance, path)
            trial.struck(out)
            said = finish(train(out))
            assert re.search(rf"{re.escape(str(path))} ({TOLD}): going on from step {before}\n", said), said
            assert continued_steps(said) == [before]
            assert_same_results(curve, out, undisturbed)


def test_two_damaged_checkpoints_leave_the_beginning(
    ledger: Ledger,
    chance: random.Random,
    curve: Sequence[TrainingRequest],
    train: TrainCommand,
    undisturbed: Path,
    interrupted: Path,
    tmp_path: Path,
) -> None:
    out = shutil.copytree(interrupted, tmp_path / "cells")
    cell = out / chance.choice(curve).cell.id
    last = saved_steps(cell)[0]
    expected = "that cell starts from step 0, and says so; the others go on"
    with ledger.trial("damaged file", "both checkpoints of a cell", expected) as trial:
        for name in (CHECKPOINT, PREVIOUS):
            damage_checkpoint(chance, cell / name)
        trial.struck(out)
        said = finish(train(out))
        assert re.search(rf"{re.escape(str(cell))}/\S+ ({TOLD}): starting from step 0\n", said), said
        assert continued_steps(said) == [last]
        assert_same_results(curve, out, undisturbed)


def test_damaged_tokens_are_refused(
    ledger: Ledger,
    chance: random.Random,
    curve: Sequence[TrainingRequest],
    corpus_json: str,
    tokens_folder: Path,
    train: TrainCommand,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    tokens, out = shutil.copytree(tokens_folder, tmp_path / "tokens"), tmp_path / "cells"
    command = train(out, "--tokens", str(tokens))
    with ledger.trial("damaged file", "tokens", ONE_SENTENCE) as trial:
        path = tokens / chance.choice(["train.bin", "valid.bin"])
        damage(chance, path)
        trial.strikes += 1
        said = one_sentence(run(command))
        assert f"{path} is damaged" in said
        assert "tokenize the corpus again" in said
        finish(tokenize_command(corpus_json, tokens))
        assert_same_files(tokens, tokens_folder)
        finish(command)
        assert_same_results(curve, out, undisturbed)


def test_a_damaged_result_is_restored_or_refused(
    ledger: Ledger,
    chance: random.Random,
    curve: Sequence[TrainingRequest],
    train: TrainCommand,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    out, table = shutil.copytree(undisturbed, tmp_path / "cells"), tmp_path / "runs.csv"
    cell = out / chance.choice(curve).cell.id
    names = ("history.csv", "summary.json")
    command = aggregate_command(curve, out, table)
    expected = "restored from the kept copy, and says so"
    with ledger.trial("damaged file", "a result", expected) as trial:
        finish(command)
        trial.keeps(tmp_path)
        damage(chance, cell / chance.choice(names))
        trial.strikes += 1
        assert f"{cell} was damaged" in finish(command)
        assert_same_results(curve, out, undisturbed)
    with ledger.trial(
        "damaged file", "a result and its kept copy", "one sentence; trained again, the same bytes"
    ) as trial:
        finish(aggregate_command(curve, undisturbed, table))
        for folder in (cell, cell / ".kept"):
            damage(chance, folder / chance.choice(names))
        trial.strikes += 1
        said = one_sentence(run(command))
        assert cell.name in said
        assert "delete their folders" in said
        shutil.rmtree(cell)
        trial.keeps(out)
        finish(train(out))
        finish(command)
        assert_same_results(curve, out, undisturbed)
