"""What every command says of itself, and where packages are missing."""

import os
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
        assert process.communicate()[1] == ""
