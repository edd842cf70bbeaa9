"""Options, the ledger of faults, and a small corpus and curve for the faults to strike."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from conftest import ROOT, make_request
from faults.commands import finish, run, tokenize_command
from faults.curve import Curve
from faults.inject import Inject, injector
from faults.ledger import Ledger
from mup_moe.config.cell import LearningRate

LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "tests/faults (name this folder on the command line)")
    group.addoption("--fault-rounds", type=int, default=1, help="how many times to run each test")
    group.addoption("--fault-seed", type=int, help="the seed of the random moments, to repeat a session")
    group.addoption("--fault-report", type=Path, help="the Markdown file to write the report to")


def pytest_configure(config: pytest.Config) -> None:
    # If this folder is not named, this file is loaded too late to add options: fall back to their defaults.
    seed = config.getoption("fault_seed", None)
    config.stash[LEDGER] = Ledger(time.time_ns() % 2**32 if seed is None else seed)
    if config.getoption("fault_report", None) and config.getoption("numprocesses", None):
        raise pytest.UsageError("--fault-report needs all tests in one process: leave out -n")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault_round" in metafunc.fixturenames:
        rounds = range(1, metafunc.config.getoption("fault_rounds", 1) + 1)
        metafunc.parametrize("fault_round", rounds, ids=[f"round{number}" for number in rounds])


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    path = config.getoption("fault_report", None)
    if path is not None:
        reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
        skipped = {report.longrepr[2].removeprefix("Skipped: ") for report in reports}
        path.write_text(config.stash[LEDGER].report(config.getoption("fault_rounds"), skipped), encoding="utf-8")


@pytest.fixture
def ledger(pytestconfig: pytest.Config, fault_round: int) -> Ledger:  # noqa: ARG001 - repeats the test in each round
    return pytestconfig.stash[LEDGER]


@pytest.fixture
def chance(ledger: Ledger, request: pytest.FixtureRequest) -> random.Random:
    """The source of random moments, which are the same with the same seed."""
    print(f"to repeat the random moments of this session: --fault-seed {ledger.seed}")
    return random.Random(f"{ledger.seed} {request.node.name}")


@pytest.fixture
def inject(tmp_path: Path) -> Inject:
    """Makes the environment variables that inject a fault: see hooks/sitecustomize.py."""
    return injector(tmp_path)


@pytest.fixture(scope="session")
def corpus_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The settings, as JSON, of a corpus of this repository's prose."""
    # Use a copy, since someone may be editing the files.
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(
        "".join((ROOT / name).read_text() for name in ("README.md", "docs/decisions.md", "docs/clusters.md"))
    )
    settings = {"source": "text", "files": [str(text)], "tokenizer": "bpe", "vocabulary": 300}
    return json.dumps(settings | {"validation_fraction": 0.3})  # there are few documents, and a hash chooses


@pytest.fixture(scope="session")
def tokens_folder(corpus_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of the corpus, made without a fault. Do not change them."""
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    finish(tokenize_command(corpus_json, out))
    return out


@pytest.fixture(scope="session")
def undisturbed(tokens_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Three cells of a curve, trained without a fault; the last one diverges early. Do not change them."""
    rates = [LearningRate("2^-6"), LearningRate("2^-7"), LearningRate(1e5)]
    requests = [make_request(steps=60, warmup_steps=10, divergence_span=0.3, learning_rate=rate) for rate in rates]
    out = tmp_path_factory.mktemp("undisturbed") / "cells"
    curve = Curve(requests, tokens_folder, out, undisturbed=out)
    finish(curve.train())
    return curve


@pytest.fixture(scope="session")
def interrupted(undisturbed: Curve, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cells, killed at a step where each has two checkpoints. Do not change them."""
    curve = undisturbed.within(tmp_path_factory.mktemp("interrupted") / "cells")
    run(curve.train("--checkpoint-seconds", "0"), injector(curve.out.parent)("SIGKILL", number=15))
    return curve.out


@pytest.fixture
def curve(undisturbed: Curve, tmp_path: Path) -> Curve:
    """The same cells, not yet trained, in their own folder."""
    return undisturbed.within(tmp_path / "cells")


@pytest.fixture
def bound() -> list[str]:
    """The prefix of a command that makes file permissions apply even to root."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("a read-only folder: root ignores permissions, and setpriv is not installed")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]
