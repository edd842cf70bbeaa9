"""Sweeps with more cells, and configs with more text, than a command line or a process can take."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from conftest import TARGET, edit, smoke, write_result
from mup_moe.config.cell import Cell
from mup_moe.config.document import read_document
from mup_moe.config.like import overlay
from mup_moe.config.load import validate
from mup_moe.config.settings import Config
from mup_moe.files import read_json
from mup_moe.ops.cell_folder import SUMMARY
from mup_moe.parametrization import parse_table
from mup_moe.training.request import TrainingRequest

pytestmark = pytest.mark.workflow

# The kernel's limit on one argument, MAX_ARG_STRLEN.
LONGEST = 128 * 2**10
RATES, SEEDS = ["2^-8", "2^-6", "2^-4"], 560


def config_of(project: Path) -> Config:
    return validate(overlay(read_document(project / "config.yaml"), read_document(project / "smoke.yaml")))


def one_long_curve(project: Path) -> None:
    """Gives figure1 one curve of many cells, and the other figures none of these cells."""
    for figure in yaml.safe_load((project / "config.yaml").read_text())["figures"]:
        edit(project, f"figures.{figure}.axes.seed", [0])
    axes = {"parametrization": ["mup"], "width": [8], "experts": [4], "learning_rate": RATES}
    edit(project, "figures.figure1.axes", axes | {"seed": list(range(SEEDS))})


def fabricate(project: Path) -> list[Cell]:
    """Writes results for all cells of figure1, copied from seed 0 except for the losses."""
    config = config_of(project)
    setup, rules = config.setups["small"], parse_table(config.parametrizations)["mup"]
    folder = project / "results/cells"
    cells = config.figures["figure1"].cells()
    for cell in cells:
        if not (folder / cell.id).exists():
            summary: dict[str, Any] = read_json(folder / replace(cell, seed=0).id / SUMMARY)
            request = TrainingRequest(cell, setup.model, setup.training, rules)
            own = {"id": cell.id, "cell": summary["cell"] | {"seed": cell.seed}, "request": request.digest}
            own["fingerprint"] = request.fingerprint(summary["tokens_digest"])
            losses = {name: summary[name] + 1e-4 * cell.seed for name in ("train_loss", "valid_loss")}
            write_result(folder / cell.id, summary | own | losses)
    return cells


def test_a_figure_with_more_cells_than_a_command_line_holds_is_made(project):
    one_long_curve(project)
    cells = fabricate(project)
    assert sum(len(cell.id) for cell in cells) + 16 * len(cells) > LONGEST / 2
    (project / TARGET).unlink()
    done = smoke(project, TARGET)
    assert done.returncode == 0, done.stdout
    assert "train_" not in done.stdout
    runs = pd.read_csv(project / "results/figure1/runs.csv")
    assert list(runs["cell"]) == [cell.id for cell in cells]
    optima = pd.read_csv(project / "results/figure1/optima.csv")
    assert list(optima["seeds"]) == [SEEDS]
    assert (project / TARGET).exists()


def commands_in(output: str) -> dict[str, str]:
    """Returns the shell commands that a dry run prints, by rule."""
    found = re.findall(
        r"rule (\S+):\n(?:    .*\n)*?(?:Shell command|    shell): *(.*(?:\n.*)*?)(?=\n\[|\nJob stats|\n\n)", output
    )
    return dict(found)


def test_no_command_takes_a_long_value_as_an_argument(project):
    one_long_curve(project)
    edit(project, "parametrizations", {f"mine-{n}": {"like": "mup"} for n in range(1500)})
    edit(project, "corpora.smoke.files", ["smoke.txt"] * 12_000)
    for figure in ("figure1", "figure2a"):
        edit(project, f"figures.{figure}.axes.seed", list(range(SEEDS)))
    claim = yaml.safe_load((project / "config.yaml").read_text())["claims"]["table"]["C7"]
    edit(project, "claims.table", {f"D{n}": claim | {"says": "long " * 800} for n in range(40)})
    done = smoke(project, "results/paper", "--dry-run", "--printshellcmds", "--forceall")
    assert done.returncode == 0, done.stdout[-2000:]
    commands = commands_in(done.stdout)
    kinds = {rule.partition("_small")[0].partition("_medium")[0].partition("_probe_")[0] for rule in commands}
    assert {"tokenize", "train", "aggregate", "optima", "figure", "plan", "claims", "probe"} <= kinds
    lengths = {}
    for rule, command in commands.items():
        words = shlex.split(command)
        passed = [
            word
            for before, word in zip(["", *words], words, strict=False)
            # The shell itself passes these on.
            if before != "<<<" and words[words.index(word) - 2 : words.index(word)] != ["printf", "%s"]
        ]
        lengths[rule] = (max(map(len, passed)), len(command))
    assert max(longest for longest, _ in lengths.values()) < LONGEST / 4, lengths
    # The shell gets a whole command as one argument.
    commands_of_names = {rule: length for rule, (_, length) in lengths.items() if rule not in ("figure", "composition")}
    assert max(commands_of_names.values()) < LONGEST, lengths
