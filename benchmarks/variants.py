"""Variants of a training step, which the benchmarks time.

python benchmarks/variants.py [PRESET] [--own-block] > request.json

prints the training request that the benchmarks start from. On machines without pydantic, pass it to the other scripts
with `--request request.json`. --own-block: use the block of figure 1's set-up, instead of one that has an equal among
dense peers.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT

from mup_moe.config.cell import LearningRate
from mup_moe.model.inventory import size_of
from mup_moe.ops.device import step_on
from mup_moe.training.device import precision_on, prepare_gpus
from mup_moe.training.memory import replicas_on
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import Trainer

VOCABULARY = 1024
# Replicas of a stack if the device takes any number: the learning rates of a curve.
CURVE = 9
OURS, PEER, NANO = "mup-moe", "transformers", "nanoGPT-mup"
# Rates so low that no replica diverges, because that would shrink the stack while it is timed.
_SLOWEST_RATE, _RATES = 2.0**-10, 9
# More than any measurement takes, so that the clock ends a run.
_STEPS = 100_000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the training steps of one shape.

    system: whose code runs (`OURS`, `PEER`, `NANO`). precision: float32, bfloat16 (autocast), or bfloat16-weights
    (without a float32 copy of the weights). batch_size: sequences per step. step: eager, compiled or graph. allocator:
    stock, or kept (malloc keeps freed pages). experts_implementation, attention: as transformers names them.
    """

    system: str
    architecture: str
    width: int
    experts: int
    precision: str
    step: str
    batch_size: int
    allocator: str = "kept"
    granularity: int = 1
    replicas: int = 1
    experts_implementation: str = ""
    attention: str = ""
    device: str = "cpu"

    def request(self, base: TrainingRequest) -> TrainingRequest:
        """Returns the training request of this shape."""
        cell = replace(
            base.cell,
            architecture=self.architecture,
            width=self.width,
            experts=self.experts,
            granularity=self.granularity,
        )
        # Peers take the precision from the variant; nothing of ours trains in bfloat16-weights.
        precision = self.precision.removesuffix("-weights")
        training = replace(base.training, steps=_STEPS, precision=precision, batch_size=self.batch_size)
        return TrainingRequest(cell, base.model, training, base.parametrization)

    def __str__(self) -> str:
        parts = [self.system, self.architecture, f"width {self.width}"]
        parts += [f"{self.experts} experts"] * (self.architecture == "moe")
        parts += [f"granularity {self.granularity}"] * (self.granularity > 1)
        parts += [f"{self.replicas} replicas"] * (self.replicas > 1)
        parts += [self.precision, self.step, self.experts_implementation, self.attention, f"{self.allocator} allocator"]
        return ", ".join(part for part in parts if part)


def default_variant(base: TrainingRequest, device: str, **shape: Any) -> Variant:
    """Returns how the pipeline trains a shape by default, with one replica."""
    there, training = torch.device(device), replace(base.training, precision="auto")
    how = {"precision": precision_on(there, training), "step": step_on(there, "auto")}
    how |= {"batch_size": base.training.batch_size}
    return Variant(system=OURS, device=device, **{"architecture": "moe", "experts": base.cell.experts} | how | shape)


def stacked_variant(base: TrainingRequest, device: str, **shape: Any) -> Variant:
    """Returns the `default_variant` with as many replicas as the pipeline stacks."""
    alone = default_variant(base, device, **shape)
    request = alone.request(base)
    parameters = size_of(request.cell, request.model, VOCABULARY).parameters
    return replace(alone, replicas=replicas_on(torch.device(device).type, "auto", parameters) or CURVE)


BLOCK = (
    *("top_k", "capacity_factor", "renormalize_gates", "activation", "gated", "ffn_ratio"),
    *("norm", "positions", "final_norm"),
)


def read_request(path: Path | None, preset: str | None = None, own_block: bool = False) -> TrainingRequest:
    """Reads a request from a file, or makes one of the size of figure 1's muP MoE in config.yaml and a preset."""
    if path is not None:
        return TrainingRequest.from_json(path.read_text(encoding="utf-8"))
    # These need pydantic, which a GPU machine may lack.
    from mup_moe.config.document import read_document
    from mup_moe.config.load import DEFAULT_PRESET, overlay, read_preset, validate
    from mup_moe.parametrization import parse_table

    over = read_preset(ROOT / "presets", preset or DEFAULT_PRESET)
    config = validate(overlay(read_document(ROOT / "config.yaml"), over))
    cell = next(cell for cell in config.figures["figure1"].cells() if cell.parametrization == "mup")
    setup = config.setups[cell.setup]
    rules = parse_table(config.parametrizations)[cell.parametrization]
    if own_block:
        return TrainingRequest(cell, setup.model, setup.training, rules)
    # The block of the set-up `small`, because the peers have no dense equal of a gated block.
    block = {name: getattr(config.setups["small"].model, name) for name in BLOCK}
    return TrainingRequest(replace(cell, setup="small"), replace(setup.model, **block), setup.training, rules)


def token_stream(vocabulary: int = VOCABULARY) -> np.ndarray:
    """Returns token ids to train on. They only matter to the router, so their frequencies are skewed as in text."""
    return (np.random.default_rng(0).zipf(1.3, 200_000) % vocabulary).astype(np.uint16)


@dataclass(frozen=True)
class Model:
    """What is timed: `run` takes a number of steps, and returns when they are done.

    Sizes are counted like `model_size` does; tokens_per_step is over all replicas, flops_per_token of one.
    """

    run: Callable[[int], None]
    tokens_per_step: int
    parameters: int
    active_parameters: int
    flops_per_token: int


def trainer_of(variant: Variant, base: TrainingRequest) -> Trainer:
    """Returns a stack of ours, trained as `mup_moe train` does."""
    device = torch.device(variant.device)
    if variant.device == "cuda":
        prepare_gpus()
    tokens = token_stream()
    request = variant.request(base)
    requests = [
        replace(request, cell=replace(request.cell, learning_rate=LearningRate(_SLOWEST_RATE * 2 ** (i / 4)), seed=s))
        for s, i in (divmod(replica, _RATES) for replica in range(variant.replicas))
    ]
    return Trainer(requests, tokens, tokens, VOCABULARY, device, variant.step)


def build_ours(variant: Variant, base: TrainingRequest) -> Model:
    """Returns a stack of ours for timing."""
    trainer = trainer_of(variant, base)
    size = trainer.size
    return Model(
        run=lambda steps: trainer.run(trainer.step + steps),
        tokens_per_step=trainer.tokens_per_step * variant.replicas,
        parameters=size.parameters,
        active_parameters=size.active_parameters,
        flops_per_token=size.flops_per_token,
    )


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--own-block"]
    print(read_request(None, *words[:1], own_block="--own-block" in sys.argv).to_json())
