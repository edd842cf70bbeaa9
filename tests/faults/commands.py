"""Runs the commands as processes, with or without a fault, and checks what they leave behind."""

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
    """Starts a command as a process."""
    pipe: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **(environment or {})}, **pipe | how)


def end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits for a process to end; returns its status and output."""
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(
    command: Sequence[str], environment: dict[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, whether it succeeds or not."""
    return end(start(command, environment, **how))


def finish(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Runs a command that must succeed; returns its stderr."""
    done = run(command, environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the error of a command that must fail in one sentence."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("mup-moe: ")]
    return said


def tokenize_command(corpus_json: str, out: Path) -> list[str]:
    """Returns the command that tokenizes a corpus."""
    return conftest.tokenize_command(json.loads(corpus_json), out)


def file_names_in(folder: Path) -> set[str]:
    """Returns the names of all files under a folder."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


def assert_same_files(out: Path, expected: Path) -> None:
    """Asserts that two folders of tokens have the same finished files and no other file names."""
    ours, theirs = (
        {path.name: content for path, content in finished_files(folder).items()} for folder in (out, expected)
    )
    assert ours == theirs
    assert file_names_in(out) == file_names_in(expected)


def damage(chance: random.Random, path: Path) -> None:
    """Flips a bit of a file or truncates it."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.3:
        del content[place:]
    else:
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def saved_steps(cell: Path) -> list[int]:
    """Returns the steps of a cell's checkpoints, latest first."""
    found = []
    for path in (cell / CHECKPOINT, cell / PREVIOUS):
        # A running process may rename the checkpoint at this moment.
        with suppress(FileNotFoundError), safetensors.safe_open(path, framework="np") as file:
            found.append(int(file.metadata()["step"]))
    return found


def continued_steps(errors: str) -> list[int]:
    """Returns the steps from which a process reports that it continues."""
    return [int(step) for step in re.findall(r"continuing from step (\d+)", errors)]
