"""The README and docs/configuration.md as a newcomer follows them: their tables, snippets and commands."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import CONFIG, ROOT, code_blocks, copy_project, snakemake
from mup_moe.config.document import read_document
from mup_moe.config.like import overlay
from mup_moe.config.load import validate

README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/configuration.md")}
DEFAULT = ROOT / "results/recorded/default"


def table_rows(page: str, start: str) -> list[list[str]]:
    """The rows of a table whose first cell begins so, as cells."""
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {start}")]


def test_the_table_of_claims_is_the_recorded_one():
    with (DEFAULT / "claims.csv").open(encoding="utf-8") as file:
        claims = {row["claim"]: row for row in csv.DictReader(file)}
    with (DEFAULT / "claims/tests.csv").open(encoding="utf-8") as file:
        slopes = [test["verdict"] for test in csv.DictReader(file) if test["claim"] == "C7"]
    shown = {cells[0][2:4]: cells[1:] for cells in table_rows(README, "**C")}
    expected = {name: (row["estimate"].replace("; ", ", "), row["verdict"]) for name, row in claims.items()}
    authors, own = expected.pop("C5-authors"), expected.pop("C5-own")
    assert authors[1] == own[1]
    expected["C5"] = (f"{authors[0]} and {own[0]}", own[1])
    assert set(slopes) == {"replicated", "inconclusive"}
    expected["C7"] = (f"slopes: {slopes.count('replicated')} of {len(slopes)} tests pass", expected["C7"][1])
    assert shown.keys() == expected.keys()
    for name, (found, verdict) in expected.items():
        assert shown[name][1] == found, name
        assert re.match(rf"\*\*{verdict}\*\*", shown[name][2]), name
    blind = [name for name, row in claims.items() if "passes" in row["controls"]]
    assert blind == [name for name, cells in shown.items() if "a wrong router passes too" in cells[2]] == ["C3"]


def test_no_claim_is_said_to_be_open_that_was_refuted():
    verdicts = [row["verdict"] for row in csv.DictReader((DEFAULT / "claims.csv").open(encoding="utf-8"))]
    assert "No claim was refuted" in " ".join(README.split())
    assert "not replicated" not in verdicts


COLUMNS = (("embedding",), ("attention", "feed_forward", "expert_up", "expert_down"), ("router",), ("unembedding",))


@pytest.mark.parametrize(("title", "name"), [("SP", "sp"), ("simpleP", "simplep"), ("μP", "mup")])
def test_the_table_of_rules_is_that_of_the_config(title, name):
    (cells,) = table_rows(README, f"{title} | 1 ·")
    rule = CONFIG.rows[name]
    for shown, roles in zip(cells[1:], COLUMNS, strict=True):
        factors = [part.replace("1/n", "1/fan_in").strip("* ") for part in shown.split(" · ")]
        for role in roles:
            found = rule.rule(role)
            assert [str(found.init_variance), str(found.multiplier), str(found.lr)] == factors, role
            assert str(found.weight_decay) == "1"


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_configs_are_valid(page):
    examples = [yaml.safe_load(text) for text in code_blocks(PAGES[page], "yaml")]
    examples += [yaml.safe_load(text) for text in re.findall(r"`(figures: \{.*?\})`", PAGES[page])]
    assert len(examples) >= {"README.md": 1, "docs/configuration.md": 2}[page]
    document = read_document(ROOT / "config.yaml")
    for example in examples:
        validate(overlay(document, example))


def test_the_snippet_for_a_model_of_ones_own_prints_its_plan():
    (snippet,) = code_blocks(README, "python")
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "router" in done.stdout
    assert snippet.count("\n") < 15


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the `mine.yaml` of the README."""
    folder = copy_project(tmp_path_factory.mktemp("newcomer") / "checkout")
    (example,) = code_blocks(README, "yaml")
    (folder / "mine.yaml").write_text(example)
    return folder


COMMANDS = sorted(
    {
        line.split(" #")[0].strip()
        for page in PAGES.values()
        for text in [*code_blocks(page, "sh"), *re.findall(r"`(snakemake [^`]+)`", page)]
        for line in text.splitlines()
        if line.startswith("snakemake ") and "--report" not in line  # which needs results: tests/test_report.py
    }
)


@pytest.mark.workflow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_find_their_targets(command, checkout):
    done = snakemake(checkout, *shlex.split(command)[1:], "--dry-run")
    assert done.returncode == 0, done.stdout
