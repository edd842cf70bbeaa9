"""The state of a sweep: every state a cell can be in, the time left, and any files that may be in the folders."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT, read_config, wait_until, write_result
from faults.inject import injector, is_stopped
from mup_moe.__main__ import main
from mup_moe.config.cell import Cell
from mup_moe.data.tokens import Tokens
from mup_moe.files import claim_folder
from mup_moe.model.inventory import size_of
from mup_moe.ops import checkpoint
from mup_moe.ops.cell_folder import Result
from mup_moe.ops.checkpoint import Checkpoint
from mup_moe.ops.heartbeat import Failure, Heartbeat
from mup_moe.ops.status.survey import State
from mup_moe.parametrization import parse_table
from mup_moe.training.request import TrainingRequest

VOCABULARY, STEPS, TOKENS_OF_STEP = 300, 400, 4 * 16
ELSEWHERE = "node7"
# The command's clock does not move, so that a heartbeat is as old as a test says.
NOW = time.time()
RATES = ("2^-7", "2^-6")


def small_config(**axes: list[Any]) -> dict[str, Any]:
    """Returns config.yaml with a small set-up and two figures, `both` and `narrow`, that share cells of width 32."""
    document = yaml.safe_load((ROOT / "config.yaml").read_text())
    model = {"sequence": 16}
    training = {"steps": STEPS, "batch_size": 4, "final_loss_steps": 2, "validation_batches": 1}
    document["corpora"] = {"tiny": document["corpora"]["python"] | {"vocabulary": VOCABULARY}}
    document["setups"] = {"small": document["setups"]["small"] | {"corpus": "tiny"}}
    document["setups"]["small"]["model"] |= model
    document["setups"]["small"]["training"] |= training
    axes = {"parametrization": ["mup"], "width": [32, 64], "learning_rate": list(RATES)} | axes
    figure = document["figures"]["figure1"]
    both = figure | {"setup": "small", "axes": figure["axes"] | axes}
    document["figures"] = {"both": both, "narrow": both | {"axes": both["axes"] | {"width": [32]}}}
    document |= {"compositions": {"all": ["both", "narrow"]}, "trends": {}, "probes": {}}
    document["claims"]["table"] = {}
    return document


class Sweep:
    """A folder with a config and results."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.results = folder / "results"
        self.path = folder / "config.yaml"
        self.path.write_text(yaml.safe_dump(document))
        self.config = read_config(self.path)
        self.cells = self.config.figures["both"].cells()

    def folder(self, cell: Cell) -> Path:
        return self.results / "cells" / cell.id

    def tokenize(self, seed: int = 0) -> None:
        folder = self.results / "data" / "tiny"
        folder.mkdir(parents=True, exist_ok=True)
        manifest: dict[str, Any] = {"vocabulary": VOCABULARY, "end_of_text": 0, "dtype": "uint16", "splits": {}}
        for split in ("train", "valid"):
            data = np.random.default_rng(seed).integers(0, VOCABULARY, 5000, dtype="<u2").tobytes()
            (folder / f"{split}.bin").write_bytes(data)
            manifest["splits"][split] = {"tokens": 5000, "tokens_sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def request(self, cell: Cell) -> TrainingRequest:
        setup = self.config.setups[cell.setup]
        table = parse_table(self.config.parametrizations)
        return TrainingRequest(cell, setup.model, setup.training, table[cell.parametrization])

    def fingerprint(self, cell: Cell) -> str:
        return self.request(cell).fingerprint(Tokens.open(self.results / "data" / "tiny").digest)

    def finish(self, cell: Cell, **changes: Any) -> None:
        """Gives the cell a result."""
        summary = {"id": cell.id, "fingerprint": self.fingerprint(cell), "status": "finished", "device": "cpu"}
        summary["tokens_digest"] = Tokens.open(self.results / "data" / "tiny").digest
        write_result(self.folder(cell), summary | {"flops": 10**9, "wall_seconds": 1.0} | changes)

    def beat(self, cell: Cell, age: float = 5.0, **changes: Any) -> None:
        """Gives the cell a heartbeat of a process on another host, 5 seconds old by default."""
        beat = Heartbeat(100, STEPS, 1, 10.0, NOW - age, ELSEWHERE, 4711, None)
        replace(beat, **changes).write(self.folder(cell))

    def save(self, cell: Cell, step: int, fingerprint: str | None = None) -> None:
        """Gives the cell a checkpoint."""
        owner = f"{fingerprint or self.fingerprint(cell)}/cpu/float32"
        checkpoint.save({self.folder(cell): Checkpoint(step, 1.0, owner, {"weight": torch.zeros(3)})})

    def flops_of_step(self, cell: Cell) -> int:
        return TOKENS_OF_STEP * size_of(cell, self.config.setups["small"].model, VOCABULARY).flops_per_token


@pytest.fixture
def sweep(tmp_path):
    """A sweep that is tokenized, with nothing trained."""
    sweep = Sweep(tmp_path, small_config())
    sweep.tokenize()
    return sweep


@pytest.fixture
def ask(capsys, monkeypatch):
    """Calls the command; returns what it prints."""

    monkeypatch.setattr("mup_moe.ops.status.command.time", SimpleNamespace(time=lambda: NOW))

    def call(sweep: Sweep, *options: str) -> str:
        capsys.readouterr()
        sweep.results.mkdir(exist_ok=True)
        assert main(["status", "--config", str(sweep.path), "--results", str(sweep.results), *options]) == 0
        printed = capsys.readouterr()
        assert not printed.err
        return printed.out

    return call


@pytest.fixture
def reported(ask):
    """Calls the command; returns its JSON output."""
    return lambda sweep, *options: json.loads(ask(sweep, "--json", *options))


def as_row(text: str, name: str) -> dict[str, int]:
    """Returns the numbers in a row of the table."""
    header = next(line for line in text.splitlines() if line.split()[:1] == ["cells"]).split()
    line = next(line for line in text.splitlines() if line.split()[:1] == [name])
    return {column: 0 if value == "-" else int(value) for column, value in zip(header, line.split()[1:], strict=True)}


def files_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---------------------------------------------------------------- the state of a cell


def test_before_the_corpus_is_tokenized_everything_waits_and_no_file_is_made(tmp_path, ask):
    sweep = Sweep(tmp_path, small_config())
    text = ask(sweep)
    assert "corpus tiny: not tokenized yet" in text
    assert as_row(text, "total") == {"cells": 4} | dict.fromkeys(map(str, State), 0) | {"waiting": 4}
    assert "no Snakemake is running" in text
    assert not files_in(sweep.results)


def test_a_missing_results_folder_is_refused_unless_it_is_the_default(tmp_path, monkeypatch, capsys):
    sweep = Sweep(tmp_path, small_config())
    monkeypatch.chdir(tmp_path)
    command = ["status", "--config", str(sweep.path)]
    assert main([*command, "--results", "elsewhere"]) == 1
    assert "--results is elsewhere, which is not a folder" in capsys.readouterr().err
    assert main(command) == 0
    assert not sweep.results.exists()


def test_cells_that_figures_share_count_once_in_the_total(sweep, ask):
    sweep.finish(sweep.cells[0])
    text = ask(sweep)
    for name, cells in (("both", 4), ("narrow", 2), ("total", 4)):
        row = as_row(text, name)
        assert (row["cells"], row["done"], row["waiting"]) == (cells, 1, cells - 1)


def interrupt(sweep, cell):
    sweep.save(cell, 50)


def begin_under_another_config(sweep, cell):
    sweep.save(cell, 50, "another")


def interrupt_while_the_last_checkpoint_was_written(sweep, cell):
    sweep.save(cell, 50)
    sweep.save(cell, 90)
    (sweep.folder(cell) / "checkpoint.safetensors").write_bytes(b"torn")


def damage_the_kept_result(sweep, cell):
    sweep.finish(cell)
    Result(sweep.folder(cell)).kept_files[0].write_text("step\n")


def finish_between_two_heartbeats(sweep, cell):
    sweep.beat(cell)
    sweep.finish(cell)


def run_a_retry(sweep, cell):
    sweep.save(cell, 50)
    sweep.beat(cell)


def fail_after_a_checkpoint(sweep, cell):
    sweep.save(cell, 50)
    Failure("no memory", time.time()).write(sweep.folder(cell))


def retrain_an_outdated_cell(sweep, cell):
    sweep.finish(cell, fingerprint="another")
    sweep.save(cell, 50)


@pytest.mark.parametrize(
    ("make", "state", "step"),
    [
        (lambda *_: None, "waiting", 0),
        (lambda sweep, cell: sweep.finish(cell), "done", STEPS),
        (lambda sweep, cell: sweep.finish(cell, status="diverged"), "diverged", STEPS),
        (lambda sweep, cell: sweep.finish(cell, fingerprint="another"), "outdated", 0),
        (damage_the_kept_result, "outdated", 0),
        (finish_between_two_heartbeats, "done", STEPS),
        (retrain_an_outdated_cell, "interrupted", 50),
        (lambda sweep, cell: sweep.beat(cell), "running", 100),
        (run_a_retry, "running", 100),
        (lambda sweep, cell: sweep.beat(cell, age=3600), "silent", 0),
        (interrupt, "interrupted", 50),
        (begin_under_another_config, "waiting", 0),
        (interrupt_while_the_last_checkpoint_was_written, "interrupted", 50),
        (fail_after_a_checkpoint, "failed", 50),
    ],
)
def test_the_files_of_a_cell_show_its_state_and_progress(sweep, reported, make, state, step):
    cell = sweep.cells[1]
    make(sweep, cell)
    before = files_in(sweep.results)
    found = reported(sweep)["cells"]
    assert (found[cell.id]["state"], found[cell.id]["step"]) == (state, step)
    assert all(other["state"] == "waiting" for name, other in found.items() if name != cell.id)
    assert files_in(sweep.results) == before


@pytest.mark.parametrize(
    ("age", "rate", "state"),
    [
        (59, 100.0, "running"),
        (65, 100.0, "silent"),
        (200, 0.02, "running"),  # a step takes 50 s
        (320, 0.02, "silent"),
        (300, None, "running"),  # it may compile
        (700, None, "silent"),
        (-3600, 100.0, "running"),  # a different clock on another host, or a clock that was set back
    ],
)
def test_how_old_a_heartbeat_may_be_depends_on_how_long_steps_take(sweep, reported, age, rate, state):
    sweep.beat(sweep.cells[0], age=age, steps_per_second=rate)
    assert reported(sweep)["cells"][sweep.cells[0].id]["state"] == state


def test_a_dead_process_of_this_host_is_silent_at_once(sweep, reported):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    here = socket.gethostname()
    sweep.beat(sweep.cells[0], age=0, host=here, pid=process.pid)
    sweep.beat(sweep.cells[1], age=-50, host=here, pid=process.pid)
    sweep.beat(sweep.cells[2], age=0, host=here, pid=os.getpid())
    states = [reported(sweep)["cells"][cell.id] for cell in sweep.cells[:3]]
    assert [cell["state"] for cell in states] == ["silent", "silent", "running"]
    assert states[1]["age"] == 0  # never negative


def test_results_of_another_corpus_are_outdated_and_without_a_corpus_all_count_as_done(sweep, reported):
    for cell in sweep.cells:
        sweep.finish(cell)
    assert reported(sweep)["total"]["done"] == 4
    (sweep.results / "data" / "tiny" / "manifest.json").unlink()
    assert reported(sweep)["total"]["done"] == 4
    sweep.tokenize(seed=1)
    assert reported(sweep)["total"]["outdated"] == 4


def test_another_config_shows_other_cells_and_outdated_ones(sweep, reported, tmp_path):
    for cell in sweep.cells:
        sweep.finish(cell)
    document = small_config(width=[32, 128])
    document["setups"]["small"]["training"]["weight_decay"] = 0.5
    other = Sweep(tmp_path, document)
    assert reported(other)["total"] == dict.fromkeys(map(str, State), 0) | {"outdated": 2, "waiting": 2}


# ---------------------------------------------------------------- what people read


def test_a_running_job_is_shown_with_its_step_rate_host_and_cluster_job(sweep, ask):
    wide = [cell for cell in sweep.cells if cell.width == 64]
    for cell in wide:
        sweep.beat(cell, step=120, together=2, steps_per_second=3.456, job="815")
    (line,) = [line for line in ask(sweep).splitlines() if "steps/s" in line]
    assert line == "  small_moe_mup_w64_e8_g1: 2 cells at step 120 of 400, 3.46 steps/s, on node7, SLURM job 815"


def test_a_silent_job_is_shown_with_its_silence_and_the_step_it_resumes_from(sweep, ask):
    wide = [cell for cell in sweep.cells if cell.width == 64]
    for cell, step in zip(wide, (50, 70), strict=True):
        sweep.save(cell, step)
        sweep.beat(cell, age=2.5 * 3600)
    (line,) = [line for line in ask(sweep).splitlines() if "no sign of life" in line]
    assert line.endswith(
        "w64_e8_g1: no sign of life for 2.5 h, on node7, process 4711: 2 cells from steps 50 to 70 of 400"
    )


def test_failures_with_one_reason_are_shown_together_with_the_paths_of_their_logs(sweep, ask, reported):
    for cell in sweep.cells:
        reason = "the GPU's memory\nis too small" if cell.learning_rate == sweep.cells[0].learning_rate else "no disk"
        Failure(reason, time.time()).write(sweep.folder(cell))
    lines = ask(sweep).splitlines()
    failed = lines[lines.index("failed, with the logs:") + 1 :][:6]
    logs = [sweep.results / "logs" / "train" / f"small_moe_mup_w{width}_e8_g1.log" for width in (32, 64)]
    assert failed == [
        *("  2 cells: the GPU's memory is too small", *(f"    {log}" for log in logs)),
        *("  2 cells: no disk", *(f"    {log}" for log in logs)),
    ]
    found = reported(sweep)["cells"].values()
    assert {cell["log"] for cell in found} == set(map(str, logs))
    assert {cell["reason"] for cell in found} == {"the GPU's memory is too small", "no disk"}


def test_a_log_is_named_after_the_job_of_the_whole_workflow_whichever_figures_are_chosen(sweep, reported):
    document = small_config()
    document["figures"]["narrow"]["axes"]["learning_rate"] = [RATES[0]]
    other = Sweep(sweep.results.parent, document)
    # The cell that both figures show has its own job; the other cell of its curve has another one.
    jobs = {cell["job"] for cell in reported(other, "--figures", "narrow")["cells"].values()}
    assert jobs < {cell["job"] for cell in reported(other)["cells"].values()}
    assert len(jobs) == 1
    alone = small_config()
    alone["execution"]["lockstep"] = []
    cells = reported(Sweep(sweep.results.parent, alone))["cells"]
    assert all(Path(cell["log"]).name == f"{name}.log" for name, cell in cells.items())


def test_figures_and_compositions_can_be_chosen_and_an_unknown_one_is_refused(sweep, reported, capsys):
    assert list(reported(sweep, "--figures", "narrow")["figures"]) == ["narrow"]
    assert list(reported(sweep, "--figures", "all")["figures"]) == ["both", "narrow"]
    assert main(["status", "--config", str(sweep.path), "--figures", "figure9"]) == 1
    assert main(["status", "--config", str(sweep.path), "--preset", "huge"]) == 1
    assert main(["status", "--config", str(sweep.path.with_name("absent.yaml"))]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 3
    assert all(line.startswith("mup-moe: ") for line in errors)


def test_the_error_for_a_missing_or_partial_config_says_how_to_name_one(sweep, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text("preset: default\nexecution: {device: cpu}")
    assert main(["status", "--config", str(mine)]) == 1
    assert main(["status", "--config", str(mine), str(sweep.path)]) == 1
    monkeypatch.chdir(ROOT / "tests")
    assert main(["status"]) == 1
    alone, first, elsewhere = capsys.readouterr().err.strip().splitlines()
    assert alone.endswith("name the complete one first, as in --config config.yaml mine.yaml")
    assert first == alone
    assert elsewhere == (
        "mup-moe: config.yaml does not exist here: run this in the checkout, or name the config with --config"
    )


def test_the_preset_is_that_of_the_option_or_else_the_one_that_the_config_names(tmp_path, reported):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "long.yaml").write_text(f"setups: {{small: {{training: {{steps: {3 * STEPS}}}}}}}")
    (tmp_path / "presets" / "short.yaml").write_text(f"setups: {{small: {{training: {{steps: {STEPS // 2}}}}}}}")
    sweep = Sweep(tmp_path, small_config() | {"preset": "long"})
    for options, steps in (((), 3 * STEPS), (("--preset", "short"), STEPS // 2), (("--preset", "default"), STEPS)):
        assert {cell["steps"] for cell in reported(sweep, *options)["cells"].values()} == {steps}


def test_a_snakemake_that_works_in_the_folder_is_reported_and_not_disturbed(sweep, ask):
    assert "no Snakemake is running" in ask(sweep)
    holder = [sys.executable, "-c"]
    holder += [
        "import sys, time; from pathlib import Path; from mup_moe.files import hold_folder;"
        f"hold_folder(Path({str(sweep.results)!r})); print('held', flush=True); time.sleep(600)"
    ]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert f"a Snakemake is running in {sweep.results}" in ask(sweep)
        process.kill()
    assert "no Snakemake is running" in ask(sweep)
    with claim_folder(sweep.results) as waited:
        assert not waited  # free for the next one


def test_the_state_of_a_corpus_is_reported(sweep, reported):
    folder = sweep.results / "data" / "tiny"
    assert reported(sweep)["corpora"] == {"tiny": "tokenized"}
    (folder / ".work").mkdir()
    assert reported(sweep)["corpora"] == {"tiny": "partly tokenized, by no running process"}
    with claim_folder(folder):
        assert reported(sweep)["corpora"] == {"tiny": "being tokenized"}
    (folder / ".work").rmdir()
    (folder / "valid.bin").write_bytes(b"")
    assert reported(sweep)["corpora"] == {"tiny": "damaged"}


@pytest.mark.parametrize("state", ["not tokenized yet", "partly tokenized, by no running process"])
def test_the_reason_of_a_failed_tokenization_is_shown_until_a_process_works_on_it(tmp_path, reported, state):
    sweep = Sweep(tmp_path, small_config())
    folder, log = sweep.results / "data" / "tiny", sweep.results / "logs" / "tokenize" / "tiny.log"
    folder.mkdir(parents=True)
    if state != "not tokenized yet":
        (folder / ".work").mkdir()
    log.parent.mkdir(parents=True)
    log.write_text("reading: 0B\rreading: 9B\n")
    assert reported(sweep)["corpora"] == {"tiny": state}  # a killed process gives no reason
    log.write_text("reading: 0B\rreading: 9B\nmup-moe: the disk is full: free space\n")
    assert reported(sweep)["corpora"] == {
        "tiny": f"{state}; the last attempt failed: the disk is full: free space ({log})",
    }
    with claim_folder(folder):
        assert "failed" not in reported(sweep)["corpora"]["tiny"]
    sweep.tokenize()
    assert "failed" not in reported(sweep)["corpora"]["tiny"]


def test_probes_are_listed_if_no_figure_is_chosen(tmp_path, ask):
    document = small_config()
    probe = yaml.safe_load((ROOT / "config.yaml").read_text())["probes"]["coordinate_check"]
    document["probes"] = {"check": probe | {"setup": "small"}}
    sweep = Sweep(tmp_path, document)
    (sweep.results / "check").mkdir(parents=True)
    (sweep.results / "check" / "values.csv").touch()
    assert "probe check: measured" in ask(sweep)
    assert "probe check" not in ask(sweep, "--figures", "both")


def test_a_thousand_cells_fit_on_a_screen(tmp_path, ask, reported):
    sweep = Sweep(tmp_path, small_config(width=[32 + 4 * i for i in range(100)], seed=list(range(5))))
    sweep.tokenize()
    states = ("waiting", "running", "failed", "silent", "interrupted")
    for number, cell in enumerate(sweep.cells):
        match states[number % len(states)]:
            case "running":
                sweep.beat(cell, pid=number)
            case "silent":
                sweep.beat(cell, age=1000, pid=number)
            case "failed":
                Failure(f"reason {number}", 0.0).write(sweep.folder(cell))
            case "interrupted":
                sweep.save(cell, 1, "x" if number % 2 else None)
    text = ask(sweep)
    assert as_row(text, "total")["cells"] == len(sweep.cells) == 1000
    assert as_row(text, "total")["running"] == 200
    assert len(text.splitlines()) < 150
    assert len(reported(sweep)["cells"]) == 1000


# ---------------------------------------------------------------- any files that may be in the folders

GARBAGE = [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b'{"step": 1}', b'"text"']
FILES = ["heartbeat.json", "failure.json", ".kept/summary.json", ".kept/history.csv", "checkpoint.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_loses_only_its_own_information(sweep, reported, ask, name):
    cell, *others = sweep.cells
    for other in others:
        sweep.finish(other)
    state = "waiting" if name == "checkpoint.safetensors" else "interrupted"
    for garbage in GARBAGE:
        sweep.save(cell, 50)
        path = sweep.folder(cell) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(garbage)
        found = reported(sweep)
        assert found["total"]["done"] == 3
        assert found["cells"][cell.id]["state"] == state
        assert "total" in ask(sweep)
        path.unlink()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_manifest_is_reported(sweep, reported, garbage):
    (sweep.results / "data" / "tiny" / "manifest.json").write_bytes(garbage)
    found = reported(sweep)
    assert found["corpora"] == {"tiny": "damaged"}
    assert found["total"]["waiting"] == 4


json_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)
signs = st.fixed_dictionaries(dict.fromkeys(asdict(Heartbeat.now(0, 1, 1, None)), json_values))
likely = st.fixed_dictionaries(
    {
        "step": st.integers(-1, 500),
        "steps": st.integers(-1, 500),
        "together": st.integers(-1, 3),
        "steps_per_second": st.none() | st.floats(),
        "time": st.floats(),
        "host": st.sampled_from([ELSEWHERE, socket.gethostname()]),
        "pid": st.integers(),
        "job": st.none() | st.text(),
    }
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(sign=signs | likely, reason=json_values)
def test_no_heartbeat_and_no_reason_is_too_odd_to_be_read(sweep, reported, ask, sign, reason):
    for cell in sweep.cells[:2]:
        sweep.folder(cell).mkdir(parents=True, exist_ok=True)
    (sweep.folder(sweep.cells[0]) / "heartbeat.json").write_text(json.dumps(sign))
    (sweep.folder(sweep.cells[1]) / "failure.json").write_text(json.dumps({"reason": reason, "time": reason}))
    found = reported(sweep)
    assert sum(found["total"].values()) == 4
    assert found["cells"][sweep.cells[1].id]["state"] == "failed"
    assert "total" in ask(sweep)


# ---------------------------------------------------------------- the time left


def test_the_time_left_follows_the_rate_of_the_nearest_width_and_the_running_processes(sweep, reported, ask):
    narrow, other, wide, widest = sweep.cells
    assert [cell.width for cell in sweep.cells] == [32, 32, 64, 64]
    # 2e9 FLOPs/s at width 32.
    sweep.finish(narrow, flops=10 * 10**9, wall_seconds=5.0)
    sweep.save(wide, 100)
    # Half of `other`, three quarters of `wide`, all of `widest`.
    rest = 200 * sweep.flops_of_step(other) + 300 * sweep.flops_of_step(wide) + 400 * sweep.flops_of_step(widest)
    sweep.save(other, 200)
    left = reported(sweep)["time_left"]
    assert left["device_seconds"] == pytest.approx(rest / 2e9)
    assert (left["processes"], left["seconds"]) == (0, None)
    assert "nothing is running: rerun the same snakemake command" in ask(sweep)
    # 1e9 at width 64. Two processes run now; one of them alone would take 300 s more.
    sweep.finish(widest, flops=4 * 10**9, wall_seconds=4.0, status="diverged")
    sweep.beat(other, step=200, steps_per_second=1000.0, pid=1)
    sweep.beat(wide, step=100, steps_per_second=1000.0, pid=2)
    rest = 200 * sweep.flops_of_step(other) / 2e9 + 300 * sweep.flops_of_step(wide) / 1e9
    left = reported(sweep)["time_left"]
    assert left["device_seconds"] == pytest.approx(rest)
    assert left["processes"] == 2
    assert left["seconds"] == pytest.approx(max(0.2, 0.3))
    sweep.beat(wide, step=100, steps_per_second=1.0, pid=2)
    assert reported(sweep)["time_left"]["seconds"] == 300
    assert "time left: about 5 min: " in ask(sweep)


def test_one_process_that_trains_several_cells_counts_once_and_a_silent_one_not_at_all(sweep, reported):
    for cell in sweep.cells[:2]:
        sweep.beat(cell, together=2)
    sweep.beat(sweep.cells[2], pid=1, age=1000)
    assert reported(sweep)["time_left"]["processes"] == 1


def test_only_results_of_the_device_that_was_used_last_give_rates(sweep, reported):
    measured = (("cuda", 5.0, 3), ("cpu", 90.0, 1), ("cpu", 100.0, 2))
    for cell, (device, seconds, made) in zip(sweep.cells, measured, strict=False):
        sweep.finish(cell, device=device, flops=10**9, wall_seconds=seconds)
        os.utime(Result(sweep.folder(cell)).kept_files[1], (made, made))
    seconds = STEPS * sweep.flops_of_step(sweep.cells[3]) / (1e9 / 5.0)
    assert reported(sweep)["time_left"]["device_seconds"] == pytest.approx(seconds)


def test_if_no_cell_of_a_width_is_done_the_running_ones_give_the_rate(sweep, reported):
    narrow, other, wide, widest = sweep.cells
    for cell in (narrow, other):
        sweep.finish(cell, flops=10**9, wall_seconds=1.0)
    for cell in (wide, widest):
        sweep.beat(cell, step=100, together=2, steps_per_second=3.0)
    # Both take 300 steps at 3 steps/s, together.
    assert reported(sweep)["time_left"]["device_seconds"] == pytest.approx(100.0)


def test_before_anything_is_measured_the_benchmark_of_the_plan_gives_the_rate_if_there_is_one(sweep, reported, ask):
    left = reported(sweep)["time_left"]
    assert (left["device_seconds"], left["seconds"]) == (None, None)
    assert "time left: unknown: no cell of this sweep has been timed yet" in ask(sweep)
    (sweep.path.parent / "benchmarks").mkdir()
    table = "architecture,default,width,gflops,cpu,threads\nmoe,yes,32,2,A CPU,1\nmoe,yes,64,1,A CPU,1\n"
    (sweep.path.parent / "benchmarks" / "step.csv").write_text(table)
    gflops = {32: 2e9, 64: 1e9}
    seconds = sum(STEPS * sweep.flops_of_step(cell) / gflops[cell.width] for cell in sweep.cells)
    left = reported(sweep)["time_left"]
    assert left["device_seconds"] == pytest.approx(seconds)
    assert "A CPU, 1 thread" in left["basis"]


def test_when_all_is_done_nothing_is_left(sweep, reported, ask):
    for cell in sweep.cells:
        sweep.finish(cell)
    assert reported(sweep)["time_left"]["device_seconds"] == 0
    assert "time left: none: every cell has a result" in ask(sweep)


# ---------------------------------------------------------------- with a process that trains


def test_a_process_is_seen_running_killed_stopped_and_done(tmp_path, reported):
    sweep = Sweep(tmp_path, small_config(width=[32]))
    sweep.tokenize()
    cells = [reported(sweep)["cells"][cell.id] for cell in sweep.cells]
    command = [sys.executable, "-m", "mup_moe", "train", *(cell.id for cell in sweep.cells), "--device", "cpu"]
    command += ["--config", str(sweep.path), "--results", str(sweep.results), "--checkpoint-seconds", "0"]

    def states() -> list[tuple[str, bool]]:
        return [(cell["state"], cell["step"] > 0) for cell in reported(sweep)["cells"].values()]

    inject = injector(tmp_path)

    def start() -> subprocess.Popen[bytes]:
        stopped = os.environ | inject("SIGSTOP", number=20)
        process = subprocess.Popen(command, env=stopped, stderr=subprocess.DEVNULL)
        wait_until(lambda: is_stopped(process.pid), process)
        return process

    assert states() == [("waiting", False)] * len(cells)
    with start() as process:
        assert {state for state, _ in states()} == {"running"}
        process.kill()
    assert states() == [("silent", True)] * 2
    with start() as process:
        assert {state for state, _ in states()} == {"running"}
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
    assert states() == [("interrupted", True)] * 2
    subprocess.run(command, check=True, capture_output=True)
    assert states() == [("done", True)] * 2
