"""The benchmarks at toy sizes give rows of finite numbers with their provenance."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import CONFIG, ROOT
from mup_moe.config.document import read_document
from mup_moe.config.like import overlay
from mup_moe.config.load import validate
from mup_moe.model.inventory import ModelShape, model_size

sys.path.append(str(ROOT / "benchmarks"))

import floor
import peers
import pipeline
import step
import sweep
import variants


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{script}.py", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def assert_measured(table: pd.DataFrame, *columns: str) -> None:
    for column in columns:
        assert (np.isfinite(table[column]) & (table[column] > 0)).all(), table[column]
    for column in ("torch", "cpu", "threads", "date"):
        assert table[column].notna().all()


@pytest.fixture(scope="module")
def request_file(tmp_path_factory) -> Path:
    """The request that the benchmarks start from, in the form for a machine without pydantic."""
    path = tmp_path_factory.mktemp("request") / "request.json"
    path.write_text(run("variants").stdout)
    assert json.loads(path.read_text())["model"]["blocks"] == CONFIG.setups["small"].model.blocks
    return path


def test_the_cost_of_checkpoints_is_compared_with_the_time_between_them(tmp_path):
    out = tmp_path / "checkpoints.csv"
    run("checkpoints", "--widths", 16, "--rounds", 2, "--folder", tmp_path, "--out", out)
    table = pd.read_csv(out)
    assert_measured(table, "step_ms", "checkpoint_mb", "checkpoint_ms", "heartbeat_ms", "overhead_percent")
    # A parameter and its two moments, in float32, for each replica.
    assert table["checkpoint_mb"][0] >= 12e-6 * table["parameters"][0] * table["replicas"][0]
    by_hand = table["checkpoint_ms"] / table["checkpoint_seconds"] + table["heartbeat_ms"] / table["heartbeat_seconds"]
    np.testing.assert_allclose(table["overhead_percent"], by_hand / 10, atol=2e-3)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("width", [32, 256, 512])
@pytest.mark.parametrize("architecture", ["moe", "dense"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("native", [True, False], ids=["bfloat16", "float32"])
def test_step_times_each_variant_once_and_the_default_first(monkeypatch, native, device, architecture, width):
    monkeypatch.setattr("mup_moe.training.device._multiplies_bfloat16", lambda _: native)
    base = variants.read_request(None)
    shape = {"architecture": architecture, "width": width, "experts": 8 if architecture == "moe" else 1}
    for compiling in (False, True):
        found = step.variants_of(base, device, shape, compiling)
        assert len(found) == len(set(found))
        default = replace(variants.default_variant(base, device, **shape), replicas=found[0].replicas)
        assert found[0] == default
        assert default.precision == ("bfloat16" if native else "float32")
        expected = set(product((variants.OURS, variants.PEER), ("float32", default.precision)))
        expected |= {(variants.PEER, "bfloat16-weights")} if native else set()
        expected |= set(product((variants.NANO,), ("float32", default.precision))) if architecture == "dense" else set()
        assert {(variant.system, variant.precision) for variant in found} == expected
        assert ("compiled" in {variant.step for variant in found}) == compiling


def test_step_compares_with_the_best_peer(tmp_path, auto_precision):
    out = tmp_path / "step.csv"
    run("step", "--widths", 16, "--architectures", "moe", "--seconds", 0.1, "--no-compile", "--out", out)
    table = pd.read_csv(out)
    assert_measured(table, "tokens_per_second", "gflops", "matmul_gflops", "fraction_of_matmul", "ratio")
    assert not table.duplicated(list(step.COLUMNS[: step.COLUMNS.index("default")])).any()
    default = table[(table["default"] == "yes") & (table["instructions"] == table["instructions"][0])]
    assert default[["system", "precision"]].values.tolist() == [["mup-moe", auto_precision]]
    assert 1.0 in set(table[(table["system"] == "transformers") & (table["allocator"] == "stock")]["ratio"])
    native = {"bfloat16", "bfloat16-weights"} if auto_precision == "bfloat16" else set()
    assert set(table["precision"]) == {"float32", *native}
    assert (table["compile_seconds"] == 0).all()
    first, *others = table["instructions"].unique()
    # A machine with AVX-512 is also measured without it, where bfloat16 is emulated.
    assert others == (["AVX2"] if first == "AVX512" else [])
    assert set(table[table["instructions"] == "AVX2"]["precision"]) <= {"float32"}


def test_the_floor_is_the_sum_of_its_named_parts(tmp_path):
    out = tmp_path / "floor.csv"
    run("floor", "--widths", 16, "--seconds", 0.2, "--instructions", "native", "--out", out)
    table = pd.read_csv(out)
    assert_measured(table, "step_ms", "products_ms", "products_alone_ms", "products_at_peak_ms", "overhead_ms")
    named = ("products_alone_ms", "attention_ms", "softmax_ms", "overhead_ms")
    np.testing.assert_allclose(table["fastest_ms"], sum(table[name] for name in named), atol=0.03)


def test_the_floor_counts_the_products_of_a_step():
    base = variants.read_request(None)
    trainer = variants.trainer_of(variants.default_variant(base, "cpu", width=32, precision="float32"), base)
    with floor.seen() as operators:
        trainer.run(1)
    # The counts differ by attention, where it is not among the products, and by rows that are dropped or padded.
    assert operators.flops == pytest.approx(trainer.size.flops_per_token * trainer.tokens_per_step, rel=0.3)
    assert set(operators.seconds) == {"products", "softmax", "optimizer", "other"}


def test_growth_is_listed_next_to_its_prediction(tmp_path, request_file):
    out = tmp_path / "growth.csv"
    arguments = ["--architectures", "moe", "--axes", "granularity", "replicas", "--values", 1, 2, "--width", 16]
    run("growth", *arguments, "--seconds", 0.1, "--request", request_file, "--out", out)
    table = pd.read_csv(out)
    assert_measured(table, "tokens_per_second", "predicted_tokens_per_second", "of_prediction", "memory_mb")
    assert list(zip(table["axis"], table["value"], strict=True)) == [
        *(("granularity", 1), ("granularity", 2), ("replicas", 1), ("replicas", 2)),
    ]
    assert (table.groupby("axis")["ratio_to_base"].first() == 1).all()


def test_a_curve_is_timed_three_ways_and_drawn(tmp_path):
    run("sweep", "--width", 16, "--cells", 2, "--steps", 3, "--rounds", 1, "--out", tmp_path / "sweep.csv")
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert list(table["mode"]) == ["solo", "process", "stacked"]
    assert_measured(table, "wall_seconds", "training_seconds", "tokens_per_second", "ratio_to_solo")
    assert (table["training_seconds"] < table["wall_seconds"]).all()
    run("plot", "--folder", tmp_path)
    assert (tmp_path / "benchmarks.png").stat().st_size > 10_000


def test_a_version_is_as_fast_as_itself(tmp_path):
    out = tmp_path / "versions.csv"
    short = ("--widths", 16, "--architectures", "moe", "--rounds", 1, "--turns", 2)
    run("versions", "--other", ROOT, "--name", "itself", *short, "--out", out)
    table = pd.read_csv(out)
    assert_measured(table, "tokens_per_second", "other_tokens_per_second", "ratio", "ratio_low", "ratio_high")
    assert list(table["same_losses"]) == ["yes"]


@pytest.mark.parametrize("native", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_a_timed_curve_shows_the_precision_that_it_is_trained_in(tmp_path, monkeypatch, native, asked):
    monkeypatch.setattr("mup_moe.training.device._multiplies_bfloat16", lambda _: native)
    monkeypatch.setattr(sweep, "run", lambda *_: (2.0, 1.0))
    base = variants.read_request(None)
    request, out = tmp_path / "request.json", tmp_path / "sweep.csv"
    request.write_text(replace(base, training=replace(base.training, precision=asked)).to_json())
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--request", str(request), "--out", str(out)])
    sweep.main()
    auto = "bfloat16" if native else "float32"
    assert set(pd.read_csv(out)["precision"]) == {auto if asked == "auto" else asked}


def test_the_pipeline_runs_what_its_documentation_says(tmp_path):
    rates = [f"2^-{power}" for power in range(2, 9)]
    asked = Namespace(widths=[32, 64, 128], rates=rates, steps=300, device="cpu", step=None, max_bytes=None)
    config = validate(overlay(read_document(ROOT / "config.yaml"), pipeline.overlay(asked)))
    cells = config.figures[pipeline.FIGURE].cells()
    training = config.setups["small"].training
    assert len(cells) == 63
    assert training.steps * training.batch_size * config.setups["small"].model.sequence == 307_200

    for name, seconds in (("a", 30.0), ("b", 50.0)):
        summary = {"wall_seconds": seconds, "steps": 300, "tokens": 307_200, "device": "cpu", "precision": "float32"}
        path = tmp_path / "cells" / name / "summary.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(summary | {"step": "eager", "replicas": 1}))
    for job, seconds in (("tokenize/python", 5.0), ("train/curve", 82.0)):
        path = tmp_path / "benchmarks" / f"{job}.tsv"
        path.parent.mkdir(parents=True)
        path.write_text(f"s\th:m:s\n{seconds}\t0:00:00\n")
    row = dict(zip(pipeline.COLUMNS, pipeline.row_of(tmp_path, wall=49.0, cores=2, threads=1), strict=False))
    assert (row["cells"], row["jobs"], row["tokens"]) == (2, 1, 614_400)
    assert (row["tokenize_seconds"], row["training_part_seconds"], row["training_seconds_over_cores"]) == (5, 44, 40)
    assert row["overhead"] == pytest.approx(0.1)


@pytest.mark.parametrize("architecture", ["moe", "dense", "nano"])
@pytest.mark.parametrize("width", [32, 64, 512])
def test_peers_have_our_active_size(architecture, width):
    base = variants.read_request(None)
    shape = {"architecture": "moe", "experts": 8} if architecture == "moe" else {"architecture": "dense", "experts": 1}
    variant = variants.default_variant(base, "cpu", width=width, **shape)
    peer = replace(variant, system=variants.PEER, attention="sdpa", experts_implementation="grouped_mm")
    request = variant.request(base)
    made = peers.nano_gpt if architecture == "nano" else peers.peer_model
    theirs = peers.sizes(made(peer, request, variants.VOCABULARY), request)
    ours = model_size(ModelShape.of(request.cell, request.model, variants.VOCABULARY), request.model)
    for name in ("active_parameters", "flops_per_token", "parameters"):
        assert theirs[name] == pytest.approx(getattr(ours, name), rel=0.05), name
