"""What every command says of itself, and where packages are missing."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from mup_moe.__main__ import COMMANDS, main

FULL = Path("/dev/full")


def test_the_help_says_what_each_command_does(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {purpose}" in said for name, (purpose, _) in COMMANDS.items())


def test_a_missing_package_ends_in_one_sentence():
    # -S: without the packages of the environment.
    command = [sys.executable, "-S", "-m", "mup_moe", "status"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("mup-moe: the package `filelock` is missing")
    assert "make install" in sentence


def test_a_reader_who_has_seen_enough_is_no_error():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    for asked in (["--help"], ["status"], ["status", "--json"]):
        command = [sys.executable, "-m", "mup_moe", *asked]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        assert process.communicate(timeout=60)[1] == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("asked", ["--help", "status --json"])
def test_a_stream_that_is_closed_is_no_error(asked, closed):
    command = f"{shlex.quote(sys.executable)} -m mup_moe {asked}"
    done = subprocess.run(f"{command} {closed}", shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (not closed.startswith(">"))


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_a_full_disk_does_not_take_ends_in_one_sentence(unbuffered):
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "mup_moe", "status"]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        "mup-moe: the output cannot be written (No space left on device): free space, and run the same command again\n"
    )


def test_what_a_terminal_cannot_show_is_written_as_an_escape(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", shown)
    with pytest.raises(SystemExit):
        main(["--help"])
    print("é", file=shown, flush=True)
    assert shown.buffer.getvalue().endswith(b"\\xe9\n")
