"""The parametrization table: role x (init variance, multiplier, learning rate, weight decay).

A parametrization is data (`parametrizations` in config.yaml), and this module reads it. Paper, Table 1.
"""

import math
import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

from mup_moe.config.like import lineage, without_like

ROLES = ("embedding", "norm", "attention", "feed_forward", "expert_up", "expert_down", "router", "unembedding")
FACTORS = ("init_variance", "multiplier", "lr", "weight_decay")
ATTENTION_LOGITS = "attention_logits"
# The groups in which roles are varied: a control leaves one group as it is under STANDARD.
STANDARD = "sp"
GROUPS = {
    "embedding": ("embedding",),
    "norm": ("norm",),
    "attention": ("attention", ATTENTION_LOGITS),
    "feed-forward": ("feed_forward",),
    "experts": ("expert_up", "expert_down"),
    "router": ("router",),
    "unembedding": ("unembedding",),
}
CONTROL = re.compile(rf"(?P<row>.+)-(?P<what>without|only)-(?P<group>{'|'.join(GROUPS)})")
VARIABLES = ("fan_in", "fan_out", "width", "expert_size", "total_experts", "active_experts", "granularity", "head_size")
# An axis and a setting with these names count experts at granularity 1; a rule counts the experts that a layer has.
_NOT_IN_RULES = {"experts": "total_experts", "top_k": "active_experts"}

_ONE = r"1(?:\.0*)?(?:[eE][+-]?0+)?"
_TERM = re.compile(rf"(?P<root>sqrt\()?(?P<name>[a-z_]+)(?(root)\))(?:\^(?P<power>-?\d+(?:\.\d+|/[1-9]\d*)?))?|{_ONE}")


@dataclass(frozen=True)
class Power:
    """A product of powers of a tensor's sizes, for example 1/fan_in."""

    exponents: tuple[tuple[str, Fraction], ...]

    @classmethod
    def parse(cls, text: str | float) -> Self:
        """Reads "1", "1/fan_in", "sqrt(total_experts)/width", "fan_in^-0.5". Raises ValueError."""
        exponents: dict[str, Fraction] = {}
        # "a/b*c" means (a/b)*c, as usual: the operator before each factor sets the sign of its power.
        tokens = re.split(r"\s*([*/])(?![\d.])\s*", f"{text}".strip())
        for operator, term in zip(["*", *tokens[1::2]], tokens[0::2], strict=True):
            match = _TERM.fullmatch(term)
            name = match["name"] if match else None
            if name in _NOT_IN_RULES:
                raise ValueError(f"{text!r}: `{name}` is not the size of a layer: write `{_NOT_IN_RULES[name]}`")
            if not match or (name and name not in VARIABLES):
                raise ValueError(
                    f"{text!r} is not an expression: write a product of powers of {', '.join(VARIABLES)},"
                    " such as 1 or 1/fan_in"
                )
            if match and name:
                power = Fraction(match["power"] or 1) / (2 if match["root"] else 1)
                exponents[name] = exponents.get(name, Fraction(0)) + (power if operator == "*" else -power)
        return cls(tuple(sorted((name, power) for name, power in exponents.items() if power)))

    def __str__(self) -> str:
        def term(name: str, power: Fraction) -> str:
            if power == Fraction(1, 2):
                return f"sqrt({name})"
            return name if power == 1 else f"{name}^{power}"

        above = "*".join(term(name, power) for name, power in self.exponents if power > 0)
        below = "".join(f"/{term(name, -power)}" for name, power in self.exponents if power < 0)
        return (above or "1") + below

    def ratio(self, sizes: Mapping[str, int], base: Mapping[str, int]) -> float:
        """Returns the factor at `sizes` relative to `base`; exactly 1 where they agree."""
        return float(math.prod((sizes[name] / base[name]) ** float(power) for name, power in self.exponents))


@dataclass(frozen=True)
class Rule:
    """How one role scales with width: the four factors of Table 1."""

    init_variance: Power
    multiplier: Power
    lr: Power
    weight_decay: Power

    @classmethod
    def parse(cls, factors: Any) -> Self:
        """Reads a list of all `FACTORS`, or a mapping that names some of them; the others are 1. Raises ValueError."""
        if isinstance(factors, Mapping):
            for name in factors:
                if name not in FACTORS:
                    raise ValueError(f"{name!r} is not a factor: the factors are {', '.join(FACTORS)}")
            factors = [factors.get(name, 1) for name in FACTORS]
        if not isinstance(factors, (list, tuple)) or len(factors) != len(FACTORS):
            raise ValueError(f"{factors!r} must list {len(FACTORS)} factors, or name some: {', '.join(FACTORS)}")
        return cls(*(Power.parse(factor) for factor in factors))

    def as_row(self) -> list[str]:
        """Returns the factors as text, which `Rule.parse` reads back."""
        return [str(getattr(self, factor)) for factor in FACTORS]


@dataclass(frozen=True)
class Parametrization:
    """One row of the table: a rule for every role, and the scale of the attention logits."""

    name: str
    rules: Mapping[str, Rule]
    attention_logits: Power
    lr_scale: Mapping[str, float] = field(default_factory=dict)  # role -> learning-rate factor on top of its rule's

    @classmethod
    def parse(cls, name: str, row: Mapping[str, Any]) -> Self:
        """Reads a complete row. Raises ValueError that names the key of a missing or wrong role."""
        known = (*ROLES, ATTENTION_LOGITS)
        for role in row:
            if role not in known:
                several = GROUPS.get(role.replace("_", "-"), ())
                meant = f"write {' and '.join(several)}" if len(several) > 1 else f"the roles are {', '.join(known)}"
                raise ValueError(f"`parametrizations.{name}.{role}` is not a role: {meant}")
        for role in known:
            if role not in row:
                raise ValueError(
                    f"`parametrizations.{name}.{role}` is missing: give every role a rule, or name a row with `like`"
                )
        parsed: dict[str, Any] = {}
        for role in known:
            try:
                parsed[role] = (Power if role == ATTENTION_LOGITS else Rule).parse(row[role])
            except ValueError as error:
                raise ValueError(f"`parametrizations.{name}.{role}`: {error}") from None
        logits = parsed.pop(ATTENTION_LOGITS)
        if {"fan_in", "fan_out"} & {variable for variable, _ in logits.exponents}:
            raise ValueError(
                f"`parametrizations.{name}.{ATTENTION_LOGITS}` does not scale a tensor, so it has no fan_in or fan_out:"
                " use head_size or width"
            )
        return cls(name, parsed, logits)

    def as_row(self) -> dict[str, Any]:
        """Returns the row as plain data, which `Parametrization.parse` reads back."""
        return dict(self._row)

    @cached_property
    def _row(self) -> dict[str, Any]:
        rules = {role: rule.as_row() for role, rule in self.rules.items()}
        return rules | {ATTENTION_LOGITS: str(self.attention_logits)}

    def scaled(self, group: str, factor: float) -> Self:
        """Returns the row with the learning rates of a group of roles multiplied by a factor, at every shape."""
        return replace(self, lr_scale=dict.fromkeys(GROUPS[group], factor))

    def with_roles_of(self, other: Self, group: str, name: str) -> Self:
        """Returns the row with a group's roles taken from another row, under the name `name`."""
        rules = {role: (other if role in GROUPS[group] else self).rules[role] for role in self.rules}
        logits = (other if ATTENTION_LOGITS in GROUPS[group] else self).attention_logits
        return replace(self, name=name, rules=rules, attention_logits=logits)

    def rule(self, role: str) -> Rule:
        """Returns the rule of a role. Raises ValueError for a role that the table does not have."""
        if role not in self.rules:
            raise ValueError(f"role {role!r} has no rule in parametrization {self.name!r}: add it to the table")
        return self.rules[role]


def parse_table(table: Mapping[str, Mapping[str, Any]]) -> dict[str, Parametrization]:
    """Parses the rows of the table and resolves `like`. Raises ValueError that names the key."""
    rows = {name: ChainMap(*map(without_like, reversed(lineage("parametrizations", table, name)))) for name in table}
    return {name: Parametrization.parse(name, row) for name, row in rows.items()}


def control(table: Mapping[str, Parametrization], name: str) -> Parametrization | None:
    """Returns the control of a row and one group of roles that `name` means; None for any other name.

    RULE-without-GROUP is the row with that group left as under SP; RULE-only-GROUP is SP with that group as in the
    row. A group for which the row has the same rules as SP has neither control.
    """
    match = CONTROL.fullmatch(name)
    row, standard = (table.get(match["row"]), table.get(STANDARD)) if match else (None, None)
    if match is None or row is None or standard is None:
        return None
    without = row.with_roles_of(standard, match["group"], name)
    if (without.rules, without.attention_logits) == (row.rules, row.attention_logits):
        return None
    return without if match["what"] == "without" else standard.with_roles_of(row, match["group"], name)
