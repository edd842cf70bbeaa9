"""The commands as processes, struck by a fault or not, and what is asked of them."""

import json
import os
import random
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors

import conftest
from faults.ledger import finished_files
from mup_moe.ops.checkpoint import CHECKPOINT, PREVIOUS


def start(command: Sequence[str], environment: dict[str, str] | None = None, **how: Any) -> subprocess.Popen[str]:
    """A command as a process."""
    pipe: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **(environment or {})}, **pipe | how)


def end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What became of it."""
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(
    command: Sequence[str], environment: dict[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, whatever that is."""
    return end(start(command, environment, **how))


def finish(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Runs a command that is to succeed; returns what it says."""
    done = run(command, environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence that a command failed with."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("mup-moe: ")]
    return said


def tokenize_command(corpus_json: str, out: Path) -> list[str]:
    """Tokenizes a corpus."""
    return conftest.tokenize_command(json.loads(corpus_json), out)


def left_in(folder: Path) -> set[str]:
    """The names of all files under a folder."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


def assert_same_files(out: Path, expected: Path) -> None:
    """Two folders of tokens are the same, and no more files are left."""
    ours, theirs = (
        {path.name: content for path, content in finished_files(folder).items()} for folder in (out, expected)
    )
    assert ours == theirs
    assert left_in(out) == left_in(expected)


def damage(chance: random.Random, path: Path) -> None:
    """Flips a bit of a file, or cuts it short."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.3:
        del content[place:]
    else:
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def saved_steps(cell: Path) -> list[int]:
    """The steps of a cell's checkpoints, the latest first."""
    found = []
    for path in (cell / CHECKPOINT, cell / PREVIOUS):
        # It may become the one before at this moment.
        with suppress(FileNotFoundError), safetensors.safe_open(path, framework="np") as file:
            found.append(int(file.metadata()["step"]))
    return found


def continued_steps(errors: str) -> list[int]:
    """The steps that a process says to have gone on from."""
    return [int(step) for step in re.findall(r"continuing from step (\d+)", errors)]
