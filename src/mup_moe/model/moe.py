"""A mixture-of-experts layer with static shapes: router, dispatch, experts, combination.

Axes: R replicas, N tokens, D width, E experts, K experts of a token, C slots per expert,
M = E * C slots, F expert size. Every shape follows from the settings alone, so that the layer
compiles, can be captured in a CUDA graph, and carries replicas.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from mup_moe.config.settings import ModelSettings
from mup_moe.model.dispatch import Routing, assign_slots, capacity, combine, dispatch, gather_outputs
from mup_moe.model.inventory import ModelShape, moe_tensors
from mup_moe.model.layers import ACTIVATIONS, Tap, Weight, feed_forward
from mup_moe.model.router import Choice, Router


@dataclass(frozen=True)
class Routed:
    """What a layer's router did with a batch: what it chose, and what came of it."""

    choice: Choice
    routing: Routing


class MoE(nn.Module):
    """Router and experts: y = sum over the chosen experts of gate_k * E_k(x)."""

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int) -> None:
        super().__init__()
        self.shape = shape
        self.settings = settings
        tensors = moe_tensors(shape, settings)
        self.router = Router(tensors["router"], settings, shape.active_experts, replicas)
        self.up = Weight(tensors["up"], replicas)
        self.gate = Weight(tensors["gate"], replicas) if "gate" in tensors else None
        self.down = Weight(tensors["down"], replicas)
        self.logits, self.gates, self.expert_outputs = Tap(), Tap(), Tap()

    def experts(self, x_RMD: Tensor) -> Tensor:
        """Each expert's output for the rows in its slots, [R, M, D]."""
        return feed_forward(x_RMD, self.up, self.gate, self.down, ACTIVATIONS[self.settings.activation])

    def forward(self, x_RND: Tensor) -> tuple[Tensor, Routed]:
        """Tokens [R, N, D] to tokens [R, N, D], and what the router did."""
        slots = capacity(x_RND.shape[1], self.shape, self.settings.capacity_factor)
        choice = self.router.choose(self.logits(self.router.logits(x_RND)))
        routing = assign_slots(choice, slots)
        y_RMD = self.experts(dispatch(x_RND, routing))
        z_RKND = self.expert_outputs(gather_outputs(y_RMD, routing))
        return combine(z_RKND, self.gates(routing.gates_RKN)), Routed(choice, routing)
