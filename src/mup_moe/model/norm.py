"""Norms over the width. Axes: R replicas, N tokens, D width."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.inventory import norm_tensors
from mup_moe.model.shape import ModelShape
from mup_moe.model.weight import Weight

# Each with torch's own eps.
_NORMS: dict[str, Callable[..., Tensor]] = {"layernorm": F.layer_norm, "rmsnorm": F.rms_norm}


class Norm(nn.Module):
    """LayerNorm with gain and bias, or RMSNorm with a gain (Zhang and Sennrich, 2019); each replica its own."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        tensors = norm_tensors(shape, settings)
        self.normalize = _NORMS[settings.norm]
        self.gain = Weight(tensors["gain"], replicas)
        self.bias = Weight(tensors["bias"], replicas) if "bias" in tensors else None

    def forward(self, x_RND: Tensor) -> Tensor:
        """Normalised tokens [R, N, D]."""
        y_RND = self.gain.scale(self.normalize(x_RND, x_RND.shape[-1:]) * self.gain.value[:, None])
        return y_RND if self.bias is None else y_RND + self.bias.scale(self.bias.value[:, None])
