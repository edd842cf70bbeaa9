"""What the rules come to for a model of the hub, from its config alone: python -m mup_moe roles."""

import argparse
import itertools
import re
from collections.abc import Mapping
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

FORMATS = ("table", "yaml", "regex", "glob")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("file", type=Path, metavar="CONFIG.json", help="a model's config as the hub has it")
    parser.add_argument("--base-width", type=int, required=True, metavar="N", help="where learning rates are tuned")
    parser.add_argument("--rules", default="mup", metavar="NAME", help="a row of config.yaml; default: mup")
    parser.add_argument("--roles", metavar="NAME", help="a role table there; default: the one for the model's type")
    help_as = (
        "table, yaml, or multipliers of learning rate and weight decay by patterns over names: regex (as torchtitan"
        " and NeMo Automodel search for them) or glob (as Megatron matches them)"
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
        return
    found = as_data(plan) if arguments.form == "yaml" else multipliers(plan, roles, arguments.form)
    print(yaml.safe_dump(found, sort_keys=False, width=200), end="")


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


def multipliers(plan: Plan, roles: RoleTable, form: str) -> dict[str, Mapping[str, float]]:
    """What the learning rate and the weight decay are multiplied by, by patterns; those that all are 1 are left out.

    Raises UserError where parameters of one pattern differ.
    """
    found: dict[str, Mapping[str, float]] = {}
    for entry in plan.entries.values():
        pattern = roles.entry(entry.name).pattern
        factors = {"lr": entry.factors.lr, "weight_decay": entry.factors.weight_decay}
        for text in (as_regex(pattern),) if form == "regex" else as_globs(pattern):
            # Each its own, so that YAML writes them out.
            if found.setdefault(text, dict(factors)) != factors:
                raise UserError(
                    f"the parameters of `{pattern}` have several learning rates: make a pattern of roles {roles.name!r}"
                    " for each"
                )
    return {text: factors for text, factors in found.items() if set(factors.values()) != {1.0}}


def as_regex(pattern: str) -> str:
    """A pattern of a role table as a regular expression, to be searched for."""
    return rf"(?:^|\.){regex_text(pattern)}$"


def as_globs(pattern: str) -> list[str]:
    """A pattern of a role table as those of fnmatch, one for each choice of its braces."""
    pieces = [piece.split(",") for piece in re.split(r"[{}]", pattern)]
    return [f"*{''.join(choice)}" for choice in itertools.product(*pieces)]
