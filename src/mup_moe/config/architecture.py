"""Architectures from transformers, with config fields that follow the axes of a sweep; needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from mup_moe.config.cell import Cell
from mup_moe.config.roles import RoleTable, evaluate, names_in

if TYPE_CHECKING:
    from mup_moe.config.settings import ModelSettings

# What the fields of an architecture may refer to: axes of its cells, settings of the set-up, and the vocabulary.
AXIS_NAMES = ("width", "experts", "granularity")
SETTING_NAMES = ("top_k", "blocks", "sequence", "ffn_ratio")
NAMES = (*AXIS_NAMES, *SETTING_NAMES, "vocabulary")
# Settings of a set-up's `model` that apply to these architectures too; the rest only concern our own model.
SHARED_SETTINGS = (
    *("base_width", "base_experts", *SETTING_NAMES, "fixed_sparsity", "init", "init_scale", "scale_residual_init"),
    *("balance_loss", "balance_loss_times_top_k", "z_loss"),
)
_KEYS = ("model_type", "roles", "fields")


@dataclass(frozen=True)
class Architecture:
    """An entry of `architectures`. fields: the fields of the model's config, as JSON. roles: its role table."""

    name: str
    model_type: str
    roles: RoleTable
    fields: str

    @classmethod
    def parse(cls, name: str, entry: Mapping[str, Any], roles: Mapping[str, Any]) -> Self:
        """Reads an entry, which names a table of the section `roles` or contains its own. Raises ValueError."""
        key = f"`architectures.{name}"
        for word in entry:
            if word not in _KEYS:
                raise ValueError(f"{key}.{word}` is not a known key: the keys are {', '.join(_KEYS)}")
        kind, table, fields = (entry.get(word) for word in _KEYS)
        if not isinstance(kind, str):
            raise ValueError(f"{key}.model_type` is {kind!r} but must be a model type of transformers, such as mixtral")
        if not isinstance(fields, Mapping) or not fields:
            raise ValueError(f"{key}.fields` is missing: give the fields of the model's config")
        if isinstance(table, str) and table not in roles:
            raise ValueError(f"{key}.roles` is {table!r}, which `roles` does not list: correct the name, or add it")
        parsed = RoleTable.parse(table, roles[table]) if isinstance(table, str) else RoleTable.parse(name, table)
        for field, value in fields.items():
            if _is_expression(value) and (strange := names_in(value) - set(NAMES)):
                raise ValueError(
                    f"{key}.fields.{field}` refers to {', '.join(sorted(strange))} but may only refer to"
                    f" {', '.join(NAMES)}"
                )
        return cls(name, kind, parsed, json.dumps(fields, sort_keys=True))

    def as_data(self) -> dict[str, Any]:
        """Returns the entry as plain data, with its role table; `parse` reads it back."""
        return {"model_type": self.model_type, "roles": self.roles.as_data(), "fields": json.loads(self.fields)}

    def fields_of(self, cell: Cell, settings: "ModelSettings", vocabulary: int) -> dict[str, Any]:
        """Returns the fields of a cell's config. Raises ValueError if an expression is not a positive whole number."""
        values = {name: getattr(cell, name) for name in AXIS_NAMES}
        values |= {name: getattr(settings, name) for name in SETTING_NAMES} | {"vocabulary": vocabulary}
        values["top_k"] = settings.active_experts(cell.experts)
        found = {}
        for field, value in json.loads(self.fields).items():
            if _is_expression(value):
                number = evaluate(value, values)
                assert number is not None
                if number.denominator != 1 or number < 1:
                    raise ValueError(
                        f"`architectures.{self.name}.fields.{field}` is {value} = {float(number):g} at width"
                        f" {cell.width} but must be a whole number of at least 1"
                    )
                value = int(number)
            found[field] = value
        return found

    def check(self, cell: Cell, settings: "ModelSettings") -> None:
        """Raises ValueError, with a sentence, for a cell for which this architecture cannot be built."""
        # The layer sizes do not depend on the vocabulary.
        sizes = [
            self.roles.sizes_of(self.fields_of(of_one, settings, 1)) for of_one in (cell, settings.base_cell(cell))
        ]
        needed = ("width", "head_size", "total_experts", "active_experts", "expert_size")
        for size in needed:
            if size not in sizes[0]:
                raise ValueError(
                    f"`architectures.{self.name}.fields` do not determine the {size} of roles {self.roles.name!r}:"
                    " add the field that `sizes` there names"
                )
        if sizes[0]["head_size"] != sizes[1]["head_size"]:
            raise ValueError(
                f"`architectures.{self.name}` has heads of size {sizes[0]['head_size']} at width {cell.width} and"
                f" {sizes[1]['head_size']} at `base_width`: keep the size fixed, since the model itself scales its"
                " attention logits"
            )


def _is_expression(value: Any) -> bool:
    """Whether a field is an expression that follows the sweep; other text, such as an activation, is a plain value."""
    return isinstance(value, str) and bool(names_in(value) & set(NAMES))
