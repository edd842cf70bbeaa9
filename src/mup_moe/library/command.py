"""What the rules come to for a model of the hub, from its config alone: python -m mup_moe roles."""

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

# Each is a role table too, of the names in its own models.
TRAINERS = ("automodel", "torchtitan", "megatron")
FORMATS = ("table", "yaml", *TRAINERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("file", type=Path, metavar="CONFIG.json", help="a model's config as the hub has it")
    parser.add_argument("--base-width", type=int, required=True, metavar="N", help="where learning rates are tuned")
    parser.add_argument("--rules", default="mup", metavar="NAME", help="a row of config.yaml; default: mup")
    help_roles = "a role table there, or a YAML file with your own; default: the one for the model's type"
    parser.add_argument("--roles", metavar="NAME|FILE", help=help_roles)
    help_as = (
        "table, yaml (with every number), or multipliers by patterns as NeMo Automodel, torchtitan or Megatron take"
        " them, over the names of their own models"
    )
    parser.add_argument("--as", dest="form", choices=FORMATS, default="table", help=help_as)


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan of a model relative to one that is narrower. Raises UserError."""
    kind, fields = read_config(arguments.file)
    is_file = (arguments.roles or "").endswith((".yaml", ".yml"))
    roles = roles_of(read_document(Path(arguments.roles)) if is_file else arguments.roles, kind)
    with torch.device("meta"):
        model: Any = make_model(kind, fields)
        # Under another name a field would win over the narrower one.
        named = {model.config.attribute_map.get(field, field): value for field, value in fields.items()}
        base = make_model(kind, named | narrower(model, roles, arguments.base_width))
    plan = parametrize(model, base, arguments.rules, roles)
    if arguments.form == "table":
        print(plan)
    elif arguments.form == "yaml":
        print(yaml.safe_dump(as_data(plan), sort_keys=False, width=200), end="")
    else:
        print(for_trainer(plan, arguments.form))


# Fields that no parameter's shape follows, and that may ask for what this machine lacks.
_OF_THE_MACHINE = {"attn_implementation", "dtype", "torch_dtype", "quantization_config"}


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The model type and the fields of a model's config.json. Raises UserError."""
    give = "give the config.json of a model of transformers"
    try:
        # Its texts and numbers may be longer than those of a config of ours.
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
    """The fields of a model's config that follow the width, at the base width. Raises UserError."""
    if base_width < 1:
        raise UserError(f"--base-width is {base_width}: give the width at which learning rates are tuned")
    config: Any = model.config
    width = sizes_in(roles, model).get("width")
    if width is None:
        raise UserError(f"roles {roles.name!r} do not say which field is the width: give `sizes` a `width`")
    found: dict[str, int] = {}
    for field in roles.follow_width:
        if not isinstance(value := getattr(config, field, None), int):
            continue
        scaled, rest = divmod(value * base_width, width)
        if field == "num_key_value_heads":
            # Their number is in no fan_in; it has to divide that of the heads.
            heads = max(1, config.num_attention_heads * base_width // width)
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


def patterns(plan: Plan, trainer: str) -> dict[Multipliers, str]:
    """One pattern for the names of all tensors with the same multipliers, by a trainer's role table.

    It is a regular expression to be searched for, of the roles that the model has.
    """
    of_role, found = multipliers(plan), dict[Multipliers, list[str]]()
    for entry in roles_of(trainer).entries:
        if (own := of_role.get(entry.role)) is not None:
            found.setdefault(own, []).append(regex_text(entry.pattern))
    return {own: rf"(?:^|\.)(?:{'|'.join(texts)})$" for own, texts in sorted(found.items())}


def for_trainer(plan: Plan, trainer: str) -> str:
    """The plan as the settings of a trainer, in its own language. Raises UserError as of `multipliers`."""
    found = patterns(plan, trainer)
    if trainer != "torchtitan":
        # What no pattern matches has the base model's settings there; in torchtitan it is refused.
        found.pop(Multipliers(1.0, 1.0, 1.0), None)
    if trainer == "automodel":
        overrides = [{"pattern": text, "lr_mult": own.lr, "wd_mult": own.weight_decay} for own, text in found.items()]
        document = {"optimizer": {"param_group_overrides": overrides}}
        lines = [yaml.safe_dump(document, sort_keys=False, width=10_000).rstrip()]
    else:
        rows = (f'    (r"{text}", {own.lr:.9g}, {own.weight_decay:.9g}, {own.eps:.9g}),' for own, text in found.items())
        head = "multipliers = [  # names that are searched for; of lr, weight decay and eps"
        lines = [head, *rows, "]", _USE[trainer]]
    notes = ["Initial values are not in here: --as yaml has their standard deviations.", *_NOTES[trainer]]
    return "\n".join([*(f"# {note}" for note in notes), *lines])


_NOTES = {
    "automodel": ["They act where the config has a section lr_scheduler. Automodel has no multiplier of eps."],
    "torchtitan": [
        "base: the optimizer_kwargs of the base model, with lr, betas, weight_decay and eps.",
        "A pattern that matches nothing is refused, also in a single stage of a pipeline: leave it out there.",
    ],
    "megatron": [],
}
# How the multipliers become a trainer's settings.
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
