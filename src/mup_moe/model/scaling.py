"""Where the table meets the tensors: initialisation, multipliers, learning rates, weight decay."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mup_moe.config.settings import ModelSettings
from mup_moe.model.attention import Attention
from mup_moe.model.shape import ModelShape
from mup_moe.model.transformer import Transformer
from mup_moe.model.weight import Weight, weights_of
from mup_moe.parametrization import Parametrization


@dataclass(frozen=True)
class Factors:
    """What a tensor's rule comes to at its shape.

    init_std: standard deviation of its entries; multiplier: of its product; adam_lr and
    weight_decay: factors of the global ones.
    """

    init_std: float
    multiplier: float
    adam_lr: float
    weight_decay: float


def factors(
    parametrization: Parametrization, shape: ModelShape, base: ModelShape, settings: ModelSettings
) -> dict[str, Factors]:
    """The factors of every tensor, by name, relative to the base shape (paper, Table 1)."""
    with torch.device("meta"):
        weights = weights_of(Transformer(shape, settings))
        base_weights = weights_of(Transformer(base, settings))
    result = {}
    for name, weight in weights.items():
        rule = parametrization.rule(weight.role)
        sizes, base_sizes = _sizes(shape, weight), _sizes(base, base_weights[name])
        variance = settings.init_scale / (base_weights[name].fan_in if settings.init == "fan_in" else 1)
        if weight.into_residual and settings.scale_residual_init:
            variance /= 2 * settings.blocks
        result[name] = Factors(
            init_std=math.sqrt(variance * rule.init_variance.ratio(sizes, base_sizes)),
            multiplier=rule.multiplier.ratio(sizes, base_sizes),
            adam_lr=rule.adam_lr.ratio(sizes, base_sizes),
            weight_decay=rule.weight_decay.ratio(sizes, base_sizes),
        )
    return result


def attention_logit_scale(parametrization: Parametrization, shape: ModelShape, base: ModelShape) -> float:
    """The scale of q.k: 1/sqrt(head_size) at the base shape, and the table's rule from there."""
    ratio = parametrization.attention_logits.ratio(_sizes(shape), _sizes(base))
    return ratio / math.sqrt(base.head_size)


def initialize(
    model: Transformer, base: ModelShape, replicas: Sequence[tuple[Parametrization, int]]
) -> list[dict[str, Factors]]:
    """Fills every tensor of every replica, given as (parametrization, seed); returns their factors.

    The numbers drawn depend on the seed, the tensor's name and its shape alone, so parametrizations
    that agree on a tensor start from the same values, on every device.
    """
    table = [factors(rules, model.shape, base, model.settings) for rules, _ in replicas]
    with torch.no_grad():
        for name, weight in weights_of(model).items():
            for seed in dict.fromkeys(seed for _, seed in replicas):
                # Drawn once for all replicas of a seed, on the CPU: a large model has many numbers.
                unit = _draw(weight, name, seed).to(weight.value.device)
                for replica, (_, its_seed) in enumerate(replicas):
                    if its_seed == seed:
                        std = 1.0 if weight.fill is not None else table[replica][name].init_std
                        torch.mul(unit, std, out=weight.value[replica])
            weight.multiplier_R = _unless_all_one([row[name].multiplier for row in table], weight.value.device)
        scales = [attention_logit_scale(rules, model.shape, base) for rules, _ in replicas]
        for module in model.modules():
            if isinstance(module, Attention):
                module.logit_scale_R.copy_(torch.tensor(scales))
    return table


def _draw(weight: Weight, name: str, seed: int) -> Tensor:
    """What a replica's tensor is in units of its standard deviation, or its fill."""
    shape = weight.value.shape[1:]
    if weight.fill is not None:
        return torch.full(shape, weight.fill)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    return torch.randn(shape, generator=generator)


def _unless_all_one(multipliers: Sequence[float], device: torch.device) -> Tensor | None:
    if all(multiplier == 1 for multiplier in multipliers):
        return None
    return torch.tensor(multipliers, device=device)


def _sizes(shape: ModelShape, weight: Weight | None = None) -> Mapping[str, int]:
    fans = {"fan_in": weight.fan_in, "fan_out": weight.fan_out} if weight is not None else {}
    return asdict(shape) | fans
