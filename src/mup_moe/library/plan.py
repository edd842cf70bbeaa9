"""Applies the rules to every parameter of a model: initialization, learning rate and weight decay.

The table's multipliers are folded into these three, which leaves training under AdamW unchanged (Tensor Programs V,
appendix B): a weight W with a multiplier m trains exactly like w = m W with m times the initial values, m times the
learning rate, and 1/m of the weight decay and of eps. The model therefore needs no hooks or wrappers.
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

# Prefixes that torch adds to names when it wraps a module.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_OWN_LOGITS = Power.parse("1/sqrt(head_size)")


@dataclass(frozen=True)
class Entry:
    """A parameter and its values under the rules, relative to the base model.

    spec, base: the tensor in the model and in the base model. factors: the factors with the multiplier folded in;
    `init_std` assumes that the base model's entries have variance 1/fan_in.
    """

    name: str
    spec: TensorSpec
    base: TensorSpec
    factors: Factors
    eps: float  # relative to the optimizer's eps

    @property
    def rescale(self) -> float:
        """The factor on initial values that do not depend on the width themselves."""
        return self.factors.init_std * (1.0 if self.spec.fill is not None else math.sqrt(self.base.fan_in))


class Plan:
    """The rules applied to a model, as made by `parametrize`.

    The plan holds the model and looks up its parameters by name, so the model may be compiled or sharded after the plan
    is made. Printing the plan shows a line for each kind of parameter.

    entries: a mapping from the name of each parameter to its role, shapes and factors.
    """

    def __init__(self, model: nn.Module, entries: Mapping[str, Entry], title: str) -> None:
        self.entries = entries
        self._model = model
        self._title = title
        self._done = False

    def initialize_(self, seed: int = 0, scale: float = 1.0) -> None:
        """Draws new initial values for every parameter, as the rules say.

        At the base width, entries have variance `scale` / fan_in. Parameters with a `fill` in the role table start from
        that constant instead. The random numbers depend only on the seed and on the parameter's name and shape, so they
        are the same on any device, sharded or not.

        Raises UserError if `scale` is not positive, or if the model's parameters no longer match the plan or are on the
        meta device.
        """
        if not 0 < scale < math.inf:
            raise UserError(f"scale (of the variances) is {scale!r} but must be a positive number")
        with torch.no_grad():
            for entry, parameter in self._parameters():
                std = entry.factors.init_std * (1.0 if entry.spec.fill is not None else math.sqrt(scale))
                _copy(draw(entry.spec, entry.name, seed) * std, parameter)
        self._done = True

    def rescale_(self, own: str = "constant") -> None:
        """Rescales the model's own initial values, as the rules say.

        own: how the model's own initialization depends on the width; "constant" means not at all, like
        `initializer_range` of transformers, and "fan_in" means that variances fall with fan_in, like those of
        `torch.nn.Linear`.

        Raises UserError if `own` is neither of these, if this plan has already initialized or rescaled the model, or if
        the model's parameters no longer match the plan or are on the meta device.
        """
        if own not in ("constant", "fan_in"):
            raise UserError(
                f"own, how the model's own initialization follows the width, is {own!r} but must be constant or fan_in"
            )
        if self._done:
            raise UserError("this plan has already initialized the model: make a new model to rescale it")
        with torch.no_grad():
            for entry, parameter in self._parameters():
                random = own == "fan_in" and entry.spec.fill is None
                parameter.mul_(entry.rescale * (math.sqrt(entry.spec.fan_in / entry.base.fan_in) if random else 1.0))
        self._done = True

    def groups(
        self, lr: float, weight_decay: float = 0.0, eps: float = 1e-8, undecayed: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Returns parameter groups for AdamW, or for Adam without weight decay.

        Each group has `params`, `lr`, `weight_decay` and `eps`. SGD needs other rules, since its steps follow the scale
        of the gradient, which folding changes.

        lr, weight_decay, eps: the values for the base model; decay is decoupled, as in AdamW, where a step shrinks a
        weight by lr * weight_decay. undecayed: roles without weight decay, such as "norm".

        Raises UserError if a number is negative or not finite, if `undecayed` names an unknown role, or if the model's
        parameters no longer match the plan or are on the meta device.
        """
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} is {value!r} but must be a finite number of at least 0")
        undecayed = {undecayed} if isinstance(undecayed, str) else set(undecayed)
        if unknown := sorted(undecayed - set(ROLES)):
            raise UserError(f"undecayed has unknown roles {', '.join(unknown)}: choose from {', '.join(ROLES)}")
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
            raise UserError(f"the model's parameter {changed[0]!r} does not match the plan: make a new plan")
        if meta := [name for name, parameter in parameters.items() if parameter.is_meta]:
            raise UserError(f"the parameter {meta[0]!r} is on the meta device: call the model's `to_empty` first")
        for name, entry in self.entries.items():
            yield entry, parameters[name]

    def __str__(self) -> str:
        """Formats a line for each kind of parameter, the same in all layers; column `x` counts them."""
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
    """Applies the rules (paper, Table 1) to each parameter of a model, relative to the same model at the base width.

    Call the methods of the returned plan to set initial values and to get parameter groups for the optimizer.

    model: any module; its values are not changed. base: the same module at the base width, with the same parameter
    names; only its shapes are read, so it may be on the meta device. rules: the name of a row of the table in
    config.yaml, such as "mup", or your own row. roles: the name of a role table in config.yaml, such as "mixtral", or
    your own table; None selects the table for the model's transformers model type. sizes, base_sizes: the sizes that
    the rules refer to, besides fan_in and fan_out; they are needed if the models have no `config` with these sizes, and
    take precedence over it. logits_scaled: whether the model already scales its attention logits as the rules say.

    Raises UserError if no pattern or several patterns match a parameter; if a size that the rules need is unknown; if
    two names share one tensor (tied weights) that the rules treat differently; or if the head size differs from the
    base model's and the rules scale attention logits other than by 1/sqrt(head_size), since no parameter contains that
    scale.
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
            raise UserError(f"the base model has no parameter {name!r}: make both with the same layers and experts")
        if not parameter.is_floating_point():
            raise UserError(f"the parameter {name!r} has dtype {parameter.dtype}: make the plan before quantization")
        try:
            pattern = table.entry(name)
            spec, at_base = (
                TensorSpec.by(pattern, name, shape) for shape in (tuple(parameter.shape), base_shapes[name])
            )
            found = factors_of(row, spec, at_base, ours, theirs, 1.0 / at_base.fan_in)
        except KeyError as error:
            raise _missing(row, table, str(error.args[0])) from None
        except ArithmeticError:
            raise UserError(f"the rules {row.name} give no finite number for `{name}`: check their powers") from None
        except ValueError as error:
            raise UserError(str(error)) from None
        named.setdefault(id(parameter), []).append(Entry(name, spec, at_base, found.folded(), 1 / found.multiplier))
    for first, *others in named.values():
        for other in others:
            if (first.factors, first.eps) != (other.factors, other.eps):
                raise UserError(
                    f"`{first.name}` ({first.spec.role}) and `{other.name}` ({other.spec.role}) are one tensor, but"
                    f" {row.name} treats them differently: untie them, or give both the role {first.spec.role} and"
                    " scale the output yourself"
                )
    _check_logits(row, table, ours, theirs, logits_scaled)
    entries = {first.name: first for first, *_ in named.values()}
    return Plan(model, entries, f"rules {row.name}, roles {table.name}: factors relative to the base model")


def clean(name: str) -> str:
    """Returns a parameter's name without the prefixes that torch adds when it wraps modules."""
    return _WRAPPERS.sub("", name)


def _unwrapped(what: str, model: object) -> nn.Module:
    """Returns the model inside wrappers that train it on several devices."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module):
        raise UserError(f"the {what} is of type {type(model).__name__} but must be a torch.nn.Module")
    return model


def sizes_in(table: RoleTable, model: nn.Module, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """Returns the sizes that rules may refer to: those of a model's config, overridden by `given`. Raises UserError."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(type(size) is int and size > 0 for size in given.values()):
        raise UserError(f"sizes are {given!r} but must map names to whole numbers of at least 1")
    config = getattr(model, "config", None)
    names = {name for _, texts in table.sizes for text in texts for name in names_in(text)}
    fields = {name: getattr(config, name, None) for name in names}
    if unknown := sorted(map(str, set(given) - set(SIZES))):
        raise UserError(f"sizes has unknown names {', '.join(unknown)}: choose from {', '.join(SIZES)}")
    try:
        return table.sizes_of(fields) | dict(given)
    except ValueError as error:
        raise UserError(str(error)) from None


def _missing(row: Parametrization, table: RoleTable, size: str) -> UserError:
    return UserError(
        f"the rules {row.name} refer to {size}, which roles {table.name!r} do not find in the model's config: pass"
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
            f"heads have size {sizes['head_size']}, but {base['head_size']} in the base model, and {row.name} scales"
            f" attention logits by {row.attention_logits}, not by the model's 1/sqrt(head_size): keep the head size, or"
            f" multiply the logits by {ratio:.4g} (the `scaling` of transformers' attention) and pass"
            " logits_scaled=True"
        )


def _copy(whole: Tensor, parameter: nn.Parameter) -> None:
    """Copies values into a parameter, or the local part of them into a shard; every process draws all values."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)
