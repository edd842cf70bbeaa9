"""The recipes of docs/extending.md, run on the sweep in miniature as they are written there."""

import re

import pytest
import yaml
from PIL import Image

from conftest import ROOT, smoke

pytestmark = pytest.mark.workflow


def recipe(title: str) -> list[str]:
    """The blocks of code below a heading, in order."""
    section = (ROOT / "docs/extending.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)


def test_a_new_kind_of_figure_is_a_module_and_a_line_of_the_registry(project):
    module, line, config = recipe("A new kind of figure")
    (project / "src/mup_moe/figures/histories.py").write_text(module)
    registry = project / "src/mup_moe/figures/kinds.py"
    registry.write_text(registry.read_text().replace("KINDS = {\n", f"KINDS = {{\n{line}"))
    settings = yaml.safe_load((project / "smoke.yaml").read_text())
    settings["figures"] |= yaml.safe_load(config)["figures"]
    (project / "smoke.yaml").write_text(yaml.safe_dump(settings))
    before = {path: path.stat().st_mtime_ns for path in project.glob("results/cells/*/*")}
    done = smoke(project, "results/histories.pdf")
    assert done.returncode == 0, done.stdout
    assert (project / "results/histories.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(project / "results/histories.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    lines = {colour for colour in colours if max(colour) - min(colour) > 100}
    assert len(lines) >= 10  # of a line per cell; axes and labels are grey
    assert {path: path.stat().st_mtime_ns for path in project.glob("results/cells/*/*")} == before
    assert "train_" not in done.stdout
