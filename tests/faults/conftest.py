"""Faults: options, what was tried, and a small corpus and curve for them to strike."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from conftest import ROOT, make_request
from faults.commands import finish
from faults.ledger import Ledger
from mup_moe.config.learning_rate import LearningRate
from mup_moe.training.request import TrainingRequest
from test_training import train_command

LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "tests/faults, when named on the command line")
    group.addoption("--fault-rounds", type=int, default=1, help="how often to run every test there")
    group.addoption("--fault-seed", type=int, help="repeats the random moments of a session")
    group.addoption("--fault-report", type=Path, help="the Markdown file to write")


def pytest_configure(config: pytest.Config) -> None:
    # All of `tests` comes by here too late for options: it has the defaults.
    seed = config.getoption("fault_seed", None)
    config.stash[LEDGER] = Ledger(time.time_ns() % 2**32 if seed is None else seed)
    if config.getoption("fault_report", None) and config.getoption("numprocesses", None):
        raise pytest.UsageError("--fault-report needs all tests in one process: leave out -n")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault_round" in metafunc.fixturenames:
        rounds = range(1, metafunc.config.getoption("fault_rounds", 1) + 1)
        metafunc.parametrize("fault_round", rounds, ids=[f"round{number}" for number in rounds])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    ...


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("fault_report", None)
    if path is not None:
        path.write_text(session.config.stash[LEDGER].report(session.config.getoption("fault_rounds")), encoding="utf-8")


@pytest.fixture
def ledger(pytestconfig: pytest.Config, fault_round: int) -> Ledger:
    return pytestconfig.stash[LEDGER]


@pytest.fixture
def chance(ledger: Ledger, request: pytest.FixtureRequest) -> random.Random:
    """Where the test's random moments come from: the same ones with the same seed."""
    print(f"to have the same random moments: --fault-seed {ledger.seed}")
    return random.Random(f"{ledger.seed} {request.node.name}")


@pytest.fixture(scope="session")
def corpus_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of our own prose."""
    # A copy: somebody may be writing there.
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join((ROOT / name).read_text() for name in ("README.md", "docs/decisions.md")))
    settings = {"source": "text", "files": [str(text)], "tokenizer": "bpe", "vocabulary": 300}
    return json.dumps(settings | {"validation_fraction": 0.1})


def tokenize_command(corpus_json: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "mup_moe", "tokenize", "--corpus", corpus_json, "--out", str(out), "--threads", "1"]


@pytest.fixture(scope="session")
def tokens_folder(corpus_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus's tokens, made without disturbance; not to be changed."""
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    finish(tokenize_command(corpus_json, out))
    return out
