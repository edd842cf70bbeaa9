"""Prints the plan for a model on the hub from its config alone: python -m mup_moe roles."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mup_moe.config.document import read_document
from mup_moe.config.roles import RoleTable, regex_text
from mup_moe.files import UserError
from mup_moe.library.plan import Entry, Plan, parametrize, sizes_in
from mup_moe.library.tables import roles_of
from mup_moe.model.hub import make_model

# Each of these also names a role table for the parameter names of the trainer's own models.
TRAINERS = ("automodel", "torchtitan", "megatron")
FORMATS = ("table", "yaml", *TRAINERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("file", type=Path, metavar="CONFIG.json", help="the config.json of a model on the hub")
    help_width = "the width at which learning rates are tuned"
    parser.add_argument("--base-width", type=int, required=True, metavar="N", help=help_width)
    help_rules = "a row of `parametrizations` in config.yaml; default: mup"
    parser.add_argument("--rules", default="mup", metavar="NAME", help=help_rules)
    help_roles = "a role table in config.yaml, or a YAML file with your own; default: the one for the model type"
    parser.add_argument("--roles", metavar="NAME|FILE", help=help_roles)
    help_as = (
        "table, yaml (all numbers), or multipliers by name pattern in the format of NeMo Automodel, torchtitan or"
        " Megatron, for the names of their own models"
    )
    parser.add_argument("--as", dest="form", choices=FORMATS, default="table", help=help_as)


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan of a model relative to the same model at the base width. Raises UserError."""
    kind, fields = read_config(arguments.file)
    is_file = (arguments.roles or "").endswith((".yaml", ".yml"))
    roles = roles_of(read_document(Path(arguments.roles)) if is_file else arguments.roles, kind)
    with torch.device("meta"):
        model: Any = make_model(kind, fields)
        # Use the canonical names, since a field under its alias would override the narrower value.
        named = {model.config.attribute_map.get(field, field): value for field, value in fields.items()}
        base = make_model(kind, named | narrower(model, roles, arguments.base_width))
    plan = parametrize(model, base, arguments.rules, roles)
    if arguments.form == "table":
        print(plan)
    elif arguments.form == "yaml":
        print(yaml.safe_dump(as_data(plan), sort_keys=False, width=200), end="")
    else:
        print(for_trainer(plan, arguments.form))


# Fields that affect no parameter's shape and may need something that this machine lacks.
_OF_THE_MACHINE = {"attn_implementation", "dtype", "torch_dtype", "quantization_config"}


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Reads the model type and the fields from a model's config.json. Raises UserError."""
    give = "give the config.json of a transformers model"
    try:
        # Its texts and numbers may be longer than `read_document` allows.
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {give}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): {give}") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str):
        raise UserError(f"{path} has no `model_type`: {give}")
    return kind, {key: value for key, value in fields.items() if key not in {"model_type", *_OF_THE_MACHINE}}


def narrower(model: nn.Module, roles: RoleTable, base_width: int) -> dict[str, int]:
    """Returns the fields of a model's config that follow the width, at the base width. Raises UserError."""
    if base_width < 1:
        raise UserError(
            f"--base-width is {base_width} but must be positive: give the width where you tune learning rates"
        )
    config: Any = model.config
    width = sizes_in(roles, model).get("width")
    if width is None:
        raise UserError(f"roles {roles.name!r} do not say which field is the width: add `width` to their `sizes`")
    found: dict[str, int] = {}
    for field in roles.follow_width:
        if not isinstance(value := getattr(config, field, None), int):
            continue
        scaled, rest = divmod(value * base_width, width)
        if field == "num_key_value_heads":
            # This number appears in no fan_in, but it must divide the number of heads.
            heads = max(1, config.num_attention_heads * base_width // width)
            scaled, rest = max(count for count in range(1, max(scaled, 1) + 1) if heads % count == 0), 0
        if rest or not scaled:
            raise UserError(
                f"`{field}` is {value} at width {width} but not a whole number at width {base_width}: choose another"
                " --base-width"
            )
        found[field] = scaled
    return found


def as_data(plan: Plan) -> list[dict[str, Any]]:
    """Returns the plan as plain data, with an entry for each parameter."""

    def data(entry: Entry) -> dict[str, Any]:
        spec, factors = entry.spec, entry.factors
        start = {"fill": spec.fill * factors.init_std} if spec.fill is not None else {"init_std": factors.init_std}
        sizes = {"shape": list(spec.shape), "fan_in": spec.fan_in, "base_fan_in": entry.base.fan_in}
        rates = {"lr": factors.lr, "weight_decay": factors.weight_decay, "eps": entry.eps}
        return {"name": entry.name, "role": spec.role} | sizes | start | {"init_rescale": entry.rescale} | rates

    return [data(entry) for entry in plan.entries.values()]


@dataclass(frozen=True, order=True)
class Multipliers:
    """The factors by which a trainer multiplies the base model's settings."""

    lr: float
    weight_decay: float
    eps: float


def multipliers(plan: Plan) -> dict[str, Multipliers]:
    """Returns the multipliers of each role. Raises UserError if tensors of one role differ."""
    found: dict[str, Multipliers] = {}
    for entry in plan.entries.values():
        own = Multipliers(entry.factors.lr, entry.factors.weight_decay, entry.eps)
        if found.setdefault(entry.spec.role, own) != own:
            raise UserError(
                f"tensors of the role {entry.spec.role} have different multipliers, such as `{entry.name}`: write the"
                " trainer's patterns yourself from the output of --as yaml"
            )
    return found


def patterns(plan: Plan, trainer: str) -> dict[Multipliers, str]:
    """Returns one name pattern per set of multipliers, from a trainer's role table.

    Each pattern is a regular expression for `re.search`; it covers only roles that the model has.
    """
    of_role, found = multipliers(plan), dict[Multipliers, list[str]]()
    for entry in roles_of(trainer).entries:
        if (own := of_role.get(entry.role)) is not None:
            found.setdefault(own, []).append(regex_text(entry.pattern))
    return {own: rf"(?:^|\.)(?:{'|'.join(texts)})$" for own, texts in sorted(found.items())}


def for_trainer(plan: Plan, trainer: str) -> str:
    """Formats the plan as settings of a trainer, in its own format. Raises UserError as `multipliers` does."""
    found = patterns(plan, trainer)
    if trainer != "torchtitan":
        # Parameters that match no pattern keep the base model's settings; torchtitan rejects them instead.
        found.pop(Multipliers(1.0, 1.0, 1.0), None)
    if trainer == "automodel":
        overrides = [{"pattern": text, "lr_mult": own.lr, "wd_mult": own.weight_decay} for own, text in found.items()]
        document = {"optimizer": {"param_group_overrides": overrides}}
        lines = [yaml.safe_dump(document, sort_keys=False, width=10_000).rstrip()]
    else:
        rows = (f'    (r"{text}", {own.lr:.9g}, {own.weight_decay:.9g}, {own.eps:.9g}),' for own, text in found.items())
        head = "multipliers = [  # name pattern (re.search), multipliers of lr, weight decay and eps"
        lines = [head, *rows, "]", _USE[trainer]]
    notes = ["Initial values are not included: --as yaml lists their standard deviations.", *_NOTES[trainer]]
    return "\n".join([*(f"# {note}" for note in notes), *lines])


_NOTES = {
    "automodel": [
        "The overrides take effect if the config has a section lr_scheduler. Automodel has no multiplier of eps."
    ],
    "torchtitan": [
        "base: the optimizer_kwargs of the base model, with lr, betas, weight_decay and eps.",
        "torchtitan rejects a pattern that matches nothing, even in one stage of a pipeline: remove it there.",
    ],
    "megatron": [],
}
# Code that turns the multipliers into a trainer's settings.
_USE = {
    "torchtitan": """\
param_groups = [
    ParamGroupConfig(
        pattern=pattern,
        optimizer_name="AdamW",
        optimizer_kwargs=base | dict(lr=lr * base["lr"], weight_decay=wd * base["weight_decay"], eps=eps * base["eps"]),
    )
    for pattern, lr, wd, eps in multipliers
]""",
    "megatron": """\
overrides = get_standard_config_overrides(config)
for pattern, lr, wd, eps in multipliers:
    matches = ParamWithNamePredicate(name=pattern, fn=lambda _, name, p=pattern: re.search(p, name) is not None)
    override = ParamGroupOverride(max_lr=lr * config.lr, wd_mult=wd, eps=eps * config.adam_eps)
    if config.min_lr is not None:
        override["min_lr"] = lr * config.min_lr
    overrides[ParamKey(with_name_predicate=matches)] = override""",
}
