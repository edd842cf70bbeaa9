"""environment.yml, pyproject.toml and the locks say the same."""

import re
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if line]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


RUN = locked("requirements.lock")
DEV = locked("requirements-dev.lock")


@pytest.mark.parametrize("text", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
def test_the_lock_holds_what_the_project_asks_for(text):
    requirement = Requirement(text)
    pins = RUN if text in PROJECT["dependencies"] else RUN | DEV
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_what_is_needed_to_run_is_not_locked_twice():
    assert not set(RUN) & set(DEV)


def test_every_import_is_declared():
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
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
    assert pip == ["-r requirements.lock"]


def test_the_tests_run_on_the_locked_versions():
    for name in ("torch", "snakemake", "numpy", "datasets", "tokenizers"):
        assert metadata.version(name).partition("+")[0] == RUN[name]


def test_the_readme_shows_the_recorded_claims():
    recorded = (ROOT / "results/recorded/default/claims.md").read_text().splitlines()
    table = [line for line in recorded if line.startswith("| **C") or line.startswith("| claim")]
    assert len(table) == 1 + 7
    assert set(table) <= set((ROOT / "README.md").read_text().splitlines())
