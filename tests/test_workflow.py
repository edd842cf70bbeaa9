"""The real Snakemake on a miniature sweep."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from conftest import ROOT, SMOKE, TARGET, edit, make_project, smoke, wait_until
from faults.inject import injector

pytestmark = pytest.mark.workflow

CELLS = 2 * 2 * 3
CURVES = 2 * 2  # each a job


def start(project: Path, fault: dict[str, str], output: Any = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """Starts Snakemake in its own process group, so that it can be killed; one of its jobs gets the fault."""
    command, world = [sys.executable, "-m", "snakemake", *SMOKE, TARGET], os.environ | fault
    return subprocess.Popen(
        command, cwd=project, env=world, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def planned(project: Path, *targets: str) -> dict[str, int]:
    """Returns the number of jobs of a dry run, by kind."""
    done = smoke(project, *(targets or (TARGET,)), "--dry-run")
    output = done.stdout
    assert done.returncode == 0, output
    stats = re.search(r"Job stats:\njob +count\n[- ]+\n(.*?)\ntotal", output, re.S)
    counts: dict[str, int] = {}
    for name, count in map(str.split, stats[1].splitlines()) if stats else ():
        kind = name.partition("_")[0]  # a training job is named after its cells
        counts[kind] = counts.get(kind, 0) + int(count)
    return counts


def results(project: Path) -> tuple[pd.DataFrame, str]:
    runs = pd.read_csv(project / "results/runs.csv").drop(columns="wall_seconds")
    return runs, (project / "results/optima.csv").read_text()


def test_one_target_makes_everything_that_users_read(finished):
    runs = pd.read_csv(finished / "results/runs.csv")
    wanted = (
        "parametrization width learning_rate granularity experts seed status"
        " train_loss valid_loss steps tokens wall_seconds"
    )
    assert set(wanted.split()) <= set(runs.columns)
    assert len(runs) == CELLS
    assert set(runs["status"]) == {"finished"}
    optima = pd.read_csv(finished / "results/optima.csv")
    wanted = (
        "figure panel parametrization axis value log2_lr log2_lr_low log2_lr_high"
        " best_loss regret drift drift_low drift_high"
    )
    assert set(wanted.split()) <= set(optima.columns)
    assert len(optima) == 2 * 2
    for name in ("figure1.pdf", "figure1.png", "table1.csv", "table1.md", "table1.tex"):
        assert (finished / "results" / name).stat().st_size > 0
    base = runs[runs["width"] == 8].pivot(index="learning_rate", columns="parametrization", values="train_loss")
    assert (base["sp"] == base["mup"]).all()
    for cell in runs["cell"]:
        assert {p.name for p in (finished / "results/cells" / cell).iterdir()} >= {"history.csv", "summary.json"}
        curve = re.sub(r"_lr.*", "", cell)
        assert (finished / f"results/logs/train/{curve}.log").exists()
        assert (finished / f"results/benchmarks/train/{curve}.tsv").exists()


def test_a_second_run_has_nothing_to_do(project):
    assert planned(project) == {}


def test_a_new_learning_rate_trains_only_that_learning_rate(project):
    edit(project, "figures.figure1.axes.learning_rate", ["2^-8", "2^-7", "2^-6", "2^-4"])
    before = {path: path.read_bytes() for path in project.glob("results/cells/*/.kept/summary.json")}
    assert planned(project) == {"train": CURVES, "aggregate": 1, "optima": 1, "figure": 1}
    done = smoke(project, TARGET)
    assert done.returncode == 0, done.stdout
    after = {path: path.read_bytes() for path in project.glob("results/cells/*/.kept/summary.json")}
    assert len(after) == CELLS + CURVES
    assert {path: after[path] for path in before} == before


def test_a_removed_learning_rate_trains_nothing(project):
    edit(project, "figures.figure1.axes.learning_rate", ["2^-8", "2^-6"])
    assert planned(project) == {"aggregate": 1, "optima": 1, "figure": 1}


def test_other_steps_retrain_every_cell(project):
    edit(project, "setups.small.training.steps", 21)
    assert planned(project)["train"] == CURVES


def test_another_rule_for_mup_retrains_only_mup(project):
    edit(project, "parametrizations.mup", {"like": "simplep", "router": [1, 1, "1/fan_in", 1]})
    assert planned(project) == {"train": CURVES // 2, "table1": 1, "aggregate": 1, "optima": 1, "figure": 1}


def test_a_users_own_row_trains_only_that_row(project):
    edit(project, "parametrizations.mine", {"like": "mup", "router": ["1/fan_in", "1/sqrt(fan_in)", "1", "1"]})
    edit(project, "figures.figure1.axes.parametrization", ["sp", "mup", "mine"])
    assert planned(project)["train"] == CURVES // 2


def test_the_analysis_of_a_figure_retrains_nothing(project):
    edit(project, "analysis.fit_points", 3)
    assert planned(project) == {"optima": 1, "figure": 1}
    edit(project, "analysis.foreign_cells", "leave_out")
    assert planned(project) == {"aggregate": 1, "optima": 1, "figure": 1}


def test_execution_settings_retrain_nothing(project):
    edit(project, "execution.checkpoint_seconds", 5.0)
    edit(project, "execution.replicas", 2)
    assert planned(project) == {}


@pytest.mark.parametrize("axes", [[], ["seed"], ["learning_rate", "parametrization"]])
def test_finished_cells_can_be_regrouped_into_other_jobs(project, axes):
    edit(project, "execution.lockstep", axes)
    retrained = planned(project).get("train", 0)
    # A job that parametrizations share depends on the rows of all of them. At width 16, other figures have cells
    # of only one of them, so they do not share a job there.
    assert retrained == (1 if "parametrization" in axes else 0)
    edit(project, "figures.figure1.axes.learning_rate", ["2^-8", "2^-7", "2^-6"])
    (project / "results/figure1/runs.csv").unlink()
    done = smoke(project, "results/figure1/runs.csv")
    assert done.returncode == 0, done.stdout


def test_jobs_of_single_cells_give_the_same_results(tmp_path):
    project = make_project(tmp_path / "project")
    edit(project, "execution.lockstep", [])
    edit(project, "setups.small.training.precision", "float32")
    together = make_project(tmp_path / "together")
    edit(together, "setups.small.training.precision", "float32")
    for folder in (project, together):
        done = smoke(folder, TARGET)
        assert done.returncode == 0, done.stdout
    assert len(list(project.glob("results/logs/train/*.log"))) == CELLS
    assert len(list(together.glob("results/logs/train/*.log"))) == CURVES
    (alone, _), (stacked, _) = results(project), results(together)
    pd.testing.assert_frame_equal(alone, stacked, rtol=1e-4)
    optima = [pd.read_csv(folder / "results/optima.csv") for folder in (project, together)]
    pd.testing.assert_frame_equal(*optima, rtol=1e-2, atol=1e-3)


def test_editing_the_text_tokenizes_it_again_and_retrains(project):
    with (project / "smoke.txt").open("a") as file:
        file.write("\n\nomega " * 50)
    assert planned(project)["tokenize"] == 1
    assert planned(project)["train"] == CURVES


def test_a_raised_version_retrains_and_no_other_edit_of_the_code_does(project):
    package = project / "src/mup_moe"
    for path, before, after in (
        ("model/moe.py", "y_MD", "outputs_MD"),
        ("training/optimizer.py", "def schedule", "UNUSED = 1\n\n\ndef schedule"),
        ("data/documents.py", "room", "space"),
    ):
        text = (package / path).read_text()
        assert before in text
        (package / path).write_text(text.replace(before, after))
    assert planned(project) == {}
    version = package / "training/version.py"
    version.write_text(version.read_text().replace("VERSION = 1\n", "VERSION = 2\n"))
    assert planned(project)["train"] == CURVES


def test_imported_cells_without_snakemakes_records_are_kept(project):
    shutil.rmtree(project / ".snakemake")
    for path in (project / "src").rglob("*.py"):
        os.utime(path)
    assert "train" not in planned(project)


def test_any_cell_is_a_target_whether_in_a_figure_or_not(project):
    cell = "small_moe_experts-only_w24_e4_g2_lr0.003_s5"
    done = smoke(project, f"results/cells/{cell}/summary.json")
    assert done.returncode == 0, done.stdout
    assert (project / f"results/cells/{cell}/history.csv").exists()


def test_a_deleted_cell_is_trained_again_as_a_target_and_its_figure_follows(project):
    cell = next((project / "results/cells").iterdir())
    shutil.rmtree(cell)
    summary = f"results/cells/{cell.name}/summary.json"
    assert planned(project, summary) == {"train": 1}
    done = smoke(project, summary)
    assert done.returncode == 0, done.stdout
    assert (cell / "tries.jsonl").exists()
    assert {"aggregate", "figure"} <= planned(project).keys()
    assert "train" not in planned(project)


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("small_moe_ntk_w8_e4_g1_lr2^-6_s0", "'ntk'"),
        ("big_moe_mup_w8_e4_g1_lr2^-6_s0", "'big'"),
        ("small_moe_mup_w9_e4_g1_lr2^-6_s0", "not divisible"),
        ("small_moe_mup_w8_e4_g1_lr0.5_s0", "the id of that cell is"),
    ],
)
def test_a_cell_that_cannot_be_built_is_refused(finished, cell, sentence):
    done = smoke(finished, f"results/cells/{cell}/summary.json", "--dry-run")
    assert done.returncode != 0
    assert sentence in done.stdout


def test_a_bad_config_is_refused_in_one_sentence_before_anything_runs(project):
    edit(project, "setups.small.model.heads", 3)
    done = smoke(project, TARGET)
    assert done.returncode != 0
    assert "`width` 8 is not divisible by `heads` 3" in done.stdout
    assert "Traceback" not in done.stdout
    edit(project, "setups.small.model.heads", 2)
    assert planned(project) == {}


def test_missing_text_is_named(project):
    edit(project, "corpora.smoke.files", ["nothing-*.txt"])
    done = smoke(project, TARGET)
    assert done.returncode != 0
    assert "nothing-*.txt" in done.stdout
    assert "Traceback" not in done.stdout


def test_skipped_records_of_a_corpus_are_reported_on_the_console_in_the_log_and_by_status(tmp_path):
    project = make_project(tmp_path / "project")
    lines = [json.dumps({"text" if i % 4 else "content": f"record {i}"}) for i in range(400)]
    (project / "smoke.jsonl").write_text("\n".join(lines))
    edit(project, "corpora.smoke.files", ["smoke.jsonl"])
    said = "100 of 400 records had no `text` and were skipped"
    done = smoke(project, "results/data/smoke/manifest.json")
    assert done.returncode == 0, done.stdout
    # The job reports it; on a cluster, where jobs have other consoles, Snakemake reports it at the end.
    assert [line for line in done.stdout.splitlines() if said in line] == [f"corpus smoke: {said}"]
    assert f"corpus smoke: {said}" in (project / "results/logs/tokenize/smoke.log").read_text().splitlines()
    asked = subprocess.run(
        [sys.executable, "-m", "mup_moe", "status", "--config", "config.yaml", "smoke.yaml"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": "src"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"corpus smoke: tokenized: {said}\n" in asked.stdout
    assert said not in smoke(project, "results/data/smoke/manifest.json").stdout


def test_a_failed_job_says_why_and_the_same_command_resumes(project):
    edit(project, "setups.small.training.steps", 21)
    tokens = project / "results/data/smoke/train.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = smoke(project, TARGET)
    assert done.returncode != 0
    assert "mup-moe: results/data/smoke/train.bin is damaged" in done.stdout
    tokens.write_bytes(whole)
    assert smoke(project, TARGET).returncode == 0


def test_regenerated_tokens_with_the_same_bytes_retrain_nothing(project):
    runs = (project / "results/runs.csv").read_bytes()
    os.utime(project / "smoke.txt")
    done = smoke(project, TARGET, "--forcerun", "tokenize")
    assert done.returncode == 0, done.stdout
    assert (project / "results/runs.csv").read_bytes() == runs


def test_cells_of_another_config_are_refused_without_snakemakes_records(project):
    shutil.rmtree(project / ".snakemake")
    edit(project, "setups.small.training.steps", 21)
    (project / "results/figure1/runs.csv").unlink()
    done = smoke(project, "results/figure1/runs.csv")
    assert done.returncode != 0
    assert f"{CELLS} made under another config" in done.stdout


def test_finished_figures_are_collected_next_to_failed_and_outdated_ones(project):
    # A figure of an earlier version, and one that cannot be made.
    (project / "results/figure3").mkdir()
    (project / "results/figure3/runs.csv").write_text("cell,loss\nx,1\n")
    (project / "results/figure3/optima.csv").write_text("figure,drift\nfigure3,0\n")
    tokens = project / "results/data/smoke/train.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for table in ("runs.csv", "optima.csv"):
        (project / "results" / table).unlink()
    done = smoke(project, TARGET, "results/figure2a/runs.csv")
    assert done.returncode == 1
    assert "UserError" not in done.stdout, done.stdout
    for table in ("runs.csv", "optima.csv"):
        assert (project / "results" / table).read_bytes() == (project / "results/figure1" / table).read_bytes()
    tokens.write_bytes(whole)
    assert smoke(project, "results/figure2a/runs.csv").returncode == 0
    assert len(pd.read_csv(project / "results/runs.csv")) > len(pd.read_csv(project / "results/figure1/runs.csv"))


def record(project, *over, figures=(), probes=()):
    alone = ["--figures", *figures] if figures else []
    alone += ["--probes", *probes] if probes else []
    return subprocess.run(
        [sys.executable, "-m", "mup_moe", "record", "smoke", "--config", "config.yaml", "smoke.yaml", *over, *alone],
        cwd=project,
        env=os.environ | {"PYTHONPATH": "src"},
        check=False,
        capture_output=True,
        text=True,
    )


def test_results_are_recorded_with_their_provenance(project):
    assert smoke(project, "results/paper").returncode == 0
    assert record(project).returncode == 0
    folder = project / "results/recorded/smoke"
    names = {"runs.csv", "optima.csv", "figure1.pdf", "figure1.png", "figure2.png", "claims.md", "claims/tests.csv"}
    names |= {"table1.csv", "table2.md", "plan.csv", "lemma_b1.csv", "lemma_b1/values.csv.gz", "lemma_b1/values.json"}
    names |= {"config.yaml", "smoke.yaml", "provenance.json", "rules.png", "rules/comparison.md"}
    assert names <= {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["cells"] == len(pd.read_csv(project / "results/runs.csv"))
    assert provenance["seeds"] == [0]
    assert provenance["versions"][0]["torch"]
    assert provenance["machine"][0]["cpu"]
    assert provenance["config"] == ["config.yaml", "smoke.yaml"]
    # Overlays are kept under their own names, if they leave the cells as they are.
    (project / "mine").mkdir()
    (project / "mine/smoke.yaml").write_text("execution: {replicas: 1}\n")
    assert record(project, "mine/smoke.yaml", "execution={threads: 2}").returncode == 0
    names = json.loads((folder / "provenance.json").read_text())["config"]
    assert names == ["config.yaml", "smoke.yaml", "2-smoke.yaml", "command-line.yaml"]
    assert [yaml.safe_load((folder / name).read_text())["execution"] for name in names[2:]] == [
        {"replicas": 1},
        {"threads": 2},
    ]
    # Claims can be recorded together with what they rest on, if this config made them.
    on = {"figures": ["figure1", "figure2", "figure3", "figure4", "attribution", "attribution4"]}
    done = record(project, "--claims", **on)
    assert "the claims rest on lemma_b1_slopes, which is not recorded" in done.stderr
    on["probes"] = ["lemma_b1_slopes"]
    done = record(project, "claims={drift_margin: 0.2}", "--claims", **on)
    assert "claims/tests.csv does not match this config and these runs" in done.stderr
    assert "--claims needs --figures" in record(project, "--claims").stderr
    assert record(project, "--claims", **on).returncode == 0
    assert {"claims.md", "claims/tests.csv"} <= {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert record(project, "mine/smoke.yaml", "execution={threads: 2}").returncode == 0
    # A record that cannot be made leaves the previous one.
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = record(project, "probes={lemma_b1: {axes: {seed: [3]}}}")
    assert done.returncode == 1
    assert "the probe lemma_b1 was measured with another config" in done.stderr
    done = record(project, "setups={small: {training: {steps: 7}}}")
    assert done.returncode == 1
    assert re.search(r"\d+ of \d+ cells were trained with another config, such as ", done.stderr)
    (project / "results/claims/tests.csv").unlink()
    done = record(project)
    assert done.returncode == 1
    assert "and results/recorded/smoke is unchanged: fix the cause" in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole


def test_some_figures_and_probes_are_recorded_alone(project):
    targets = ["results/attribution/attribution.csv", "results/figure2a.pdf", "results/lemma_b1.pdf"]
    assert smoke(project, *targets).returncode == 0
    assert record(project).returncode == 1
    done = record(project, figures=["attribution", "figure2a"], probes=["lemma"])
    assert done.returncode == 1
    assert "lemma_b1" in done.stderr
    done = record(project, figures=["attribution", "figure2a"], probes=["lemma_b1"])
    assert done.returncode == 0, done.stderr
    folder = project / "results/recorded/smoke"
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    tables = {f"{figure}/{table}.csv" for figure in ("attribution", "figure2a") for table in ("runs", "optima")}
    tables |= {f"attribution/attribution.{suffix}" for suffix in ("csv", "md")}
    tables |= {"lemma_b1/values.csv.gz", "lemma_b1/values.json", "lemma_b1.csv"}
    tables |= {"config.yaml", "smoke.yaml", "provenance.json"}
    assert kept == tables | {f"{name}.{suffix}" for name in ("figure2a", "lemma_b1") for suffix in ("pdf", "png")}
    assert record(project, "--tables", figures=["attribution", "figure2a"], probes=["lemma_b1"]).returncode == 0
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == tables
    rows = [row for figure in ("attribution", "figure2a") for row in pd.read_csv(folder / figure / "runs.csv")["cell"]]
    assert json.loads((folder / "provenance.json").read_text())["cells"] == len(set(rows))


def test_a_killed_run_resumes_and_retrains_no_finished_cell(finished, tmp_path):
    project = make_project(tmp_path / "project")
    # One of the jobs never ends.
    process = start(project, injector(tmp_path)("SIGSTOP", number=10))
    try:
        wait_until(lambda: len(list(project.glob("results/cells/*/summary.json"))) >= CELLS // 2, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # Seconds of training are part of the kept result: they change if a finished cell is trained again.
    finished_cells = {path: path.read_bytes() for path in project.glob("results/cells/*/summary.json")}
    assert len(finished_cells) < CELLS
    done = smoke(project, TARGET)
    assert done.returncode == 0, done.stdout
    assert {path: path.read_bytes() for path in finished_cells} == finished_cells
    (runs, optima), (expected_runs, expected_optima) = results(project), results(finished)
    pd.testing.assert_frame_equal(runs, expected_runs, check_exact=True)
    assert optima == expected_optima


def test_two_runs_in_one_folder_are_refused(project, tmp_path):
    edit(project, "setups.small.training.steps", 21)
    log = project / "first.log"
    with log.open("w") as output:
        first = start(project, injector(tmp_path)("SIGSTOP"), output)
    try:
        wait_until(lambda: "Select jobs to execute" in log.read_text(), first)
        second = smoke(project, TARGET)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert second.returncode != 0
    assert "another run is working" in second.stdout


def test_a_run_ends_with_a_line_that_shows_how_much_of_which_figure_was_made(project):
    edit(project, "figures.figure1.axes.learning_rate", ["2^-8", "2^-7", "2^-6", "2^-4"])
    tokens = project / "results/data/smoke/train.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    failed = smoke(project, TARGET)
    # The jobs are those of whole curves: for most cells they only publish results that they already have.
    cells = CELLS + CURVES
    assert re.search(rf"^training:   0%.* 0/{cells} cells .*, {cells} failed\]$", failed.stdout, re.M), failed.stdout
    tokens.write_bytes(whole)
    done = smoke(project, TARGET)
    assert re.search(rf"^figure1: 100%.* {cells}/{cells} cells \[[\d:]+ spent\]$", done.stdout, re.M), done.stdout
    # A cell of several figures counts for the one that is made.
    other = smoke(project, "results/figure2a/runs.csv")
    assert re.search(r"^figure2a: 100%", other.stdout, re.M), other.stdout
    # Nothing is trained.
    assert " spent" not in smoke(project, TARGET, "--forcerun", "figure").stdout


@pytest.mark.parametrize("name", ["slurm", "gpus"])
def test_a_profile_holds_what_it_replaces(name):
    default, other = (
        yaml.safe_load((ROOT / f"profiles/{profile}/config.yaml").read_text()) for profile in ("default", name)
    )
    assert default.items() <= other.items()
