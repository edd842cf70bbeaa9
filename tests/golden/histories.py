"""Golden histories: the committed numbers of tiny runs, which a change of the code must not change unnoticed.

`histories.json` holds the requests and their results: the tokens, the history of every cell, and what the
probes measured. After an intended change of the numbers, raise `VERSION` in src/mup_moe/training/version.py
and regenerate the file: PYTHONPATH=src:tests python -m golden.histories
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mup_moe import provenance
from mup_moe.config.cell import LearningRate
from mup_moe.config.settings import CorpusSettings
from mup_moe.data.tokenize import tokenize
from mup_moe.data.tokens import Tokens
from mup_moe.model.metrics import METRICS
from mup_moe.training.probe import measure
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import Trainer
from mup_moe.training.version import VERSION

FILE = Path(__file__).with_name("histories.json")
# Between kinds of processors: relative to a number, or to 1 if the number is smaller. The same processor without
# AVX-512 differs by at most a tenth of this, and each mutant of test_golden.py by more than this.
TOLERANCE = 3e-4


def cells() -> dict[str, list[TrainingRequest]]:
    """Returns the cells of each run, which trains them in lockstep; those of a probe are measured one by one."""
    from conftest import make_request

    def alike(*cells: dict[str, Any], **shared: Any) -> list[TrainingRequest]:
        return [make_request(**{"width": 16, "experts": 8} | shared | cell) for cell in cells or ({},)]

    return {
        "moe": alike({"parametrization": "sp"}, {"parametrization": "simplep", "seed": 1}, {}),
        "dense": alike(architecture="dense", experts=1, parametrization="sp"),
        "granular": alike(parametrization="simplep", granularity=2),
        "dropless": alike(capacity_factor="dropless", z_loss=0.01, balance_loss=0.1, activation="gelu", init_scale=8.0),
        "top-2": alike(top_k=2, renormalize_gates=True, capacity_factor=1.5, final_norm=True, init="constant"),
        "authors": alike(
            heads=None,
            head_size=4,
            embedding_multiplier=10.0,
            logit_multiplier=0.1,
            activation="silu",
            expert_fan_in="width",
            granularity=2,
            scale_residual_init=False,
            weight_decay=0.1,
            adam_betas=(0.9, 0.95),
            clip_norm=None,
            warmup_steps=0,
        ),
        "modern": alike(
            gated=True,
            norm="rmsnorm",
            positions="rotary",
            gates="sigmoid",
            renormalize_gates=True,
            top_k=2,
            final_norm=True,
            activation="silu",
            capacity_factor=2.0,
        ),
        "diverging": alike(
            {"learning_rate": LearningRate("2^-1")},
            {},
            parametrization="sp",
            divergence_margin=1.0,
            divergence_span=0.25,
        ),
        "probe activations": alike(parametrization="sp"),
        "probe covariance": alike(parametrization="mup", width=32),
    }


def make() -> dict[str, Any]:
    """Computes the content of `histories.json` with the current code."""
    requests = {name: [request.to_json() for request in of_run] for name, of_run in cells().items()}
    return {"version": VERSION, "made_on": made_on(), "requests": requests, "numbers": numbers(requests)}


def made_on() -> dict[str, str]:
    """Returns the kind of processor and the version of torch: if these agree, results agree to the bit."""
    kind = {"cpu": str(provenance.machine()["cpu"]), "instructions": torch.backends.cpu.get_cpu_capability()}
    return kind | {"torch": str(torch.__version__).partition("+")[0]}


def numbers(requests: dict[str, list[str]]) -> dict[str, Any]:
    """Runs requests; returns their results as nested mappings of numbers and texts."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = _tokens(Path(folder))
    found["tokens"] = tokens.digests
    for name, lines in requests.items():
        of_run = [TrainingRequest.from_json(line) for line in lines]
        found[name] = _measured(name, of_run, tokens) if name.startswith("probe") else _trained(of_run, tokens)
    return found


def _tokens(folder: Path) -> Tokens:
    """Tokenizes a text that is the same on every machine into two splits."""
    generator = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("al", "be", "ga", "dé", "ep") for b in ("pha", "ta", "mma", "lta 3", "silon\n")]
    texts = [" ".join(generator.choice(words, generator.integers(20, 90))) for _ in range(120)]
    path = folder / "text.jsonl"
    texts = [texts[0], f"<|endoftext|> {texts[1]}", *texts]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    corpus = CorpusSettings(
        source="text", tokenizer="bpe", validation_fraction=0.2, vocabulary=300, files=(str(path),), max_bytes=30_000
    )
    tokenize(corpus, folder / "tokens", 1)
    opened = Tokens.open(folder / "tokens", verify=True)
    # Read the files now, since the folder is deleted afterwards.
    return type(opened)(**{**vars(opened), "train": np.array(opened.train), "valid": np.array(opened.valid)})


def _trainer(requests: list[TrainingRequest], tokens: Tokens) -> Trainer:
    return Trainer(requests, tokens.train, tokens.valid, tokens.vocabulary, torch.device("cpu"))


def _trained(requests: list[TrainingRequest], tokens: Tokens) -> dict[str, Any]:
    trainer = _trainer(requests, tokens)
    trainer.run()
    return {
        request.cell.id: {
            "status": outcome.status,
            "final_train_loss": outcome.train_loss,
            "final_valid_loss": outcome.valid_loss,
            **dict(zip(METRICS, map(_plain, outcome.history_TM.T), strict=True)),
            "flops_per_token": trainer.size.flops_per_token,
            "active_parameters": trainer.size.active_parameters,
        }
        for request, outcome in zip(requests, trainer.outcomes(), strict=True)
    }


def _measured(name: str, requests: list[TrainingRequest], tokens: Tokens) -> dict[str, Any]:
    (request,), what = requests, name.removeprefix("probe ")
    device = torch.device("cpu")
    measured = measure(request, what, [0, 1, 3], tokens, device)  # type: ignore[arg-type]
    return {f"{step} {' '.join(key)}": value for step, (key, value) in measured}


def _plain(values: np.ndarray) -> list[float]:
    return [float(f"{value:.9g}") for value in values]


def differences(found: Any, golden: Any, tolerance: float, where: str = "") -> list[str]:
    """Lists where two nestings of mappings, lists, texts and numbers differ, numbers by more than the tolerance."""
    if isinstance(golden, dict) and isinstance(found, dict):
        keys = [*golden, *(key for key in found if key not in golden)]
        nothing: dict[str, Any] = {}
        pairs = [(key, found.get(key, nothing), golden.get(key, nothing)) for key in keys]
    elif isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(found, golden, strict=True))]
    else:
        return [] if _same(found, golden, tolerance) else [f"{where}: {found}, not {golden}"]
    return [line for key, a, b in pairs for line in differences(a, b, tolerance, f"{where}/{key}")]


def _same(found: Any, golden: Any, tolerance: float) -> bool:
    if isinstance(golden, float) and isinstance(found, float):
        both_nan = math.isnan(golden) and math.isnan(found)
        return both_nan or found == golden or abs(found - golden) <= tolerance * max(abs(golden), 1.0)
    return bool(found == golden)


def check() -> list[str]:
    """Lists where the current numbers differ from the committed ones; exactly, on the same kind of processor."""
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    tolerance = 0.0 if golden["made_on"] == made_on() else TOLERANCE
    return differences(numbers(golden["requests"]), golden["numbers"], tolerance)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["check"]:
        sys.exit("\n".join(check()) or 0)
    FILE.write_text(json.dumps(make(), indent=1, sort_keys=False) + "\n", encoding="utf-8")
