"""A mixture-of-experts layer with static shapes: router, dispatch, experts, combination.

Axes: R replicas, N tokens, D width, E experts, K experts of a token, C slots per expert,
M = E * C slots, F expert size. Every shape follows from the settings alone, so that the layer
compiles, can be captured in a CUDA graph, and carries replicas.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.dispatch import Load, assign_slots, capacity, combine, dispatch, gather_outputs
from mup_moe.model.inventory import ModelShape, moe_tensors
from mup_moe.model.layers import ACTIVATIONS, Tap, Weight, feed_forward
from mup_moe.model.router import Choice, Router, choose


@dataclass(frozen=True)
class Routed:
    """What a layer's router did with a batch: what it chose, and what came of it."""

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
        """Tokens [R, N, D] to tokens [R, N, D], and what the router did."""
        settings, shape = self.settings, self.shape
        logits_RNE = self.logits(self.router.logits(x_RND))
        choice = choose(logits_RNE, shape.active_experts, settings.gates, settings.renormalize_gates)
        routing = assign_slots(choice, capacity(x_RND.shape[1], shape, settings.capacity_factor))
        y_RMD = feed_forward(dispatch(x_RND, routing), self.up, self.gate, self.down, ACTIVATIONS[settings.activation])
        z_RKND = self.expert_outputs(gather_outputs(y_RMD, routing))
        return combine(z_RKND, self.gates(routing.gates_RKN)), Routed(choice, routing)
