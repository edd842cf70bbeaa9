"""Architectures beside our own: a model of transformers, whose fields follow the axes of a sweep; needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from mup_moe.config.cell import Cell
from mup_moe.config.roles import RoleTable, evaluate, names_in

if TYPE_CHECKING:
    from mup_moe.config.settings import ModelSettings

# What the fields of an architecture may refer to: axes of its cells, and what the set-up and the corpus say.
AXIS_NAMES = ("width", "experts", "granularity")
SETTING_NAMES = ("top_k", "blocks", "sequence", "ffn_ratio")
NAMES = (*AXIS_NAMES, *SETTING_NAMES, "vocabulary")
# What a set-up's `model` says of its cells beside: the rest is about our own model.
SHARED_SETTINGS = (
    *("base_width", "base_experts", *SETTING_NAMES, "fixed_sparsity", "init", "init_scale", "scale_residual_init"),
    *("balance_loss", "balance_loss_times_top_k", "z_loss"),
)
_KEYS = ("model_type", "roles", "fields")


@dataclass(frozen=True)
class Architecture:
    """An entry of `architectures`. fields: of the architecture's config, as JSON; roles: its role table."""

    name: str
    model_type: str
    roles: RoleTable
    fields: str

    @classmethod
    def parse(cls, name: str, entry: Mapping[str, Any], roles: Mapping[str, Any]) -> Self:
        """Reads an entry. roles: the section of role tables, or a table in the entry itself. Raises ValueError."""
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
            raise ValueError(f"{key}.roles` is {table!r}, which `roles` does not list")
        parsed = RoleTable.parse(table, roles[table]) if isinstance(table, str) else RoleTable.parse(name, table)
        for field, value in fields.items():
            if _is_expression(value) and (strange := names_in(value) - set(NAMES)):
                raise ValueError(
                    f"{key}.fields.{field}` refers to {', '.join(sorted(strange))}: it may refer to {', '.join(NAMES)}"
                )
        return cls(name, kind, parsed, json.dumps(fields, sort_keys=True))

    def as_data(self) -> dict[str, Any]:
        """The entry as plain data, with its role table; `parse` reads it back."""
        return {"model_type": self.model_type, "roles": self.roles.as_data(), "fields": json.loads(self.fields)}

    def fields_of(self, cell: Cell, settings: "ModelSettings", vocabulary: int) -> dict[str, Any]:
        """The fields of a cell's config. Raises ValueError for one that is not a whole number."""
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
                        f" {cell.width}, which is not a whole number from 1"
                    )
                value = int(number)
            found[field] = value
        return found

    def check(self, cell: Cell, settings: "ModelSettings") -> None:
        """Raises ValueError, with a sentence, for a cell that this architecture cannot be built for."""
        # No size of a layer depends on the vocabulary.
        sizes = [
            self.roles.sizes_of(self.fields_of(of_one, settings, 1)) for of_one in (cell, settings.base_cell(cell))
        ]
        needed = ("width", "head_size", "total_experts", "active_experts", "expert_size")
        for size in needed:
            if size not in sizes[0]:
                raise ValueError(
                    f"`architectures.{self.name}.fields` do not say the {size} of roles {self.roles.name!r}:"
                    " give the field that `sizes` there names"
                )
        if sizes[0]["head_size"] != sizes[1]["head_size"]:
            raise ValueError(
                f"`architectures.{self.name}` has heads of size {sizes[0]['head_size']} at width {cell.width} and"
                f" {sizes[1]['head_size']} at `base_width`: keep it fixed, for the model scales its attention logits"
                " by itself"
            )


def _is_expression(value: Any) -> bool:
    """Whether a field follows the sweep; any other text, such as the name of an activation, is its value."""
    return isinstance(value, str) and bool(names_in(value) & set(NAMES))
