"""What the rules come to for a model of the hub, from its config alone: python -m mup_moe roles."""

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mup_moe.config.document import read_document
from mup_moe.config.roles import RoleTable, regex_text
from mup_moe.files import UserError
from mup_moe.library.plan import Entry, Plan, parametrize
from mup_moe.library.tables import roles_of
from mup_moe.model.hub import make_model

# Role tables of trainers' names, and how each takes multipliers of learning rate, weight decay and eps.
TRAINERS = ("automodel", "torchtitan", "megatron")
FORMATS = ("table", "yaml", *TRAINERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("file", type=Path, metavar="CONFIG.json", help="a model's config as the hub has it")
    parser.add_argument("--base-width", type=int, required=True, metavar="N", help="where learning rates are tuned")
    parser.add_argument("--rules", default="mup", metavar="NAME", help="a row of config.yaml; default: mup")
    parser.add_argument("--roles", metavar="NAME", help="a role table there; default: the one for the model's type")
    help_as = (
        "table, yaml (with every number), or multipliers by patterns as NeMo Automodel, torchtitan or Megatron take"
        " them, over the names of their own models"
    )
    parser.add_argument("--as", dest="form", choices=FORMATS, default="table", help=help_as)


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan of a model relative to one that is narrower. Raises UserError."""
    fields = read_document(arguments.file)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise UserError(f"{arguments.file} has no `model_type`: give the config.json of a model of transformers")
    roles = roles_of(arguments.roles, kind)
    with torch.device("meta"):
        model = make_model(kind, fields)
        base = make_model(kind, fields | narrower(model, roles, arguments.base_width))
    plan = parametrize(model, base, arguments.rules, roles)
    if arguments.form == "table":
        print(plan)
    elif arguments.form == "yaml":
        print(yaml.safe_dump(as_data(plan), sort_keys=False, width=200), end="")
    else:
        print(for_trainer(plan, arguments.form))


def narrower(model: nn.Module, roles: RoleTable, base_width: int) -> dict[str, int]:
    """The fields of a model's config that follow the width, at the base width. Raises UserError."""
    config: Any = model.config
    width = roles.sizes_of(vars(config)).get("width") if roles.sizes else None
    if width is None:
        raise UserError(f"roles {roles.name!r} do not say which field is the width: give `sizes` a `width`")
    found: dict[str, int] = {}
    for field in roles.follow_width:
        if not isinstance(value := getattr(config, field, None), int):
            continue
        scaled, rest = divmod(value * base_width, width)
        if field == "num_key_value_heads":
            # Their number is in no fan_in; it has to divide that of the heads.
            heads = found.get("num_attention_heads", 1)
            scaled, rest = max(count for count in range(1, max(scaled, 1) + 1) if heads % count == 0), 0
        if rest or not scaled:
            raise UserError(
                f"`{field}` {value} at width {width} is not whole at width {base_width}: choose another base width"
            )
        found[field] = scaled
    return found


def as_data(plan: Plan) -> list[dict[str, Any]]:
    """The plan as plain data, an entry for each parameter."""

    def data(entry: Entry) -> dict[str, Any]:
        spec, factors = entry.spec, entry.factors
        start = {"fill": spec.fill * factors.init_std} if spec.fill is not None else {"init_std": factors.init_std}
        sizes = {"shape": list(spec.shape), "fan_in": spec.fan_in, "base_fan_in": entry.base.fan_in}
        rates = {"lr": factors.lr, "weight_decay": factors.weight_decay, "eps": entry.eps}
        return {"name": entry.name, "role": spec.role} | sizes | start | {"init_rescale": entry.rescale} | rates

    return [data(entry) for entry in plan.entries.values()]


@dataclass(frozen=True, order=True)
class Multipliers:
    """What a trainer multiplies the base model's settings by."""

    lr: float
    weight_decay: float
    eps: float


def multipliers(plan: Plan) -> dict[str, Multipliers]:
    """The multipliers of each role. Raises UserError where tensors of one role differ."""
    found: dict[str, Multipliers] = {}
    for entry in plan.entries.values():
        own = Multipliers(entry.factors.lr, entry.factors.weight_decay, entry.eps)
        if found.setdefault(entry.spec.role, own) != own:
            raise UserError(
                f"tensors of the role {entry.spec.role} have several learning rates, such as `{entry.name}`: write"
                " the trainer's patterns from --as yaml"
            )
    return found


def patterns(plan: Plan, trainer: str) -> dict[Multipliers, list[str]]:
    """The patterns of the trainer's role table by their multipliers, of the roles that the model has.

    Those whose multipliers all are 1 are left out: they keep the trainer's settings.
    """
    of_role, found = multipliers(plan), dict[Multipliers, list[str]]()
    for entry in roles_of(trainer).entries:
        if (own := of_role.get(entry.role, _NONE)) != _NONE:
            found.setdefault(own, []).append(entry.pattern)
    return found


_NONE = Multipliers(1.0, 1.0, 1.0)


def for_trainer(plan: Plan, trainer: str) -> str:
    """The plan as the settings of a trainer, in its own language. Raises UserError as of `multipliers`."""
    groups = sorted(patterns(plan, trainer).items())
    head = "# The base model's settings, multiplied. Initial values are not in here: see init_rescale of --as yaml."
    return "\n".join(
        [head, *{"automodel": _automodel, "torchtitan": _torchtitan, "megatron": _megatron}[trainer](groups)]
    )


Groups = Sequence[tuple[Multipliers, Sequence[str]]]


def _automodel(groups: Groups) -> list[str]:
    overrides = [{"pattern": as_regex(names), "lr_mult": of.lr, "wd_mult": of.weight_decay} for of, names in groups]
    document = {"optimizer": {"param_group_overrides": overrides}}
    note = "# Automodel applies them only where the config has an lr_scheduler section, and has none for eps."
    return [note, yaml.safe_dump(document, sort_keys=False, width=10_000).rstrip()]


def _torchtitan(groups: Groups) -> list[str]:
    def config(regex: str, of: Multipliers) -> str:
        settings = (
            f'"lr": {of.lr:.9g} * lr, "weight_decay": {of.weight_decay:.9g} * weight_decay, "eps": {of.eps:.9g} * eps'
        )
        return f'    ParamGroupConfig(pattern=r"{regex}", optimizer_name="AdamW", optimizer_kwargs={{{settings}}}),'

    # Every parameter has to match, and the first match counts.
    lines = [*(config(as_regex(names), of) for of, names in groups), config(".*", _NONE)]
    return ["param_groups = [", *lines, "]"]


def _megatron(groups: Groups) -> list[str]:
    lines = []
    for of, names in groups:
        globs = ", ".join(repr(glob) for name in names for glob in as_globs(name))
        settings = (
            f"max_lr={of.lr:.9g} * config.lr, min_lr={of.lr:.9g} * config.min_lr, wd_mult={of.weight_decay:.9g},"
            f" eps={of.eps:.9g} * config.adam_eps"
        )
        lines.append(f"    ParamKey(name=({globs},)): ParamGroupOverride({settings}),")
    return ["overrides = get_standard_config_overrides(config) | {", *lines, "}"]


def as_regex(names: Sequence[str]) -> str:
    """Patterns of a role table as one regular expression, to be searched for."""
    return rf"(?:^|\.)(?:{'|'.join(map(regex_text, names))})$"


def as_globs(pattern: str) -> list[str]:
    """A pattern of a role table as those of fnmatch, one for each choice of its braces."""
    pieces = [piece.split(",") for piece in re.split(r"[{}]", pattern)]
    return [f"*{''.join(choice)}" for choice in itertools.product(*pieces)]
