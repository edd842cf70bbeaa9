"""docs/your-model.md as a newcomer follows it: every command and snippet, with the package installed by pip."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from conftest import CONFIG, ROOT, code_blocks, make_project
from mup_moe.config.like import overlay

pytestmark = pytest.mark.workflow

PAGE = (ROOT / "docs/your-model.md").read_text()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with an environment that finds the package only because the page's command installed it."""
    folder = make_project(tmp_path_factory.mktemp("newcomer") / "checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    venv.create(folder / "env", with_pip=True)
    site = next((folder / "env/lib").glob("python*/site-packages"))
    # The setuptools of Python 3.11 is too old for pyproject.toml; the dependencies are those of the tests.
    for path in site.glob("setuptools*"):
        shutil.rmtree(path)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    quiet = {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(folder, code_blocks(PAGE, "sh")[0], **quiet)
    assert (site / "mup_moe/defaults.yaml").read_text() == (ROOT / "config.yaml").read_text()
    return folder


def run(folder: Path, command: str, **variables: str) -> str:
    """Runs a command of the page; returns its output."""
    unset = ("PYTHONPATH", "PYTHONHOME")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | variables
    environment["PATH"] = f"{folder / 'env/bin'}:{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def said(checkout: Path) -> str:
    """The output of the snippets, run one after the other."""
    (checkout / "page.py").write_text("\n".join(code_blocks(PAGE, "python")) + "\nprint(mup_moe.__file__)\n")
    return run(checkout, "python page.py")


def test_the_snippets_run_with_the_installed_package(said, checkout):
    assert "router" in said
    assert "slopes over widths after 5 steps" in said
    assert (checkout / "check.png").exists()
    assert Path(said.splitlines()[-1]).is_relative_to(checkout / "env")


def test_the_plan_of_a_hub_model_is_printed(said, checkout):
    command = code_blocks(PAGE, "sh")[1]
    assert said
    assert "ParamGroupConfig" in run(checkout, command)
    for form in re.findall(r"`--as (\w+)`", PAGE):
        assert run(checkout, re.sub(r"--as \w+", f"--as {form}", command))


SMALL = """
setups:
  architectures:
    corpus: smoke
    model: {sequence: 8}
    training: {steps: 4, batch_size: 2, warmup_steps: 1, final_loss_steps: 2, validation_batches: 1}
"""


def test_the_sweep_of_mixtral_and_of_ones_own_architecture_is_one_command(checkout):
    (mine,) = code_blocks(PAGE, "yaml")
    corpora = {"corpora": yaml.safe_load((checkout / "smoke.yaml").read_text())["corpora"]}
    small = overlay(corpora, *map(yaml.safe_load, (SMALL, mine)))
    (checkout / "mine.yaml").write_text(yaml.safe_dump(small))
    run(checkout, code_blocks(PAGE, "sh")[2])
    assert (checkout / "results/mine.pdf").read_bytes().startswith(b"%PDF")
    trained = {path.name.split("_")[1] for path in (checkout / "results/cells").iterdir()}
    assert trained == {"mixtral", "mine"}


def test_the_other_commands_of_the_page_find_their_targets(checkout):
    commands = re.findall(r"`(snakemake [^`]+)`", PAGE)
    assert commands
    for command in commands:
        assert "train_architectures_deepseek-v3_mup" in run(checkout, f"{command} --dry-run")


def test_the_page_names_all_role_tables_in_at_most_120_lines():
    section = PAGE.split("\n## Roles\n")[1].split("```")[0]
    assert set(re.findall("`([a-z0-9-]+)`", section)) >= set(CONFIG.roles)
    assert PAGE.count("\n") <= 120
    assert len(code_blocks(PAGE, "sh")) == 3
