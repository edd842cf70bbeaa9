"""environment.yml, pyproject.toml and the locks agree, and pages show what was recorded."""

import csv
import re
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mup_moe
from conftest import ROOT
from mup_moe.analysis.names import MINUS, estimated, panel_title
from mup_moe.analysis.verdicts import side_by_side

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if line]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


RUN = locked("requirements.lock")
DEV = locked("requirements-dev.lock")


# What a run needs: the dependencies of the library and those of the pipeline.
NEEDED = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["pipeline"]


@pytest.mark.parametrize("text", NEEDED + PROJECT["optional-dependencies"]["dev"])
def test_the_lock_holds_what_the_project_requires(text):
    requirement = Requirement(text)
    pins = RUN if text in NEEDED else RUN | DEV
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_requirements_of_a_run_are_not_locked_twice():
    assert not set(RUN) & set(DEV)


def test_every_import_is_declared():
    declared = {canonicalize_name(Requirement(text).name) for text in NEEDED}
    owners = metadata.packages_distributions()
    for path in (ROOT / "src").rglob("*.py"):
        for module in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M):
            distributions = {canonicalize_name(name) for name in owners.get(module, [])} - {"mup-moe"}
            if distributions and module != "mup_moe":
                assert distributions & (declared | {"pydantic-core"}), f"{path} imports {module}"


def test_conda_installs_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.partition("=")[2])
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    # The file lists them itself, since Snakemake's --sdm conda passes on no other file.
    assert pip == (ROOT / "requirements.lock").read_text().splitlines()


def test_the_tests_run_on_the_locked_versions():
    for name in ("torch", "snakemake", "numpy", "datasets", "tokenizers"):
        assert metadata.version(name).partition("+")[0] == RUN[name]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mup_moe.__version__
    heading = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert heading == f"## {mup_moe.__version__} ({citation['date-released']})"


def test_the_verdicts_of_all_recorded_sweeps_are_shown_side_by_side():
    recorded = {path.parent.name: path for path in sorted((ROOT / "results/recorded").glob("*/claims.csv"))}
    beyond = {"granularity": "granularity.md", "architectures": "results.md"}
    apart = {name: recorded.pop(name) for name in beyond}
    assert len(recorded) > 1
    assert side_by_side(recorded) in (ROOT / "docs/results.md").read_text()
    for name, page in beyond.items():
        assert side_by_side({name: apart[name]}) in (ROOT / "docs" / page).read_text()


def test_the_page_shows_the_architectures_as_they_were_recorded():
    page = (ROOT / "docs/results.md").read_text()
    with (ROOT / "results/recorded/architectures/claims/tests.csv").open() as file:
        tests = list(csv.DictReader(file))
    for name in dict.fromkeys(test["panel"] for test in tests):
        of_one = [test for test in tests if test["panel"] == name]
        cells = [panel_title(name)]
        for test in of_one:
            low, high = (estimated(float(test[key])) for key in ("low", "high"))
            cells.append(f"{estimated(float(test['estimate']))} [{low}, {high}]")
            cells += [f"{float(test['excess']):.3f}"] if test["excess"] else []
        assert len(of_one) == 3
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("comparison", ["figure6", "figure6-experts", "figure6-sparsity"])
def test_the_rules_side_by_side_are_shown_as_they_were_recorded(comparison):
    recorded = (ROOT / f"results/recorded/granularity/{comparison}/comparison.md").read_text()
    table = "".join(line for line in recorded.splitlines(keepends=True) if line.startswith("|"))
    assert table.count("\n") > 5
    assert table in (ROOT / "docs/granularity.md").read_text()


@pytest.mark.parametrize("sweep", ["default", "evening"])
def test_the_slopes_of_lemma_b1_are_shown_as_they_were_recorded(sweep):
    recorded = (ROOT / f"results/recorded/{sweep}/claims.md").read_text().splitlines()
    (row,) = (line for line in recorded if line.startswith("| **C7**"))
    shown = (ROOT / "docs/results.md").read_text().replace("**", "")
    for estimate in row.split(" | ")[2].replace("\N{NO-BREAK SPACE}", " ").split("<br>"):
        assert f"| {estimate} |" in shown


FORMS = {"drift": "+.2f", "excess": ".3f"}


def test_the_search_for_a_set_up_is_shown_as_it_was_recorded():
    shown = [line.strip("| ").split(" | ") for line in (ROOT / "docs/results.md").read_text().splitlines()]
    rows = {row[0].strip("`"): row[2:] for row in shown if row[0].startswith("`find-")}
    recorded = {path.parent.name: path for path in (ROOT / "results/recorded/power").glob("*/attribution.csv")}
    assert rows.keys() == recorded.keys()
    for figure, path in recorded.items():
        with path.open(encoding="utf-8") as file:
            panels = {row["panel"]: row for row in csv.DictReader(file)}
        rule, control = panels["mup"], panels["mup-without-experts"]
        expected = [f"{float(row[key]):{form}}" for row in (rule, control) for key, form in FORMS.items()]
        assert [number.replace(MINUS, "-") for number in rows[figure]] == expected, figure
