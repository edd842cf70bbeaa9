"""The help of every command, and the errors for unknown names and missing packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, lines_after_config
from mup_moe.__main__ import COMMANDS, GROUPS, main, parser_of

FULL = Path("/dev/full")


@pytest.mark.parametrize("asked", [[], ["--help"]])
def test_the_help_says_what_each_command_does(capsys, asked):
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [" ".join(line.split()) for line in lines]
    assert all(f"{name} {purpose}" in said for name, (purpose, *_) in COMMANDS.items())
    assert all(f"{group}:" in said for group in GROUPS)
    assert max(map(len, lines)) < 110


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_a_sentence_and_a_valid_example(capsys, name):
    purpose, _, example = COMMANDS[name]
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{purpose[1:]}." in said
    assert f"example: python -m mup_moe {name} {example}".strip() in said
    parser_of(name).parse_args(example.split())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["optina", "figure1"], "unknown command 'optina': did you mean optima?"),
        (["dance"], "unknown command 'dance': see --help"),
        (["optima", "figure11"], "`figures` has no 'figure11': did you mean figure1"),
        (["slopes", "lemma"], "`probes` has no 'lemma': did you mean lemma_b1?"),
        (["tokenize", "x"], "`corpora` has no 'x': choose from python"),
        (["status", "--figures", "figure22"], "`figures` has no 'figure22': did you mean figure2"),
        (["train", "small_moe_ntk_w32_e8_g1_lr2^-6_s0"], "config.yaml does not list 'ntk'"),
        (["train"], "no cell is named: give the ids of cells of one corpus"),
    ],
)
def test_an_unknown_name_ends_in_a_sentence_that_suggests_a_similar_one(capsys, monkeypatch, asked, said):
    monkeypatch.chdir(ROOT)
    assert main(asked) != 0
    (sentence,) = lines_after_config(capsys.readouterr().err)
    assert sentence.startswith("mup-moe: ")
    assert said in sentence


def test_a_missing_package_ends_in_one_sentence():
    # -S: without the packages of the environment.
    command = [sys.executable, "-S", "-m", "mup_moe", "status"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("mup-moe: the package `yaml` is missing")
    assert "make install" in sentence


def test_a_reader_that_closes_the_pipe_is_not_an_error():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    for asked in (["--help"], ["status"], ["status", "--json"]):
        command = [sys.executable, "-m", "mup_moe", *asked]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        assert process.communicate()[1] == ""
