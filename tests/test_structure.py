"""The science imports nothing of the code that draws its results or operates its runs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGE = ROOT / "src" / "mup_moe"
# The only exceptions: results are read where they are kept.
EXCEPTIONS = {
    ("analysis/aggregate.py", "ops.cell_folder"),
    ("analysis/record.py", "ops.cell_folder"),
}


def imports_of(path: Path) -> Iterator[str]:
    """Yields the modules of this package that a module imports anywhere, such as "ops.device"."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                # What is imported from a package may be a module.
                inside = (PACKAGE / Path(*module.split(".")[1:])).is_dir()
                modules = [f"{module}.{alias.name}" for alias in names] if inside else [module]
            case _:
                continue
        yield from (module.removeprefix("mup_moe.") for module in modules if module.startswith("mup_moe."))


def modules(folder: str) -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / folder).rglob("*.py"))


def parts_imported_by(module: str) -> set[str]:
    """Returns the parts of the package (model, ops, files, ...) that a module imports, without the exceptions."""
    return {name.partition(".")[0] for name in imports_of(PACKAGE / module) if (module, name) not in EXCEPTIONS}


@pytest.mark.parametrize("module", modules("model"))
def test_the_model_imports_only_settings_and_the_parametrization(module):
    # `provenance` names the processor.
    assert parts_imported_by(module) <= {"config", "parametrization", "files", "model", "provenance"}


@pytest.mark.parametrize("module", modules("training"))
def test_training_imports_nothing_that_draws_or_operates_it(module):
    assert not parts_imported_by(module) & {"ops", "sweep", "options", "analysis", "figures", "tables"}


@pytest.mark.parametrize("module", modules("analysis"))
def test_the_analysis_imports_nothing_that_draws_or_operates_it(module):
    assert not parts_imported_by(module) & {"ops", "figures", "tables"}


@pytest.mark.parametrize("module", modules("library"))
def test_the_library_imports_nothing_of_the_pipeline(module):
    # The coordinate check fits and draws as the pipeline does.
    more = {"analysis", "figures"} if module == "library/check.py" else set()
    assert parts_imported_by(module) <= {"config", "parametrization", "files", "model", "library"} | more


@pytest.mark.parametrize("module", modules("config"))
def test_the_config_imports_only_the_parametrization_and_files(module):
    assert parts_imported_by(module) <= {"config", "parametrization", "files", "encoding"}


@pytest.mark.parametrize("module", modules("data"))
def test_the_data_imports_only_settings_and_files(module):
    assert parts_imported_by(module) <= {"data", "config", "files", "encoding", "provenance"}


def test_a_sweep_imports_nothing_that_runs_it():
    assert not parts_imported_by("sweep.py") & {"ops", "options", "analysis", "figures", "tables"}


def test_every_exception_is_used():
    assert {(module, name) for module, name in EXCEPTIONS if name in set(imports_of(PACKAGE / module))} == EXCEPTIONS


def test_the_names_of_the_tour_exist():
    tour = (ROOT / "docs/tour.md").read_text()
    found = re.findall(r"((?:`[A-Za-z_.]+`,? (?:and )?)+)(?: \()?in `(src/[\w/]+\.py)`", tour)
    assert len(found) >= 12
    for names, path in found:
        tree = ast.parse((ROOT / path).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert set(re.findall(r"\w+", names)) - {"and"} <= defined, path
    for path in re.findall(r"`((?:src|workflow|tests)/[\w/.]+)`", tour):
        assert (ROOT / path).exists(), path
