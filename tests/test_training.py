"""Batches, optimizer, schedule, divergence, lockstep, and resuming to the bit."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import AVX2, TABLE, VOCABULARY, make_request, results_of, tokenize_command
from faults.inject import injector
from mup_moe.__main__ import main
from mup_moe.config.cell import LearningRate
from mup_moe.config.jobs import even_parts
from mup_moe.files import UserError, file_digest, read_json
from mup_moe.model import metrics
from mup_moe.model.layers import weights_of
from mup_moe.model.metrics import METRICS, balance, router_z
from mup_moe.ops import checkpoint
from mup_moe.ops.checkpoint import Checkpoint, Checkpoints, DamagedCheckpointError, common_steps
from mup_moe.ops.device import step_on
from mup_moe.ops.heartbeat import Heartbeat, SignsOfLife
from mup_moe.ops.offsite.job_list import ListedJob, write_jobs
from mup_moe.training import stack, trainer
from mup_moe.training.batches import Batches
from mup_moe.training.memory import memory_mb, replicas_on
from mup_moe.training.optimizer import schedule
from mup_moe.training.request import TrainingRequest, fingerprint_of
from mup_moe.training.trainer import Trainer
from mup_moe.training.version import VERSION

CPU = torch.device("cpu")
LOSS = METRICS.index("train_loss")


def make_trainer(tokens, *requests):
    return Trainer(requests or [make_request()], tokens, tokens[:2000], VOCABULARY, CPU)


def outcome_of(tokens, **changes):
    trainer = make_trainer(tokens, make_request(**changes))
    trainer.run()
    return trainer.outcomes()[0]


# ---------------------------------------------------------------- batches


@given(seed=st.integers(0, 2**40), step=st.integers(0, 2**40), batch=st.integers(1, 9), length=st.integers(1, 40))
def test_a_batch_is_a_function_of_seed_and_step(seed, step, batch, length):
    tokens = np.arange(1000, dtype=np.uint16)
    windows = Batches(tokens, batch, length).training(seed, step)
    assert torch.equal(windows, Batches(tokens.copy(), batch, length).training(seed, step))
    assert windows.shape == (batch, length + 1)
    assert torch.equal(windows[:, 1:], windows[:, :-1] + 1)


def test_batches_differ_between_steps_and_seeds_and_reach_every_window():
    batches = Batches(np.arange(50, dtype=np.uint16), 16, 8)
    draws = [batches.training(seed, step) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4
    starts = {start for step in range(100) for start in batches.training(0, step)[:, 0].tolist()}
    assert starts == set(range(50 - 8))


def test_fixed_batches_span_the_split():
    batches = Batches(np.arange(100, dtype=np.uint16), 4, 9)
    starts = torch.cat([batches.fixed(i, 3)[:, 0] for i in range(3)]).tolist()
    assert starts[0] == 0
    assert starts[-1] == 100 - 9 - 1
    assert len(set(np.diff(starts))) <= 2


def test_a_split_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="fewer than one window"):
        Batches(np.arange(8, dtype=np.uint16), 1, 8)


# ---------------------------------------------------------------- optimizer and schedule


def test_schedule_warms_up_linearly_then_follows_the_cosine():
    training = make_request(steps=100, warmup_steps=10, final_lr_fraction=0.1, final_loss_steps=1).training
    rates = [schedule(step, training) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=90, eta_min=0.1)
    for rate in rates[10:]:
        assert rate == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        cosine.step()


def test_a_step_equals_torchs_adamw_with_clipping_of_the_whole_gradient(tokens):
    request = make_request(parametrization="sp", weight_decay=0.1, clip_norm=0.3)
    ours, theirs = make_trainer(tokens, request), make_trainer(tokens, request)
    parameters = list(theirs.model.parameters())
    training = request.training
    adamw = torch.optim.AdamW(parameters, betas=training.adam_betas, eps=training.adam_eps, weight_decay=0.1)
    for step in range(5):
        ours.run(step + 1)
        losses = theirs.losses(theirs.training_batch(step))
        adamw.zero_grad()
        theirs.model.objective(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        adamw.param_groups[0]["lr"] = request.cell.learning_rate * schedule(step, training)
        adamw.step()
        assert ours._history_TRM[step, 0, METRICS.index("gradient_norm")] == pytest.approx(norm.item(), rel=1e-5)
    for mine, other in zip(ours.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_step_records_every_metric_in_the_order_of_the_history(tokens):
    assert (
        *("train_loss", "balance_loss", "z_loss", "gradient_norm", "dropped_fraction", "max_expert_load"),
    ) == METRICS
    for changes in ({}, {"architecture": "dense", "experts": 1}):
        trainer = make_trainer(tokens, make_request(**changes))
        measured = trainer.losses(trainer.training_batch(0))
        assert measured.keys() == set(METRICS) - {"gradient_norm"}
        trainer.run()
        first = dict(zip(METRICS, trainer.outcomes()[0].history_TM[0], strict=True))
        assert first["gradient_norm"] > 0
        for name, value in measured.items():
            assert first[name] == value.item()
            assert changes or value.item() != 0 or name == "dropped_fraction"
            assert not changes or name == "train_loss" or value.item() == 0


def test_the_objective_adds_the_weighted_auxiliary_losses(tokens):
    trainer = make_trainer(tokens, make_request(balance_loss=0.5, z_loss=0.25))
    windows = trainer.training_batch(0)
    losses = trainer.losses(windows)
    inputs = windows[..., :-1].contiguous()
    routed, logits = trainer.model.features(inputs)[1], trainer.model.predict(inputs)
    expected = F.cross_entropy(logits[0], windows[..., 1:].flatten())
    torch.testing.assert_close(losses["train_loss"][0], expected)
    expected = expected + sum(0.5 * balance(r)[0] + 0.25 * router_z(r)[0] for r in routed) / len(routed)
    torch.testing.assert_close(trainer.model.objective(losses), expected)


def test_training_learns(tokens):
    outcome = outcome_of(tokens, steps=60, width=16, final_loss_steps=10)
    assert outcome.status == "finished"
    assert outcome.train_loss < 0.75 * math.log(VOCABULARY)
    assert outcome.train_loss == pytest.approx(outcome.history_TM[-10:, LOSS].mean(), rel=1e-6)
    assert outcome.valid_loss == pytest.approx(outcome.train_loss, abs=0.5)


# ---------------------------------------------------------------- divergence


def test_divergence_ends_a_cell_early_and_is_a_result(tokens):
    outcome = outcome_of(tokens, learning_rate=LearningRate(1e4), steps=60, divergence_span=5 / 60)
    assert outcome.status == "diverged"
    assert outcome.train_loss is None
    assert outcome.valid_loss is None
    losses = outcome.history_TM[:, LOSS]
    assert len(losses) < 60
    limit = math.log(VOCABULARY) + make_request().training.divergence_margin
    assert not np.isfinite(outcome.history_TM[-1]).all() or (losses[-5:] > limit).all()


@given(
    above=st.lists(st.booleans(), min_size=1, max_size=12),
    not_finite=st.none() | st.integers(0, 11),
    patience=st.integers(1, 6),
)
def test_divergence_is_that_many_bad_steps_in_a_row_or_one_that_is_not_finite(above, not_finite, patience):
    tokens = np.zeros(100, np.uint16)
    trainer = make_trainer(tokens, make_request(divergence_span=patience / 12))
    trainer.step = len(above)
    limit = math.log(VOCABULARY) + make_request().training.divergence_margin
    trainer._history_TRM[: len(above), 0, LOSS] = torch.tensor([limit + 1 if bad else limit - 1 for bad in above])
    if not_finite is not None and not_finite < len(above):
        trainer._history_TRM[not_finite, 0, LOSS] = float("nan")
    expected = None
    in_a_row = 0
    for step, bad in enumerate(above):
        in_a_row = in_a_row + 1 if bad and step != not_finite else 0
        if in_a_row == patience or step == not_finite:
            expected = step
            break
    assert trainer._diverged_steps() == [expected]


# ---------------------------------------------------------------- the same bits, interrupted or not


def test_the_same_cell_twice_is_bit_identical(tokens):
    one, two = (outcome_of(tokens, width=16) for _ in range(2))
    np.testing.assert_array_equal(one.history_TM, two.history_TM)
    assert one.valid_loss == two.valid_loss


@given(stops=st.lists(st.integers(0, 12), max_size=4).map(sorted), dense=st.booleans())
@settings(max_examples=25)
def test_resuming_anywhere_gives_the_same_bits(tokens, tmp_path_factory, stops, dense):
    request = make_request(architecture="dense", experts=1) if dense else make_request()
    path = tmp_path_factory.mktemp("resume") / "checkpoint.safetensors"
    whole = make_trainer(tokens, request)
    whole.run()
    for stop in stops:
        part = make_trainer(tokens, request)
        if path.exists():
            saved = checkpoint.load(path)
            part.load_states(saved.step, [saved.tensors])
        part.run(stop)
        checkpoint.save({path.parent: Checkpoint(part.step, 0.0, "test", part.states()[0])})
    last = make_trainer(tokens, request)
    if path.exists():
        saved = checkpoint.load(path)
        last.load_states(saved.step, [saved.tensors])
    last.run()
    (expected,), (got,) = whole.outcomes(), last.outcomes()
    np.testing.assert_array_equal(got.history_TM, expected.history_TM)
    assert (got.train_loss, got.valid_loss) == (expected.train_loss, expected.valid_loss)
    for name, weight in weights_of(whole.model).items():
        assert torch.equal(weight.value, weights_of(last.model)[name].value)


@pytest.mark.parametrize("named", [True, False])
def test_a_run_resumes_from_a_checkpoint_that_is_older_than_a_metric(tokens, tmp_path, monkeypatch, named):
    request = make_request()
    whole, first = make_trainer(tokens, request), make_trainer(tokens, request)
    whole.run()
    first.run(until=5)
    state = first.states()[0]
    if not named:  # the format of the first checkpoints
        columns = [state.pop(f"history/{name}") for name in METRICS]
        state["history"] = torch.stack(columns, dim=1)
    checkpoint.save({tmp_path: Checkpoint(5, 0.0, "test", state)})
    newer = (*METRICS[:2], "newer", *METRICS[2:])
    monkeypatch.setitem(metrics.OBSERVED, "newer", lambda forward: forward.cross_entropy_RN.amax(-1))
    for module in (stack, trainer):
        monkeypatch.setattr(module, "METRICS", newer)
    monkeypatch.setattr(trainer, "_NORM", newer.index("gradient_norm"))
    last = make_trainer(tokens, request)
    last.load_states(5, [checkpoint.load(tmp_path / checkpoint.CHECKPOINT).tensors])
    last.run()
    (expected,), (got,) = whole.outcomes(), last.outcomes()
    seen_T = got.history_TM[:, 2]
    np.testing.assert_array_equal(np.delete(got.history_TM, 2, axis=1), expected.history_TM)
    assert np.isnan(seen_T[:5]).all()
    assert np.isfinite(seen_T[5:]).all()
    assert got.train_loss == expected.train_loss


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=60)
def test_a_damaged_checkpoint_is_recognized(tmp_path_factory, position, bit, cut):
    path = tmp_path_factory.mktemp("damage") / "checkpoint.safetensors"
    tensors = {"a": torch.arange(50.0), "b": torch.ones(2, 3)}
    checkpoint.save({path.parent: Checkpoint(3, 1.5, "owner", tensors)})
    data = bytearray(path.read_bytes())
    place = int(position * len(data))
    if cut:
        data = data[:place]
    else:
        data[place] ^= 1 << bit
    path.write_bytes(data)
    try:
        loaded = checkpoint.load(path)
    except DamagedCheckpointError:
        return
    # Only a bit that means nothing (white space of the header) may flip unnoticed.
    assert (loaded.step, loaded.elapsed, loaded.fingerprint) == (3, 1.5, "owner")
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("available", "steps"),
    [
        # Written together: all resume from the latest.
        ([[20, 10], [20, 10]], [20, 20]),
        # Killed between the renames: those ahead step back.
        ([[30, 20], [20, 10], [30, 20]], [20, 20, 20]),
        # Interrupted separately: each resumes from its own.
        ([[30, 20], [12, 11]], [30, 12]),
        ([[30, 20], []], [30, 0]),
        ([[], []], [0, 0]),
    ],
)
def test_cells_trained_together_resume_together(available, steps):
    assert common_steps(available) == steps


def test_the_previous_checkpoint_is_kept_as_a_fallback(tmp_path, capsys):
    def save(step):
        checkpoint.save({tmp_path: Checkpoint(step, 0.0, "mine", {"a": torch.full((3,), float(step))})})

    for step in (10, 20, 30):
        save(step)
    kept = Checkpoints(tmp_path, "mine")
    assert kept.steps == [30, 20]
    kept.resume_from(20)
    # The abandoned checkpoint must not be taken for a newer one than what is saved next.
    assert Checkpoints(tmp_path, "mine").steps == [20]
    save(25)
    assert Checkpoints(tmp_path, "mine").steps == [25, 20]
    assert capsys.readouterr().err == ""
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    kept = Checkpoints(tmp_path, "mine")
    assert kept.load(25) is None
    assert kept.steps == [20]
    assert "is damaged" in (reported := capsys.readouterr().err)
    assert "resuming from step 20" in reported
    assert float(kept.load(20).tensors["a"][0]) == 20.0
    assert Checkpoints(tmp_path, "another").steps == []


def test_checkpoints_of_another_run_are_ignored_and_the_reason_is_given(tmp_path, capsys):
    written = []
    folders = [tmp_path / "one", tmp_path / "two"]
    saved = Checkpoint(10, 0.0, "mine/cpu/bfloat16", {"a": torch.ones(1)})
    checkpoint.save(dict.fromkeys(folders, saved), after_each=lambda: written.append(None))
    assert len(written) == 2
    for owner, reason in (
        ("mine/cpu/float32", "device or precision"),
        ("his/cpu/float32", "config, corpus or version"),
    ):
        assert Checkpoints(folders[0], owner).steps == []
        assert f"is from another {reason}: starting from step 0" in capsys.readouterr().err


def test_the_rate_of_a_heartbeat_outlives_a_pause_without_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("mup_moe.ops.heartbeat.SECONDS", 0.0)
    trainer = SimpleNamespace(step=0, settings=SimpleNamespace(steps=9))
    signs = SignsOfLife([tmp_path], [tmp_path])
    beats = []
    for step in (0, 5, 5, 6):
        trainer.step = step
        signs.show(trainer)
        beats.append(Heartbeat.read(tmp_path))
    assert [beat.step for beat in beats] == [0, 5, 5, 6]
    first, rate, paused, later = (beat.steps_per_second for beat in beats)
    assert first is None
    assert rate == paused > 0
    assert later not in (rate, 0)


HANGS = """
import sys, threading
from pathlib import Path
from mup_moe.ops.heartbeat import Pulse

with Pulse(0.1, Path(sys.argv[1]).write_text).watched():
    threading.Event().wait()
"""


@pytest.mark.parametrize("stderr", ["2>&-", "2> >(exit)", "2> /dev/full"])
def test_a_hung_process_exits_and_leaves_its_reason_even_if_nobody_reads_its_stderr(tmp_path, stderr):
    command = ["bash", "-c", f'exec "$@" {stderr}', "-", sys.executable, "-c", HANGS, str(tmp_path / "reason")]
    assert subprocess.run(command).returncode == 1
    assert "the job hangs and is ended" in (tmp_path / "reason").read_text()


def test_a_pickle_is_not_a_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load(path)


# ---------------------------------------------------------------- the command, as a process


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "text.txt"
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    source.write_text("\n\n".join(" ".join(generator.choice(words, 60)) for _ in range(200)))
    settings = {"source": "text", "files": [str(source)], "tokenizer": "bpe", "vocabulary": 300}
    command = tokenize_command(settings | {"validation_fraction": 0.1}, folder / "tokens")
    subprocess.run(command, check=True, capture_output=True)
    return folder / "tokens"


def train_command(requests: Sequence[TrainingRequest], corpus: Path, out: Path, *options: str) -> list[str]:
    results = results_of(cells=out, data=corpus.parent)
    write_jobs(results / "jobs.jsonl", [ListedJob("job", "figure1", corpus.name, "", tuple(requests))])
    given = ["--requests", str(results / "jobs.jsonl"), "--results", str(results)]
    return [sys.executable, "-m", "mup_moe", "train", *given, "--device", "cpu", *options]


@pytest.fixture(scope="module")
def curve():
    """Cells that share a job; the last diverges early."""
    rates = [LearningRate("2^-6"), LearningRate("2^-7"), LearningRate(1e5)]
    changes = {"steps": 200, "warmup_steps": 10, "width": 16, "divergence_span": 0.1}
    return [make_request(**changes, learning_rate=rate) for rate in rates]


def results_in(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob("*/history.csv")}


@pytest.fixture(scope="module", params=["1", "3"], ids=["one after the other", "stacked"])
def replicas(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(corpus, curve, replicas, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(train_command(curve, corpus, out, "--replicas", replicas), check=True, capture_output=True)
    return out


def test_a_job_without_checkpoints_writes_none_even_when_it_is_stopped(corpus, tmp_path):
    command = train_command([make_request()], corpus, tmp_path, "--checkpoint-seconds", "inf")
    stopped = os.environ | injector(tmp_path)("SIGTERM", number=6)
    process = subprocess.run(command, check=False, env=stopped, capture_output=True)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("*checkpoint*"))


def test_compile_only_fills_the_cache_and_trains_nothing(corpus, tmp_path):
    cache = tmp_path / "cache"
    request = make_request(blocks=1)
    command = train_command([request], corpus, tmp_path / "out", "--compile-only", "--step")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    subprocess.run([*command, "eager"], check=True, env=environment, capture_output=True)
    assert not cache.exists()
    subprocess.run([*command, "compiled"], check=True, env=environment, capture_output=True)
    assert list((cache / "fxgraph").rglob("*"))
    assert not list((tmp_path / "out").iterdir())


# Replacements of the C++ compiler: the body of a script, or None for no compiler.
COMPILERS = {
    "none": None,
    "fails": "exit 1",
    "lacks headers": '[ "$1" = --version ] && echo g++ 13 && exit 0; echo "no cstdlib" >&2; exit 1',
    "lacks a header": '[ "$1" = --version ] && echo g++ 13 && exit 0;'
    ' echo "a.cpp:1:10: fatal error: Python.h: No such file or directory" >&2; exit 1',
}


@pytest.mark.parametrize("named_by", ["CXX", "PATH"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_without_a_compiler_a_requested_compiled_step_ends_in_one_sentence(corpus, tmp_path, compiler, named_by):
    path, script = tmp_path / "bin" / ("clang++" if sys.platform == "darwin" else "g++"), COMPILERS[compiler]
    path.parent.mkdir()
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    environment |= {"CXX": str(path)} if named_by == "CXX" else {"PATH": str(path.parent)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    command = train_command([make_request(blocks=1)], corpus, tmp_path / "out", "--step", "compiled")
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("mup-moe: a step cannot be compiled here")
    remedy = "install the package that provides Python.h" if "a header" in compiler else "install a C++ compiler"
    assert remedy in said


def test_a_compiler_that_cannot_write_its_cache_ends_in_one_sentence(corpus, tmp_path):
    (tmp_path / "file").touch()
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    command = train_command([make_request(blocks=1)], corpus, tmp_path / "out", "--step", "compiled")
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("mup-moe: the compiler's cache cannot be written (")
    assert "set TORCHINDUCTOR_CACHE_DIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_auto_is_eager_if_the_compiler_cannot_write_its_cache(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert step_on(torch.device("cuda"), "auto") == "eager"
    assert "operator by operator instead" in capsys.readouterr().err
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert step_on(torch.device("cuda"), "auto") == "graph"
    assert step_on(torch.device("cpu"), "auto") == "eager"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_killed_process_resumes_all_its_cells_to_the_same_bytes(
    corpus, curve, replicas, undisturbed, tmp_path, number
):
    command = train_command(curve, corpus, tmp_path, "--replicas", replicas, "--checkpoint-seconds", "0")
    killed = os.environ | injector(tmp_path)(number.name, number=10)
    process = subprocess.run(command, check=False, env=killed, capture_output=True)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert len(results_in(tmp_path)) < len(curve)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "continuing from step" in again.stderr
    assert results_in(tmp_path) == results_in(undisturbed)
    summaries = sorted(tmp_path.glob("*/summary.json"))
    for path in summaries:
        ours, theirs = read_json(path), read_json(undisturbed / path.parent.name / path.name)
        varying = ("wall_seconds", "summary_sha256")
        assert {k: v for k, v in ours.items() if k not in varying} == {
            k: v for k, v in theirs.items() if k not in varying
        }
    assert [read_json(path)["status"] for path in summaries].count("diverged") == 1
    # Finished cells are not trained again, even if Snakemake has deleted the outputs.
    kept = [path.read_bytes() for path in summaries]
    for path in [*summaries, *tmp_path.glob("*/history.csv")]:
        path.unlink()
    subprocess.run(command, check=True, capture_output=True)
    assert [path.read_bytes() for path in summaries] == kept
    names = {path.name for path in tmp_path.glob("*/*") if not path.name.startswith(".")}
    assert names == {"history.csv", "summary.json", "tries.jsonl"}


def test_more_cells_than_open_files_are_trained_in_parts_to_the_same_bytes(corpus, tmp_path):
    requests = [
        make_request(steps=4, warmup_steps=1, width=width, seed=seed) for width in (8, 16) for seed in range(12)
    ]

    def results(limit: str) -> tuple[dict[str, bytes], str]:
        out = tmp_path / limit
        command = train_command(requests, corpus, out, "--checkpoint-seconds", "0")
        shell = ["bash", "-c", f'ulimit {limit} && exec "$@"', "bash", *command]
        done = subprocess.run(shell, check=True, capture_output=True, text=True)
        return results_in(out), done.stderr

    whole, said = results("-Sn 40")  # a soft limit, which may be raised
    assert "at a time" not in said
    assert len(whole) == len(requests)
    parted, said = results("-n 40")
    assert "24 cells exceed the limit of open files: training 20 at a time" in said
    assert parted == whole


@given(count=st.integers(0, 40), most=st.integers(1, 12))
def test_cells_are_divided_evenly_into_as_few_stacks_as_possible(count, most):
    parts = even_parts(range(count), most)
    assert [item for part in parts for item in part] == list(range(count))
    assert len(parts) == -(-count // most)
    sizes = {len(part) for part in parts}
    assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1 and min(sizes) > 0)


def test_memory_grows_with_the_stack_and_follows_the_largest_model():
    small, large = make_request(width=64), make_request(width=512)

    def mb(*requests, device="cpu", replicas="auto"):
        return memory_mb(requests, 1000, device, replicas)

    assert mb(small) < mb(small, small, replicas="2") < mb(*[small] * 6, replicas="6")
    assert mb(small, large) == mb(large)
    # On a GPU, models need no main memory, however many there are; a checkpoint does.
    assert mb(large, device="cuda") == mb(large, large, device="cuda") > mb(small, device="cuda")
    # The memory must be enough for whichever device is found.
    for cells in ([small], [large] * 20):
        both = [mb(*cells, device=device, replicas="20") for device in ("cpu", "cuda")]
        assert mb(*cells, device="auto", replicas="20") == max(both)


def test_a_stack_on_a_cpu_is_as_large_as_its_models_allow():
    assert [replicas_on("cpu", "auto", parameters) for parameters in (1, 10**6, 4 * 10**6, 10**9)] == [6, 6, 4, 1]
    assert replicas_on("cuda", "auto", 10**9) is None
    assert replicas_on("cpu", "12", 10**9) == 12


@pytest.mark.parametrize(("asked", "sizes"), [("auto", [3, 2, 1]), ("3", None)])
def test_a_stack_that_does_not_fit_is_halved_unless_its_size_was_requested(
    corpus, curve, tmp_path, monkeypatch, capsys, asked, sizes
):
    tried = []
    run = Trainer.run

    def run_if_small(trainer, *arguments, **options):
        tried.append(len(trainer.requests))
        if len(trainer.requests) > 2:
            raise torch.OutOfMemoryError("out of memory")
        run(trainer, *arguments, **options)

    monkeypatch.setattr(Trainer, "run", run_if_small)
    # The command runs as in a process, except for the signals, which are pytest's.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = train_command(curve, corpus, tmp_path, "--replicas", asked)[3:]
    status = main(arguments)
    if sizes is None:
        assert status == 1
        assert "the GPU's memory is too small" in capsys.readouterr().err
        return
    assert status == 0
    assert tried == sizes
    assert set(results_in(tmp_path)) == {request.cell.id for request in curve}


def test_only_an_added_rate_is_trained(corpus, curve, tmp_path):
    subprocess.run(train_command(curve[:1], corpus, tmp_path), check=True, capture_output=True)
    before = read_json(tmp_path / curve[0].cell.id / "summary.json")
    done = subprocess.run(train_command(curve[:2], corpus, tmp_path), check=True, capture_output=True, text=True)
    assert read_json(tmp_path / curve[0].cell.id / "summary.json") == before
    assert curve[1].cell.id in done.stderr
    assert curve[0].cell.id not in done.stderr


def test_cells_interrupted_separately_resume_in_stacks_of_their_own(corpus, curve, undisturbed, tmp_path):
    pair = curve[:2]
    inject = injector(tmp_path)
    for request, step in zip(pair, (10, 50), strict=True):
        command = train_command([request], corpus, tmp_path, "--checkpoint-seconds", "0")
        killed = os.environ | inject("SIGKILL", number=step + 1)
        subprocess.run(command, check=False, env=killed, capture_output=True)
        assert checkpoint.load(tmp_path / request.cell.id / "checkpoint.safetensors").step == step
    done = subprocess.run(
        train_command(pair, corpus, tmp_path, "--replicas", "2"), check=True, capture_output=True, text=True
    )
    assert [f"continuing from step {step} " in done.stderr for step in (10, 50)] == [True, True]
    for request in pair:
        ours, theirs = (
            np.genfromtxt(folder / request.cell.id / "history.csv", delimiter=",", skip_header=1)
            for folder in (tmp_path, undisturbed)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_that_is_damaged_or_of_another_config_is_ignored(corpus, curve, tmp_path):
    request = curve[0]
    for content, message in ((b"damaged", "is damaged"), (None, "from another config")):
        out = tmp_path / message.replace(" ", "-")
        path = out / request.cell.id / "checkpoint.safetensors"
        path.parent.mkdir(parents=True)
        if content is None:
            checkpoint.save({path.parent: Checkpoint(7, 0.0, "another", {"a": torch.ones(1)})})
        else:
            path.write_bytes(content)
        done = subprocess.run(train_command([request], corpus, out), check=True, capture_output=True, text=True)
        assert message in done.stderr
        assert read_json(out / request.cell.id / "summary.json")["status"] == "finished"


def test_the_summary_records_what_made_it(undisturbed, curve, replicas):
    request = curve[0]
    folder = undisturbed / request.cell.id
    summary = read_json(folder / "summary.json")
    assert summary["id"] == request.cell.id
    assert (summary["replicas"], summary["step"]) == (int(replicas), "eager")
    assert summary["status"] == "finished"
    assert summary["steps"] == 200
    assert summary["tokens"] == 200 * 4 * 16
    assert summary["flops"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["history_sha256"] == file_digest(folder / "history.csv")
    assert summary["machine"]["cores"] >= 1
    assert TrainingRequest.from_json(request.to_json()) == request
    rows = np.genfromtxt(folder / "history.csv", delimiter=",", names=True)
    assert list(rows["step"]) == list(range(200))
    assert rows["train_loss"][-4:].mean() == pytest.approx(summary["train_loss"], rel=1e-6)


def test_cells_are_trained_in_the_precision_that_suits_the_processor(corpus, tmp_path, auto_precision):
    request = make_request(precision="auto")
    subprocess.run(train_command([request], corpus, tmp_path), check=True, capture_output=True)
    assert read_json(tmp_path / request.cell.id / "summary.json")["precision"] == auto_precision


def test_different_processors_may_share_a_folder_of_compiled_code(corpus, tmp_path):
    request = make_request(steps=4)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    histories = []
    for kind, changes in (("native", {}), ("avx2", AVX2)):
        command = train_command([request], corpus, tmp_path / kind, "--step", "compiled")
        subprocess.run(command, check=True, capture_output=True, env=environment | changes)
        path = tmp_path / kind / request.cell.id / "history.csv"
        histories.append(np.genfromtxt(path, delimiter=",", skip_header=1))
    np.testing.assert_allclose(*histories, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", [None, "avx2", "default"])
def test_precision_follows_the_instructions_that_torch_may_use(monkeypatch, capability):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if capability is not None:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    native = capability is None and ("avx512_bf16" in flags or "amx_bf16" in flags)
    code = "import torch; from types import SimpleNamespace; from mup_moe.training.device import precision_on; "
    code += "print(precision_on(torch.device('cpu'), SimpleNamespace(precision='auto')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ("bfloat16" if native else "float32")


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--requests", "{}", "is not a list of jobs"),
        ("--requests", "nonsense", "is not a list of jobs"),
        ("--requests", "", "no cell is named"),
        ("--results", "nowhere", "nowhere"),
        ("--results", "/dev/null/cell", "/dev/null/cell"),
        ("--replicas", "none", "--replicas"),
        ("--step", "graph", "only on a GPU"),
        pytest.param(
            *("--device", "cuda", "no GPU is visible"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_mistakes_of_users_end_in_one_sentence(corpus, curve, tmp_path, option, value, sentence):
    if option == "--requests":
        (tmp_path / "list.jsonl").write_text(value)
        value = str(tmp_path / "list.jsonl")
    command = [*train_command(curve[:1], corpus, tmp_path), option, value]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("mup-moe: ")


# ---------------------------------------------------------------- what counts as another version


def test_the_fingerprint_follows_request_tokens_and_version():
    request = make_request()
    prints = {
        request.fingerprint("t"),
        make_request(seed=1).fingerprint("t"),
        make_request(table=TABLE | {"mup": TABLE["sp"]}).fingerprint("t"),
        request.fingerprint("u"),
        fingerprint_of(request.digest, "t", version=VERSION + 1),
    }
    assert len(prints) == 5
    assert fingerprint_of(request.digest, "t") == request.fingerprint("t")
