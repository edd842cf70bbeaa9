"""Initial values of all tensors."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mup_moe.model.attention import Attention
from mup_moe.model.inventory import ModelShape, TensorSpec
from mup_moe.model.layers import weights_of
from mup_moe.model.replicas import ReplicaModel
from mup_moe.model.scaling import Factors, attention_logit_scale, factors
from mup_moe.parametrization import Parametrization


def initialize(
    model: ReplicaModel, base: ModelShape, replicas: Sequence[tuple[Parametrization, int]]
) -> list[dict[str, Factors]]:
    """Fills every tensor of every replica, given as (parametrization, seed), and returns each replica's factors.

    The random numbers depend only on the seed and the tensor's name and shape. Parametrizations that agree on a
    tensor therefore start from the same values, on every device.
    """
    table = [factors(rules, model.shape, base, model.settings) for rules, _ in replicas]
    with torch.no_grad():
        for name, weight in weights_of(model).items():
            for seed in dict.fromkeys(seed for _, seed in replicas):
                # Drawn on the CPU, once for all replicas of a seed, since a large model takes many random numbers.
                unit = draw(weight.spec, name, seed).to(weight.value.device)
                for replica, (_, its_seed) in enumerate(replicas):
                    if its_seed == seed:
                        torch.mul(unit, table[replica][name].init_std, out=weight.value[replica])
            multipliers = [row[name].multiplier for row in table]
            device = weight.value.device
            weight.multiplier_R = None if set(multipliers) == {1} else torch.tensor(multipliers, device=device)
        scales = [attention_logit_scale(rules, model.shape, base) for rules, _ in replicas]
        for module in model.modules():
            if isinstance(module, Attention):
                module.logit_scale_R.copy_(torch.tensor(scales))
    return table


def draw(spec: TensorSpec, name: str, seed: int) -> Tensor:
    """Returns a tensor's initial values in units of its standard deviation, or its fill."""
    if spec.fill is not None:
        return torch.full(spec.shape, spec.fill)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    if spec.alike:
        return torch.randn(spec.shape[1:], generator=generator).expand(spec.shape)
    return torch.randn(spec.shape, generator=generator)
