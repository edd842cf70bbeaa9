"""Applies the parametrization table to tensors: initialization, multipliers, learning rates, weight decay.

Needs no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from mup_moe.config.settings import ModelSettings
from mup_moe.model.inventory import ModelShape, TensorSpec, tensors_of
from mup_moe.parametrization import Parametrization


@dataclass(frozen=True)
class Factors:
    """The values of a tensor's rule at its shape."""

    init_std: float  # the standard deviation of its entries
    multiplier: float  # of its product
    lr: float  # relative to the global learning rate
    weight_decay: float  # relative to the global weight decay

    def folded(self) -> "Factors":
        """Returns the factors that train identically under Adam with the multiplier folded into the tensor.

        Adam's eps must then be divided by the multiplier.
        """
        by = self.multiplier
        return Factors(self.init_std * by, 1.0, self.lr * by, self.weight_decay / by)


def factors(
    parametrization: Parametrization, shape: ModelShape, base: ModelShape, settings: ModelSettings
) -> dict[str, Factors]:
    """Returns the factors of every tensor by name, relative to the base shape (paper, Table 1)."""
    base_tensors = tensors_of(base, settings)
    result = {}
    for name, tensor in tensors_of(shape, settings).items():
        variance = settings.init_scale / (base_tensors[name].fan_in if settings.init == "fan_in" else 1)
        if tensor.into_residual and settings.scale_residual_init:
            variance /= 2 * settings.blocks
        result[name] = factors_of(parametrization, tensor, base_tensors[name], asdict(shape), asdict(base), variance)
    return result


def factors_of(
    parametrization: Parametrization,
    tensor: TensorSpec,
    base_tensor: TensorSpec,
    sizes: Mapping[str, int],
    base_sizes: Mapping[str, int],
    variance: float,
) -> Factors:
    """Returns the factors of one tensor (paper, Table 1).

    sizes: the sizes of its layer. variance: the variance of the base tensor's entries. Raises KeyError if `sizes` lacks
    a size that the rule refers to.
    """
    rule = parametrization.rule(tensor.role)
    sizes, base_sizes = _with_fans(sizes, tensor), _with_fans(base_sizes, base_tensor)
    variance *= rule.init_variance.ratio(sizes, base_sizes)
    return Factors(
        init_std=math.sqrt(variance) if tensor.fill is None else 1.0,
        multiplier=rule.multiplier.ratio(sizes, base_sizes),
        lr=rule.lr.ratio(sizes, base_sizes) * parametrization.lr_scale.get(tensor.role, 1.0),
        weight_decay=rule.weight_decay.ratio(sizes, base_sizes),
    )


def attention_logit_scale(parametrization: Parametrization, shape: ModelShape, base: ModelShape) -> float:
    """Returns the scale of q.k: 1/sqrt(head_size) at the base shape, scaled from there by the table's rule."""
    ratio = parametrization.attention_logits.ratio(asdict(shape), asdict(base))
    return ratio / math.sqrt(base.head_size)


def _with_fans(sizes: Mapping[str, int], tensor: TensorSpec) -> Mapping[str, int]:
    return {**sizes, "fan_in": tensor.fan_in, "fan_out": tensor.fan_out}
