"""The real Snakemake on cells that were not all made in the same way."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from conftest import TARGET, edit, smoke
from mup_moe.files import read_json
from mup_moe.ops.cell_folder import Result, keep_all, read_result

pytestmark = pytest.mark.workflow

TABLE = "results/figure1/runs.csv"
LOG = "results/logs/aggregate/figure1.log"


def rewrite(folder: Path, **changes: object) -> None:
    """Rewrites the result of a cell as if it had been made differently."""
    rows = [line.split(",") for line in (folder / "history.csv").read_text().splitlines()]
    result = Result(folder)
    keep_all({result: (rows, read_result(folder) | changes)})
    result.publish()


def log_lines(project: Path) -> list[str]:
    """Returns the lines of the log after the one that names its config."""
    config, *lines = (project / LOG).read_text().splitlines()
    assert config.startswith("config: ")
    return lines


def cells_of(project: Path, pattern: str) -> list[Path]:
    return sorted((project / "results/cells").glob(pattern))


def test_cells_of_another_config_are_named_or_left_out_as_the_user_chose(project):
    # Without Snakemake's records, nothing else shows that the rule was a different one.
    shutil.rmtree(project / ".snakemake")
    edit(project, "parametrizations.mup", {"like": "simplep", "router": [1, 1, "1/fan_in", 1]})
    foreign = {folder.name for folder in cells_of(project, "small_moe_mup_w*_e4_g1_*")}
    trained = {path: path.read_bytes() for path in project.glob("results/cells/*/summary.json")}
    for made in [*project.glob("results/figure1/*"), *project.glob("results/figure1.*")]:
        made.unlink()
    stopped = smoke(project, TARGET)
    assert stopped.returncode != 0
    assert f"{len(foreign)} made under another config" in stopped.stdout
    assert "Traceback" not in stopped.stdout
    edit(project, "analysis.foreign_cells", "leave_out")
    done = smoke(project, TARGET)
    assert done.returncode == 0, done.stdout
    assert {path: path.read_bytes() for path in trained} == trained
    reported = {line.removeprefix("left out ").partition(":")[0] for line in log_lines(project)}
    assert reported == foreign
    runs = pd.read_csv(project / TABLE)
    assert set(runs["parametrization"]) == {"sp"}
    optima = pd.read_csv(project / "results/figure1/optima.csv")
    assert optima.groupby("panel")["missing"].sum().to_dict() == {"mup": len(foreign), "sp": 0}
    assert (optima["diverged"] == 0).all()


def test_a_damaged_result_is_restored_and_one_trained_differently_is_not_mixed_in(project):
    runs = project / TABLE
    before = runs.read_bytes()
    first, *_, last = cells_of(project, "small_moe_*_w*_e4_g1_*")
    summary = (first / "summary.json").read_text()
    (first / "summary.json").write_text(summary.replace('"train_loss": ', '"train_loss": 1'))
    (first / "history.csv").write_text("step\n")
    runs.unlink()
    done = smoke(project, TABLE, "--rerun-triggers", "mtime")
    assert done.returncode == 0, done.stdout
    assert runs.read_bytes() == before
    assert "restored from its kept copy" in (project / LOG).read_text()
    assert read_json(first / "summary.json") == json.loads(summary)
    # A cell that was trained on other tokens than the existing ones is outnumbered by the rest.
    rewrite(last, tokens_digest="other")
    runs.unlink()
    stopped = smoke(project, TABLE, "--rerun-triggers", "mtime")
    assert stopped.returncode != 0
    assert f"1 trained on other tokens ({last.name})" in stopped.stdout
    # Do what the sentence asks for: everything is as before.
    shutil.rmtree(last)
    done = smoke(project, TABLE)
    assert done.returncode == 0, done.stdout
    new, old = (pd.read_csv(path).drop(columns="wall_seconds") for path in (runs, project / "results/runs.csv"))
    pd.testing.assert_frame_equal(new, old, check_exact=True)


def test_cells_of_another_device_and_torch_are_accepted_and_named_in_the_log(project):
    runs = project / TABLE
    before = pd.read_csv(runs)
    first, *_ = cells_of(project, "small_moe_*_w*_e4_g1_*")
    versions = read_result(first)["versions"] | {"python": "3.12.1", "torch": "2.11.0+cu126"}
    rewrite(first, device="cuda", versions=versions)
    runs.unlink()
    done = smoke(project, TABLE, "--rerun-triggers", "mtime")
    assert done.returncode == 0, done.stdout
    (reported,) = log_lines(project)
    assert f"1 on cuda with torch 2.11.0+cu126 ({first.name})" in reported
    assert f"{len(before) - 1} on cpu with torch " in reported
    mine = before["cell"] == first.name
    before.loc[mine, ["device", "torch"]] = ["cuda", "2.11.0+cu126"]
    pd.testing.assert_frame_equal(pd.read_csv(runs), before, check_exact=True)
