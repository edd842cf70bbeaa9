"""Measures models over their first steps: the coordinate check, Lemma B.1, and what changes an MoE layer's output.

Axes: R replicas, N tokens, D width, K top-k, E experts.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from mup_moe.config.settings import Measure
from mup_moe.data.tokens import Tokens
from mup_moe.model.layers import OBSERVED, Tap, weights_of
from mup_moe.model.moe import MoE
from mup_moe.parametrization import GROUPS, ROLES
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import Trainer

COVARIANCE = ("inner product", "cosine", "router-logit gradient", "router logits", "router-logit change")
# Name of a change of an MoE layer's output -> the roles whose present tensors are used.
CHANGES = {
    "change": ROLES,
    "change by expert_down": ("expert_down",),
    "change by expert_up": ("expert_up",),
    "change by router": ("router",),
    "change by experts": GROUPS["experts"],
}

# (quantity, block) -> value; block "" means outside of the blocks.
Values = dict[tuple[str, str], float]
Seen = dict[str, Tensor]


def measure(
    request: TrainingRequest, what: Measure, steps: Sequence[int], tokens: Tokens, device: torch.device
) -> Iterator[tuple[int, tuple[tuple[str, str], float]]]:
    """Trains one model and yields (steps taken, ((quantity, block), value)) at each of the ascending `steps`.

    All are measured on the batch of step 0, so that only the model changes. Stops when the model diverges.
    """
    trainer = Trainer([request], tokens.train, tokens.valid, tokens.vocabulary, device)
    look: Callable[[], Values] | None = None
    for step in steps:
        trainer.run(until=step)
        if trainer.step < step:
            return
        look = look or _MEASURES[what](trainer, trainer.training_batch(0))
        yield from ((step, item) for item in look().items())


def _activations(trainer: Trainer, windows_RBS: Tensor) -> Callable[[], Values]:
    return lambda: activations(observe(trainer, windows_RBS))


def _covariance(trainer: Trainer, windows_RBS: Tensor) -> Callable[[], Values]:
    seen = observe(trainer, windows_RBS)
    first = {path: tensor.detach().clone() for path, tensor in seen.items() if path.endswith("logits")}
    return lambda: covariance(observe(trainer, windows_RBS), first)


def _contributions(trainer: Trainer, windows_RBS: Tensor) -> Callable[[], Values]:
    first = layers_of(trainer, windows_RBS)
    return lambda: contributions(first)


# Each takes the model in its initial state and returns a function that measures its current values.
_MEASURES: Mapping[Measure, Callable[[Trainer, Tensor], Callable[[], Values]]] = {
    "activations": _activations,
    "covariance": _covariance,
    "contributions": _contributions,
}


def observe(trainer: Trainer, windows_RBS: Tensor) -> Seen:
    """Returns what every tap of the model sees for windows [R, B, S + 1], with gradients; trains nothing.

    The gradients are of the mean cross-entropy, without the auxiliary losses that training also minimizes.
    """
    seen: Seen = {}

    def keep(path: str, _module: object, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        seen[path] = output

    taps = {path: module for path, module in trainer.model.named_modules() if isinstance(module, Tap)}
    handles = [tap.register_forward_hook(partial(keep, path)) for path, tap in taps.items()]
    try:
        trainer.losses(windows_RBS)["train_loss"].sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    for parameter in trainer.model.parameters():
        parameter.grad = None
    return seen


def activations(seen: Seen) -> Values:
    """Returns the mean absolute entries (coordinate check of Tensor Programs V) of what `OBSERVED` lists.

    A token for which no expert had a row has no MoE output and is left out of that mean.
    """

    def size(path: str, tensor: Tensor) -> float:
        gates_RKN = seen.get(path.removesuffix("feed_forward_output") + "feed_forward.gates")
        if path.endswith("feed_forward_output") and gates_RKN is not None:
            tensor = tensor[(gates_RKN != 0).any(1)]
        return float(tensor.detach().float().abs().mean())

    return {
        (quantity, block): size(path, tensor)
        for wanted, quantity in OBSERVED.items()
        for path, tensor in seen.items()
        for block, name in [_split(path)]
        if name == wanted
    }


def covariance(seen: Seen, first: Seen) -> Values:
    """Measures how experts align with the gradient that they receive (paper, Lemma B.1), for each block.

    Let E be an expert's output and g the gradient of the cross-entropy, summed over tokens, with respect to the
    layer's output. Over the assignments that found a row, the values are the root mean squares of the inner product
    of E and g (the gradient with respect to the gate) and of their cosine. Over tokens and experts, they are the root
    mean squares of that loss's gradient with respect to a router logit and of a logit's change since `first`, and the
    standard deviation of the logits.
    """
    found: Values = {}
    for path, gates_RKN in seen.items():
        block, name = _split(path)
        if name != "feed_forward.gates":
            continue
        layer = path.removesuffix(".feed_forward.gates")
        experts_RKND = seen[f"{layer}.feed_forward.expert_outputs"].detach()
        logits_RNE = seen[f"{layer}.feed_forward.logits"]
        # Converts the gradient of the mean over N tokens to that of the sum.
        tokens = gates_RKN.shape[-1]
        inner_RKN = tokens * _gradient(gates_RKN)
        gradient_RND = tokens * _gradient(seen[f"{layer}.feed_forward_output"])
        norms_RKN = experts_RKND.norm(dim=-1) * gradient_RND.norm(dim=-1)[:, None]
        kept_RKN = gates_RKN.detach() != 0
        change_RNE = logits_RNE.detach() - first[f"{layer}.feed_forward.logits"]
        values = (
            _rms(inner_RKN[kept_RKN]),
            _rms((inner_RKN / norms_RKN)[kept_RKN & (norms_RKN > 0)]),
            _rms(tokens * _gradient(logits_RNE)),
            float(logits_RNE.detach().std()),
            _rms(change_RNE),
        )
        found |= {(quantity, block): value for quantity, value in zip(COVARIANCE, values, strict=True)}
    return found


@dataclass(frozen=True)
class Layer:
    """An MoE layer of a model in training, with its inputs and parameters at some step."""

    moe: MoE
    x_RND: Tensor
    parameters: Mapping[str, Tensor]

    def output(self, roles: Collection[str]) -> Tensor:
        """Returns its output [R, N, D] for these inputs, with the present tensors of the given roles."""
        now = {
            f"{name}.value": weight.value for name, weight in weights_of(self.moe).items() if weight.spec.role in roles
        }
        with torch.no_grad():
            y_RND: Tensor = functional_call(self.moe, {**self.parameters, **now}, (self.x_RND,))[0]
        return y_RND


def layers_of(trainer: Trainer, windows_RBS: Tensor) -> dict[str, Layer]:
    """Returns the present MoE layer of each block, by the block's name."""
    found: dict[str, Layer] = {}

    def keep(block: str, moe: MoE, inputs: tuple[Tensor], _output: object) -> None:
        parameters = {name: parameter.detach().clone() for name, parameter in moe.named_parameters()}
        found[block] = Layer(moe, inputs[0].detach().float(), parameters)

    layers = {_split(path)[0]: module for path, module in trainer.model.named_modules() if isinstance(module, MoE)}
    handles = [moe.register_forward_hook(partial(keep, block)) for block, moe in layers.items()]
    try:
        with torch.no_grad():
            trainer.losses(windows_RBS)
    finally:
        for handle in handles:
            handle.remove()
    return found


def contributions(first: Mapping[str, Layer]) -> Values:
    """Measures how the tensors of each MoE layer change its output, for the inputs of the first step.

    The values are root mean squares over tokens and width, in float32: of the output at the present parameters, and of
    the changes when some roles have their present tensors and the others their first ones (`CHANGES`). A change of the
    router includes its different choice of experts.
    """
    found: Values = {}
    for block, layer in first.items():
        before_RND = layer.output(())
        found["output", block] = _rms(layer.output(ROLES))
        found |= {(change, block): _rms(layer.output(roles) - before_RND) for change, roles in CHANGES.items()}
    return found


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None  # every tap is between parameters and loss
    return tensor.grad


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _split(path: str) -> tuple[str, str]:
    """Splits a tap's path into block and name, as in ("1", "feed_forward.logits"); "" is outside of the blocks."""
    parts = path.split(".", 2)
    return (parts[1], parts[2]) if parts[0] == "blocks" else ("", path)
