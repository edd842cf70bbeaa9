"""Golden histories: numbers change only with the version."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import AVX2, ROOT
from golden.histories import FILE, TOLERANCE, check, differences, made_on
from mup_moe.training.request import TrainingRequest
from mup_moe.training.version import VERSION

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
COMMAND = "PYTHONPATH=src:tests python -m golden.histories"


def test_numbers_are_those_of_the_version():
    assert GOLDEN["version"] == VERSION, f"VERSION was raised: regenerate the golden histories ({COMMAND})"
    different = check()
    assert not different, (
        f"the numbers have changed ({len(different)} of them, such as {different[0]}), but VERSION has not:"
        f" restore them, or raise VERSION in src/mup_moe/training/version.py and regenerate the histories ({COMMAND})"
    )


def test_recorded_requests_are_read_and_written_unchanged():
    for lines in GOLDEN["requests"].values():
        for line in lines:
            assert TrainingRequest.from_json(line).to_json() == line


def test_the_histories_include_a_diverging_cell():
    statuses = [
        cell["status"] for name, run in GOLDEN["numbers"].items() if name == "diverging" for cell in run.values()
    ]
    assert statuses == ["diverged", "finished"]


def run_check(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Checks the golden histories with the code in a folder."""
    world = os.environ | environment | {"PYTHONPATH": f"{source}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "golden.histories", "check"]
    return subprocess.run(command, env=world, check=False, capture_output=True, text=True)


def test_the_histories_hold_on_a_processor_without_avx512():
    done = run_check(ROOT / "src", **AVX2)
    assert done.returncode == 0, done.stderr


# Typical accidental changes of the numbers: a file of src/mup_moe, a text in it, and its replacement.
MUTANTS = {
    "a projection's init is not scaled": ("model/scaling.py", "variance /= 2 * settings.blocks", "variance /= 1"),
    "the std is the variance": ("model/scaling.py", "init_std=math.sqrt(", "init_std=("),
    "another attention scale": ("model/scaling.py", "ratio / math.sqrt(base.head_size)", "ratio / base.head_size"),
    "another seed of a tensor": ("model/initialize.py", 'f"{seed}/{name}"', 'f"{name}/{seed}"'),
    "other gates sum to 1": ("model/router.py", "if renormalize:", "if not renormalize:"),
    "fewer rows": ("model/dispatch.py", "- 1e-9", "- 1"),
    "balance without the number of experts": ("model/metrics.py", "return load_RE.shape[-1] * (load", "return (load"),
    "z-loss without the square": ("model/metrics.py", ".square().mean(-1)", ".mean(-1)"),
    "one row fewer": ("model/moe.py", "assign_rows(choice, rows, ragged)", "assign_rows(choice, rows - 1, ragged)"),
    "a gradient over one token more": ("model/operators.py", "1 / losses_RN.shape[1]", "1 / (losses_RN.shape[1] + 1)"),
    "another activation": ("model/layers.py", '"gelu": F.gelu', '"gelu": F.silu'),
    "no residual": (
        "model/transformer.py",
        "return x_RND + self.feed_forward_output",
        "return self.feed_forward_output",
    ),
    "no embedding multiplier": ("model/transformer.py", "* self.settings.embedding_multiplier", ""),
    "no logit multiplier": ("model/transformer.py", " * self.settings.logit_multiplier", ""),
    "no auxiliary losses": ("model/replicas.py", "sum(auxiliary, start=", "sum([], start="),
    "another cosine": ("training/optimizer.py", "math.pi * (step", "3 * (step"),
    "a warm-up from 0": ("training/optimizer.py", "(step + 1) / settings.warmup_steps", "step / settings.warmup_steps"),
    "swapped betas": ("training/adamw.py", "beta1=settings.adam_betas[0]", "beta1=settings.adam_betas[1]"),
    "no clipping": ("training/adamw.py", ".clamp(max=1.0)", ".clamp(min=1.0, max=1.0)"),
    "twice the weight decay": (
        "training/optimizer.py",
        "settings.weight_decay * row",
        "2 * settings.weight_decay * row",
    ),
    "other windows": ("training/batches.py", "np.array([seed, step]", "np.array([step, seed]"),
    "other validation windows": ("training/batches.py", "(self._starts - 1) //", "(self._starts - 2) //"),
    "the loss of fewer steps": ("training/trainer.py", "[-self.settings.final_loss_steps :", "[-1 :"),
    "divergence a step later": ("training/trainer.py", ">= self._divergence_steps", "> self._divergence_steps"),
    "another split": ("data/documents.py", "_unit(digest[:8])", "_unit(digest[8:16])"),
    "no end of text": ("data/tokenize.py", "[*encoding.ids, end_of_text]", "encoding.ids"),
    "a space before a document": ("data/tokenizer.py", "add_prefix_space=False", "add_prefix_space=True"),
    "more text": ("data/documents.py", "place.bytes >= max_bytes", "place.bytes >= 1.1 * max_bytes"),
    "text ends a document": ("data/tokenizer.py", "encode_special_tokens = True", "encode_special_tokens = False"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_change_of_the_numbers_is_caught(name, tmp_path):
    path, before, after = MUTANTS[name]
    source = shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    text = (source / "mup_moe" / path).read_text()
    assert before in text
    (source / "mup_moe" / path).write_text(text.replace(before, after))
    # With the tolerance, so that the change would be caught on any processor.
    done = run_check(source, **(AVX2 if made_on() == GOLDEN["made_on"] else {}))
    assert done.returncode == 1, "the numbers are within the tolerance"
    assert "Traceback" not in done.stderr, done.stderr


def test_differences_are_found_at_every_depth():
    assert differences({"a": [1.0, 2.0]}, {"a": [1.0, 2.0]}, 0.0) == []
    assert differences({"a": [1.0, 2.0]}, {"a": [1.0, 2.1]}, 0.01) == ["/a/1: 2.0, not 2.1"]
    assert len(differences({"a": 1, "b": 2}, {"a": 1}, TOLERANCE)) == 1
    assert len(differences({"a": "x"}, {"a": "y"}, TOLERANCE)) == 1
    nan = float("nan")
    assert differences([nan], [nan], 0.0) == []
