"""A mixture-of-experts layer: router, dispatch, experts, combination.

Axes: R replicas, N tokens, D width, E experts, K experts of a token, C rows per expert at most,
M rows of all replicas and experts, F expert size. When a step is compiled or captured as a CUDA graph, the settings
alone determine every shape; float32 on a CPU leaves out empty rows.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.dispatch import Load, assign_rows, capacity, combine, dispatch, gather_outputs
from mup_moe.model.inventory import ModelShape, moe_tensors
from mup_moe.model.layers import ACTIVATIONS, Tap, Weight, feed_forward
from mup_moe.model.operators import prefers_static
from mup_moe.model.products import prefers_runs
from mup_moe.model.router import Choice, Router, choose


@dataclass(frozen=True)
class Routed:
    """What a layer's router did with a batch: its choices and the resulting load."""

    choice: Choice
    routing: Load


class MoE(nn.Module):
    """Router and experts: y = sum over the chosen experts of gate_k * E_k(x)."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        self.shape = shape
        self.settings = settings
        tensors = moe_tensors(shape, settings)
        self.router = Router(tensors["router"], replicas)
        self.up = Weight(tensors["up"], replicas)
        self.gate = Weight(tensors["gate"], replicas) if "gate" in tensors else None
        self.down = Weight(tensors["down"], replicas)
        self.logits, self.gates, self.expert_outputs = Tap(), Tap(), Tap()

    def forward(self, x_RND: Tensor) -> tuple[Tensor, Routed]:
        """Maps tokens [R, N, D] to tokens [R, N, D], and returns what the router did."""
        settings, shape = self.settings, self.shape
        logits_RNE = self.logits(self.router.logits(x_RND))
        choice = choose(logits_RNE, shape.active_experts, settings.gates, settings.renormalize_gates)
        rows = capacity(x_RND.shape[1], shape, settings.capacity_factor)
        ragged = not prefers_static(x_RND.device) and prefers_runs(self.up.value, self.down.value)
        routing = assign_rows(choice, rows, ragged)
        up, down = (partial(weight.times_each, ends_G=routing.ends_G) for weight in (self.up, self.down))
        gate = None if self.gate is None else partial(self.gate.times_each, ends_G=routing.ends_G)
        y_MD = feed_forward(dispatch(x_RND, routing), up, gate, down, ACTIVATIONS[settings.activation])
        z_RKND = self.expert_outputs(gather_outputs(y_MD, routing))
        return combine(z_RKND, self.gates(routing.gates_RKN)), Routed(choice, routing)
