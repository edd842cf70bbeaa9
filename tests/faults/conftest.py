"""Options, what was tried, and a small corpus and curve for faults to strike."""

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
    group = parser.getgroup("faults", "tests/faults, named on the command line")
    group.addoption("--fault-rounds", type=int, default=1, help="how often to run each of its tests")
    group.addoption("--fault-seed", type=int, help="repeats the random moments of a session")
    group.addoption("--fault-report", type=Path, help="the Markdown file to write")


def pytest_configure(config: pytest.Config) -> None:
    # Where this folder is not named, it comes too late for options, which have their defaults then.
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
def ledger(pytestconfig: pytest.Config, fault_round: int) -> Ledger:  # noqa: ARG001 - a round each
    return pytestconfig.stash[LEDGER]


@pytest.fixture
def chance(ledger: Ledger, request: pytest.FixtureRequest) -> random.Random:
    """Where random moments come from: the same ones with the same seed."""
    print(f"the random moments of this session: --fault-seed {ledger.seed}")
    return random.Random(f"{ledger.seed} {request.node.name}")


@pytest.fixture
def inject(tmp_path: Path) -> Inject:
    """Makes the environment by which a fault comes: see hooks/sitecustomize.py."""
    return injector(tmp_path)


@pytest.fixture(scope="session")
def corpus_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of our own prose."""
    # A copy: somebody may be writing it.
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(
        "".join((ROOT / name).read_text() for name in ("README.md", "docs/decisions.md", "docs/clusters.md"))
    )
    settings = {"source": "text", "files": [str(text)], "tokenizer": "bpe", "vocabulary": 300}
    return json.dumps(settings | {"validation_fraction": 0.3})  # few documents, and a hash chooses


@pytest.fixture(scope="session")
def tokens_folder(corpus_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus's tokens, made without disturbance; not to be changed."""
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    finish(tokenize_command(corpus_json, out))
    return out


@pytest.fixture(scope="session")
def undisturbed(tokens_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Three cells of a curve, the last of which diverges early, as they are without disturbance; not to be changed."""
    rates = [LearningRate("2^-6"), LearningRate("2^-7"), LearningRate(1e5)]
    requests = [make_request(steps=60, warmup_steps=10, divergence_span=0.3, learning_rate=rate) for rate in rates]
    out = tmp_path_factory.mktemp("undisturbed") / "cells"
    curve = Curve(requests, tokens_folder, out, undisturbed=out)
    finish(curve.train())
    return curve


@pytest.fixture(scope="session")
def interrupted(undisturbed: Curve, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its cells, killed at a step where each has two checkpoints; not to be changed."""
    curve = undisturbed.within(tmp_path_factory.mktemp("interrupted") / "cells")
    run(curve.train("--checkpoint-seconds", "0"), injector(curve.out.parent)("SIGKILL", number=15))
    return curve.out


@pytest.fixture
def curve(undisturbed: Curve, tmp_path: Path) -> Curve:
    """The same cells, to be trained in a folder of their own."""
    return undisturbed.within(tmp_path / "cells")


@pytest.fixture
def bound() -> list[str]:
    """What a command begins with for permissions to bind it, too, where it is root's."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("a folder that cannot be written: nothing binds root here, where setpriv is absent")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]
