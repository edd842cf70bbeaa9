"""Files that are no longer what was written."""

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

from faults.commands import (
    assert_same_files,
    continued_steps,
    damage,
    finish,
    one_sentence,
    run,
    saved_steps,
    tokenize_command,
)
from faults.curve import Curve
from faults.ledger import ONE_SENTENCE, Ledger
from mup_moe.ops import checkpoint
from mup_moe.ops.checkpoint import CHECKPOINT, PREVIOUS, DamagedCheckpointError

DAMAGES = 2
# A flipped bit in the header can also make a checkpoint look like that of another run.
DAMAGED = r"is damaged \(.*\)|is from another (config, corpus or version|device or precision)"


def damage_checkpoint(chance: random.Random, path: Path) -> None:
    """Damages a checkpoint until it does not load; a flipped bit in white space means nothing."""
    whole = path.read_bytes()
    while True:
        damage(chance, path)
        try:
            checkpoint.load(path)
        except DamagedCheckpointError:
            return
        path.write_bytes(whole)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(
    ledger: Ledger, chance: random.Random, curve: Curve, interrupted: Path, tmp_path: Path
) -> None:
    with ledger.trial("damaged file", "a checkpoint", "resumes from the previous checkpoint and says so") as trial:
        for number in range(DAMAGES):
            curve = curve.within(shutil.copytree(interrupted, tmp_path / str(number)))
            path = chance.choice(curve.cells) / CHECKPOINT
            _, before = saved_steps(path.parent)
            damage_checkpoint(chance, path)
            trial.struck(curve.out)
            said = finish(curve.train())
            named = re.escape(f"/{path.parent.name}/{path.name}")
            assert re.search(rf"{named} ({DAMAGED}): resuming from step {before}\n", said), said
            assert continued_steps(said) == [before]
            curve.assert_as_undisturbed()


def test_two_damaged_checkpoints_restart_the_cell_from_step_0(
    ledger: Ledger, chance: random.Random, curve: Curve, interrupted: Path
) -> None:
    shutil.copytree(interrupted, curve.out)
    cell = chance.choice(curve.cells)
    last = saved_steps(cell)[0]
    expected = "that cell restarts from step 0 and says so; the others resume"
    with ledger.trial("damaged file", "both checkpoints of a cell", expected) as trial:
        for name in (CHECKPOINT, PREVIOUS):
            damage_checkpoint(chance, cell / name)
        trial.struck(curve.out)
        said = finish(curve.train())
        assert re.search(rf"/{re.escape(cell.name)}/\S+ ({DAMAGED}): starting from step 0\n", said), said
        assert continued_steps(said) == [last]
        curve.assert_as_undisturbed()


def test_damaged_tokens_are_refused(
    ledger: Ledger, chance: random.Random, curve: Curve, corpus_json: str, tokens_folder: Path, tmp_path: Path
) -> None:
    tokens = shutil.copytree(tokens_folder, tmp_path / "tokens")
    command = replace(curve, tokens=tokens).train()
    with ledger.trial("damaged file", "tokens", ONE_SENTENCE) as trial:
        path = tokens / chance.choice(["train.bin", "valid.bin"])
        damage(chance, path)
        trial.strikes += 1
        said = one_sentence(run(command))
        assert f"/tokens/{path.name} is damaged" in said
        assert "tokenize the corpus again" in said
        finish(tokenize_command(corpus_json, tokens))
        assert_same_files(tokens, tokens_folder)
        finish(command)
        curve.assert_as_undisturbed()


def test_a_damaged_result_is_restored_or_refused(
    ledger: Ledger, chance: random.Random, curve: Curve, tmp_path: Path
) -> None:
    shutil.copytree(curve.undisturbed, curve.out)
    cell, table = chance.choice(curve.cells), tmp_path / "runs.csv"
    names = ("history.csv", "summary.json")
    command = curve.aggregate(table)
    expected = "restores it from the kept copy and says so"
    with ledger.trial("damaged file", "a result", expected) as trial:
        finish(command)
        trial.must_keep(tmp_path)
        damage(chance, cell / chance.choice(names))
        trial.strikes += 1
        assert f"/{cell.name} was damaged" in finish(command)
        curve.assert_as_undisturbed()
    with ledger.trial(
        "damaged file", "a result and its kept copy", "stops with a one-sentence error; retraining gives the same bytes"
    ) as trial:
        finish(curve.within(curve.undisturbed).aggregate(table))
        for folder in (cell, cell / ".kept"):
            damage(chance, folder / chance.choice(names))
        trial.strikes += 1
        said = one_sentence(run(command))
        assert cell.name in said
        assert "delete their folders" in said
        shutil.rmtree(cell)
        trial.must_keep(curve.out)
        finish(curve.train())
        finish(command)
        curve.assert_as_undisturbed()
