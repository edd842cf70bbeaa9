"""Models from transformers, trained like our own: each tensor is a `Weight` with a role from a role table.

Axes: B sequences, S positions, N = B * S tokens, E experts, K experts of a token, V vocabulary. The replica axis R has
length 1 here.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mup_moe.config.roles import RoleTable, compiled
from mup_moe.config.settings import ModelSettings
from mup_moe.files import UserError
from mup_moe.model.dispatch import Load
from mup_moe.model.inventory import HubShape, ModelShape, Tensors, TensorSpec
from mup_moe.model.layers import OBSERVED, Tap, Weight
from mup_moe.model.metrics import Pass, measure
from mup_moe.model.moe import Routed
from mup_moe.model.operators import cross_entropy
from mup_moe.model.replicas import ReplicaModel
from mup_moe.model.router import Choice, scores_of

_LONGEST_REASON = 300


@cache
def hub_tensors(shape: ModelShape, hub: HubShape) -> Tensors:
    """Returns all tensors of a transformers model by name. Raises UserError for one without a role."""
    with torch.device("meta"):
        model = make(hub)
    active = shape.active_experts / shape.total_experts
    try:
        return {
            name: TensorSpec.by(hub.roles.entry(name), name, tuple(parameter.shape), active)
            for name, parameter in model.named_parameters()
        }
    except ValueError as error:
        raise UserError(str(error)) from None


def make(hub: HubShape) -> nn.Module:
    """Returns the transformers model of a shape. Raises UserError, also for a field that its config does not have."""
    fields = json.loads(hub.fields)
    model = make_model(hub.model_type, fields)
    config: Any = model.config
    # Attention reads head_dim even from configs that do not list it.
    known = {*type(config)().to_dict(), *config.attribute_map, "head_dim"}
    if unknown := sorted(set(fields) - known):
        raise UserError(
            f"transformers configs of type {hub.model_type!r} have no field {', '.join(unknown)}: correct its name"
        )
    return model


def make_model(model_type: str, fields: Mapping[str, Any]) -> nn.Module:
    """Returns the transformers model, on the current device. Raises UserError if transformers rejects the fields."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # a tiny vocabulary lacks tokens that configs name
    try:
        config = AutoConfig.for_model(model_type, **fields)
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises many types
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UserError(f"transformers cannot make a model of type {model_type!r} from its fields: {reason}") from None
    return model


def observed(model: nn.Module, roles: RoleTable) -> Iterator[tuple[nn.Module, str, str]]:
    """Yields the modules with observed outputs: (module, quantity, block); block is "" outside the blocks."""
    for quantity, pattern in roles.observe:
        expression = compiled(pattern)
        for name, module in model.named_modules():
            if match := expression.fullmatch(name):
                yield module, quantity, match[1] if match.groups() else ""


def tensor_of(output: Any) -> Tensor:
    """Returns a module's output, or the first item if it is a tuple. Raises UserError if that is not a tensor."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise UserError(f"a module in `observe` returns a {type(first).__name__}: name a module that returns a tensor")
    return first


class HubModel(ReplicaModel):
    """One replica of a transformers model.

    The transformers module does the computation, with tensors taken from `Weight`s. Initialization, optimizers,
    checkpoints and probes are therefore shared with our own model. The auxiliary losses are ours too, computed from the
    logits and choices of its routers.
    """

    def __init__(self, shape: ModelShape, settings: ModelSettings, replicas: int = 1) -> None:
        super().__init__(shape, settings, replicas)
        assert shape.hub is not None
        assert replicas == 1, "a transformers model has no replica axis"
        self.roles = shape.hub.roles
        self._weights: Mapping[str, Weight] = {}
        for name, spec in hub_tensors(shape, shape.hub).items():
            self._weights |= {name: _add(self, name, Weight(spec, replicas))}
        model = make(shape.hub)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                # Never read: the tensors of the `Weight`s replace it.
                setattr(module, name, nn.Parameter(parameter.detach().to("meta")))
        # In a tuple, so that its parameters are not registered with this module.
        self._model = (model,)
        self._outputs: dict[tuple[str, str], Any] = {}
        tap_of = {quantity: tap for tap, quantity in OBSERVED.items()}
        for module, quantity, block in observed(model, self.roles):
            path = f"blocks.{block}.{tap_of[quantity]}" if block else tap_of[quantity]
            tap = _add(self, path, Tap())
            module.register_forward_hook(self._hook(quantity, block, tap))

    def _hook(self, quantity: str, block: str, tap: Tap) -> Any:
        outputs = self._outputs

        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[quantity, block] = output
            tap(tensor_of(output))

        return see

    def forward(self, tokens_RBS: Tensor, targets_RBS: Tensor) -> dict[str, Tensor]:
        """Returns the losses, as `ReplicaModel.forward` does."""
        (tokens_BS,) = tokens_RBS
        tensors = {name: weight.scaled()[0] for name, weight in self._weights.items()}
        with self._seeing() as outputs:
            found = functional_call(self._model[0], tensors, (tokens_BS,), {"use_cache": False})
            routed = [self._routed(output) for (quantity, _), output in outputs.items() if quantity == "router logits"]
        losses_RN = cross_entropy(found.logits.flatten(0, 1)[None], targets_RBS.flatten(1))
        return measure(Pass(losses_RN.mean(1), losses_RN, routed))

    @contextmanager
    def _seeing(self) -> Iterator[dict[tuple[str, str], Any]]:
        try:
            yield self._outputs
        finally:
            self._outputs.clear()

    def _routed(self, output: Any) -> Routed:
        """Converts the output of a transformers router: its logits [N, E], gates [N, K] and experts [N, K]."""
        logits_RNE, gates_RNK, expert_RNK = (tensor.flatten(0, -2)[None] for tensor in output)
        _, share_RNE = scores_of(logits_RNE.float(), self.roles.gates)
        choice = Choice(logits_RNE.float(), share_RNE, expert_RNK, gates_RNK)
        counts_E = torch.bincount(expert_RNK.flatten(), minlength=logits_RNE.shape[-1])
        kept_RKN = torch.ones_like(expert_RNK, dtype=torch.bool).transpose(1, 2)
        return Routed(choice, Load(load_RE=counts_E[None] / expert_RNK.numel(), kept_RKN=kept_RKN))


def _add(root: nn.Module, path: str, leaf: Any) -> Any:
    """Adds a module at a dotted path, creating empty parent modules as needed."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, leaf)
    return leaf
