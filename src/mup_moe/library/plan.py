"""What the rules come to for every parameter of a model: its initialisation, learning rate and weight decay.

The table's multipliers are folded into these, which AdamW does not notice (Tensor Programs V, appendix B): a
weight W under a multiplier m trains as w = m W does from m times the initial values, at m times the learning rate, with
1/m of the weight decay and of eps. So nothing of the model is hooked or wrapped.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mup_moe.config.roles import SIZES, RoleTable, names_in
from mup_moe.files import UserError
from mup_moe.library.tables import roles_of, rules_of
from mup_moe.model.initialize import draw
from mup_moe.model.inventory import TensorSpec
from mup_moe.model.scaling import Factors, factors_of
from mup_moe.parametrization import ROLES, Parametrization, Power

# What torch puts into names where it wraps a module.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_OWN_LOGITS = Power.parse("1/sqrt(head_size)")


@dataclass(frozen=True)
class Entry:
    """A parameter, and what the rules come to for it, relative to the base model.

    spec, base: the tensor in the model and in the base model. factors: with the multiplier folded in; its `init_std` is
    that of entries drawn with variance 1/fan_in of the base model.
    """

    name: str
    spec: TensorSpec
    base: TensorSpec
    factors: Factors
    eps: float  # over that of the optimizer

    @property
    def rescale(self) -> float:
        """What the rules multiply an initial value by that does not follow the width."""
        return self.factors.init_std * (1.0 if self.spec.fill is not None else math.sqrt(self.base.fan_in))


class Plan:
    """The rules applied to a model: made by `parametrize`.

    Holds the model; a parameter is looked up by its name, so that the model may be compiled or sharded meanwhile.
    """

    def __init__(self, model: nn.Module, entries: Mapping[str, Entry], title: str) -> None:
        self.entries = entries
        self._model = model
        self._title = title
        self._done = False

    def initialize_(self, seed: int = 0, scale: float = 1.0) -> None:
        """Draws every parameter anew, as the rules say; `fill` of a role table sets those that are not random.

        The base model's entries have variance scale / fan_in. The numbers depend on the seed and the parameter's name
        and shape alone: on any device, and sharded or not, they are the same.
        """
        if not 0 < scale < math.inf:
            raise UserError(f"scale is {scale!r} but must be a positive number: that of the variances")
        with torch.no_grad():
            for entry, parameter in self._parameters():
                std = entry.factors.init_std * (1.0 if entry.spec.fill is not None else math.sqrt(scale))
                _copy(draw(entry.spec, entry.name, seed) * std, parameter)
        self._done = True

    def rescale_(self, own: str = "constant") -> None:
        """Rescales what the model has drawn itself, as the rules say.

        own: how the model's own initialisation follows the width: "constant" where it does not, as transformers'
        `initializer_range`, or "fan_in" where variances fall with fan_in, as those of `torch.nn.Linear`. Raises
        UserError where the model was initialised by this plan already.
        """
        if own not in ("constant", "fan_in"):
            raise UserError(
                f"own is {own!r} but must be constant or fan_in: how the model's own init follows the width"
            )
        if self._done:
            raise UserError("the model is initialised by this plan already: make a new model to rescale it")
        with torch.no_grad():
            for entry, parameter in self._parameters():
                random = own == "fan_in" and entry.spec.fill is None
                parameter.mul_(entry.rescale * (math.sqrt(entry.spec.fan_in / entry.base.fan_in) if random else 1.0))
        self._done = True

    def groups(
        self, lr: float, weight_decay: float = 0.0, eps: float = 1e-8, undecayed: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Parameter groups for AdamW, or for Adam without weight decay.

        lr, weight_decay, eps: those of the base model; decay is decoupled, as in AdamW, where a step shrinks a weight
        by lr * weight_decay. undecayed: roles without weight decay, such as "norm". SGD needs other rules: its step
        follows the gradient's scale, which folding changes.
        """
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} is {value!r} but must be a number from 0")
        undecayed = {undecayed} if isinstance(undecayed, str) else set(undecayed)
        if unknown := sorted(undecayed - set(ROLES)):
            raise UserError(f"undecayed has {', '.join(unknown)}, but the roles are {', '.join(ROLES)}")
        groups: dict[tuple[float, float, float], list[Tensor]] = {}
        for entry, parameter in self._parameters():
            decay = 0.0 if entry.spec.role in undecayed else weight_decay * entry.factors.weight_decay
            groups.setdefault((lr * entry.factors.lr, decay, eps * entry.eps), []).append(parameter)
        keys = ("lr", "weight_decay", "eps")
        return [{"params": parameters, **dict(zip(keys, key, strict=True))} for key, parameters in groups.items()]

    def _parameters(self) -> Iterator[tuple[Entry, nn.Parameter]]:
        parameters = {clean(name): parameter for name, parameter in self._model.named_parameters()}
        changed = sorted(
            name
            for name in {*parameters, *self.entries}
            if name not in parameters
            or name not in self.entries
            or parameters[name].shape != self.entries[name].spec.shape
        )
        if changed:
            raise UserError(f"the model's parameter {changed[0]!r} is not the one of the plan: make the plan again")
        if meta := [name for name, parameter in parameters.items() if parameter.is_meta]:
            raise UserError(f"the parameter {meta[0]!r} is on the meta device: call the model's `to_empty` first")
        for name, entry in self.entries.items():
            yield entry, parameters[name]

    def __str__(self) -> str:
        """A line for each kind of parameter, the same in all layers; `x` is how many there are."""
        rows: dict[tuple[str, ...], int] = {}
        for entry in self.entries.values():
            spec, base, factors = entry.spec, entry.base, entry.factors
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name)
            fan_in = str(spec.fan_in) if spec.fan_in == base.fan_in else f"{base.fan_in} -> {spec.fan_in}"
            start = f"= {spec.fill * factors.init_std:g}" if spec.fill is not None else f"{factors.init_std:.4g}"
            numbers = (f"{number:.4g}" for number in (factors.lr, factors.weight_decay, entry.eps))
            shape = " x ".join(map(str, spec.shape))
            row = (name, spec.role, shape, fan_in, start, *numbers)
            rows[row] = rows.get(row, 0) + 1
        head = ("parameter", "role", "shape", "fan_in", "init std", "lr", "decay", "eps", "x")
        lines = [head, *((*row, str(count)) for row, count in rows.items())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        total = sum(entry.spec.size for entry in self.entries.values())
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([self._title, *table, f"{len(self.entries)} parameters with {total:,} entries"])


def parametrize(
    model: nn.Module,
    base: nn.Module,
    rules: str | Mapping[str, Any] | Parametrization = "mup",
    roles: str | Mapping[str, Any] | RoleTable | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    base_sizes: Mapping[str, int] | None = None,
    logits_scaled: bool = False,
) -> Plan:
    """What the rules say of each parameter of a model (paper, Table 1), relative to the same model at the base width.

    model: any module; its values are not touched. base: the same module at the base width, with the same names; only
    shapes are read, so it may be on the meta device. rules: a row of the table of config.yaml, or your own. roles: a
    role table of config.yaml, or your own; None: the one for the model's type of transformers. sizes, base_sizes: what
    rules refer to beside fan_in and fan_out, where the models have no `config` that says it. logits_scaled: the
    attention scales its logits by the rule already (see below).

    Raises UserError for a parameter that no pattern or several match; a size that the rules need and nothing gives; a
    tensor of two names (tied weights) that the rules treat differently; and heads that grow, where the rules ask for
    another scale of the attention logits than 1/sqrt(head_size), which is in no parameter.
    """
    row = rules_of(rules)
    model, base = (_unwrapped(what, given) for what, given in (("model", model), ("base", base)))
    config = getattr(model, "config", None)
    table = roles_of(roles, getattr(config, "model_type", None))
    ours, theirs = (sizes_in(table, of_one, given) for of_one, given in ((model, sizes), (base, base_sizes)))
    base_shapes = {clean(name): tuple(p.shape) for name, p in base.named_parameters(remove_duplicate=False)}
    named: dict[int, list[Entry]] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = clean(raw)
        if name not in base_shapes:
            raise UserError(f"the base model has no parameter {name!r}: make both of the same layers and experts")
        if not parameter.is_floating_point():
            raise UserError(f"the parameter {name!r} is of {parameter.dtype}: make the plan before it is quantised")
        try:
            pattern = table.entry(name)
            spec, at_base = (
                TensorSpec.by(pattern, name, shape) for shape in (tuple(parameter.shape), base_shapes[name])
            )
            found = factors_of(row, spec, at_base, ours, theirs, 1.0 / at_base.fan_in)
        except KeyError as error:
            raise _missing(row, table, str(error.args[0])) from None
        except ArithmeticError:
            raise UserError(f"the rules {row.name} come to no number for `{name}`: look at their powers") from None
        except ValueError as error:
            raise UserError(str(error)) from None
        named.setdefault(id(parameter), []).append(Entry(name, spec, at_base, found.folded(), 1 / found.multiplier))
    for first, *others in named.values():
        for other in others:
            if (first.factors, first.eps) != (other.factors, other.eps):
                raise UserError(
                    f"`{first.name}` ({first.spec.role}) and `{other.name}` ({other.spec.role}) are one tensor, which"
                    f" {row.name} treats in two ways: untie them, or give both the role {first.spec.role} and scale the"
                    " output yourself"
                )
    _check_logits(row, table, ours, theirs, logits_scaled)
    entries = {first.name: first for first, *_ in named.values()}
    return Plan(model, entries, f"rules {row.name}, roles {table.name}: factors over the base model's")


def clean(name: str) -> str:
    """A parameter's name without what torch put in as it wrapped modules."""
    return _WRAPPERS.sub("", name)


def _unwrapped(what: str, model: object) -> nn.Module:
    """The model within what trains it on several devices."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module):
        raise UserError(f"the {what} is of type {type(model).__name__}, not a torch.nn.Module")
    return model


def sizes_in(table: RoleTable, model: nn.Module, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """The sizes that rules may refer to, by a model's config, and over them those that are given. Raises UserError."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(type(size) is int and size > 0 for size in given.values()):
        raise UserError(f"sizes are {given!r} but must be whole numbers from 1 by their names")
    config = getattr(model, "config", None)
    names = {name for _, texts in table.sizes for text in texts for name in names_in(text)}
    fields = {name: getattr(config, name, None) for name in names}
    if unknown := sorted(map(str, set(given) - set(SIZES))):
        raise UserError(f"sizes has {', '.join(unknown)}, but the sizes of a layer are {', '.join(SIZES)}")
    try:
        return table.sizes_of(fields) | dict(given)
    except ValueError as error:
        raise UserError(str(error)) from None


def _missing(row: Parametrization, table: RoleTable, size: str) -> UserError:
    return UserError(
        f"the rules {row.name} refer to {size}, which roles {table.name!r} do not find in the model's config: give"
        f" sizes={{{size!r}: ...}} and base_sizes={{{size!r}: ...}}"
    )


def _check_logits(
    row: Parametrization, table: RoleTable, sizes: Mapping[str, int], base: Mapping[str, int], scaled: bool
) -> None:
    if scaled or row.attention_logits == _OWN_LOGITS:
        return
    try:
        ratio = row.attention_logits.ratio(sizes, base) / _OWN_LOGITS.ratio(sizes, base)
    except KeyError as error:
        raise _missing(row, table, str(error.args[0])) from None
    if not math.isclose(ratio, 1.0):
        raise UserError(
            f"a head has the size {sizes['head_size']}, and {base['head_size']} in the base model: {row.name} scales"
            f" attention logits by {row.attention_logits}, the model by 1/sqrt(head_size); keep the size of heads, or"
            f" multiply the logits by {ratio:.4g} (the `scaling` of transformers' attention) and say logits_scaled=True"
        )


def _copy(whole: Tensor, parameter: nn.Parameter) -> None:
    """Copies values into a parameter, or its own part of them into a shard; every process has drawn them all."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)
