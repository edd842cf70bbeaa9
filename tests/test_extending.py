"""The recipes of docs/extending.md, run on the miniature sweep exactly as written."""

import csv
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import ROOT, code_blocks, smoke
from mup_moe.config.like import overlay

pytestmark = pytest.mark.workflow

CELLS = 2 * 2 * 3  # of figure1


def recipe(title: str) -> list[str]:
    """Returns the blocks of code below a heading, in order."""
    section = (ROOT / "docs/extending.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return code_blocks(section, r"\w+")


def insert(path: Path, before: str, text: str) -> None:
    """Inserts text before a line of a file."""
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, f"{text}{before}", 1))


def results(project: Path) -> dict[Path, int]:
    """Returns when each file of the cells was written."""
    return {path: path.stat().st_mtime_ns for path in project.glob("results/cells/*/*")}


def make(project: Path, target: str, config: str = "{}") -> list[Path]:
    """Makes a target with a config overlaid on the sweep's; returns the folders of new cells. Others stay untouched."""
    path = project / "smoke.yaml"
    path.write_text(yaml.safe_dump(overlay(yaml.safe_load(path.read_text()), yaml.safe_load(config))))
    before = results(project)
    done = smoke(project, target)
    assert done.returncode == 0, done.stdout
    assert (project / target).stat().st_size > 0
    after = results(project)
    assert {file: after[file] for file in before} == before
    return sorted({file.parent for file in after} - {file.parent for file in before})


def columns(cell: Path) -> list[str]:
    with (cell / "history.csv").open() as file:
        return next(csv.reader(file))


def test_another_parametrization_is_a_row_of_the_table(project):
    (config,) = recipe("Another parametrization")
    new = make(project, "results/mine.pdf", config)
    assert len(new) == CELLS // 2
    assert all("_mine_" in cell.name for cell in new)


def test_rules_side_by_side_are_entries_of_a_comparison(project):
    (config,) = recipe("Rules side by side")
    new = make(project, "results/mine.pdf", config)
    assert len(new) == 2 * 3 * 2  # granularities, learning rates and rows
    rules = (project / "results/mine/comparison.md").read_text()
    assert "half of the multiplier" in rules


def test_modern_blocks_are_settings(project):
    (config,) = recipe("Modern blocks")
    assert len(make(project, "results/modern.pdf", config)) == CELLS


def test_another_optimizer_takes_a_class_and_a_line_of_the_registry(project):
    module, line, config = recipe("Another optimizer")
    (project / "src/mup_moe/training/lion.py").write_text(module)
    registry = project / "src/mup_moe/config/optimizers.py"
    registry.write_text(registry.read_text().replace("OPTIMIZERS = {\n", f"OPTIMIZERS = {{\n{line}"))
    assert len(make(project, "results/lion.pdf", config)) == CELLS


def test_another_metric_takes_a_function_and_a_line(project):
    function, line = recipe("Another metric")
    metrics = project / "src/mup_moe/model/metrics.py"
    insert(metrics, "AUXILIARY_LOSSES: Mapping", f"{function}\n\n")
    observed = metrics.read_text().index("OBSERVED: Mapping")
    end = metrics.read_text().index("\n}\n", observed) + 1
    metrics.write_text(metrics.read_text()[:end] + line + metrics.read_text()[end:])
    # Existing cells stay as they are, and a new one has the column.
    assert make(project, "results/figure1.pdf") == []
    cell = "small_moe_mup_w16_e4_g1_lr0.003_s5"
    (new,) = make(project, f"results/cells/{cell}/summary.json")
    assert columns(new)[-1] == "router_entropy"
    before = next(path for path in project.glob("results/cells/*") if path.name != cell)
    assert columns(new)[:-1] == columns(before)


def test_a_new_kind_of_figure_takes_a_module_and_a_line_of_the_registry(project):
    module, line, config = recipe("A new kind of figure")
    (project / "src/mup_moe/figures/histories.py").write_text(module)
    registry = project / "src/mup_moe/config/kinds.py"
    registry.write_text(registry.read_text().replace("KINDS = {\n", f"KINDS = {{\n{line}"))
    assert make(project, "results/histories.pdf", config) == []
    assert (project / "results/histories.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(project / "results/histories.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(2**24)}
    lines = {color for color in colors if max(color) - min(color) > 100}
    assert len(lines) >= 10  # one line per cell; axes and labels are gray


def test_another_architecture_is_an_entry_of_the_config(project):
    (config,) = recipe("Another architecture")
    new = make(project, "results/mine.pdf", config)
    assert len(new) == CELLS
    assert all("_mine_" in cell.name for cell in new)
