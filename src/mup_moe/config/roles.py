"""Role tables: which role each tensor of an architecture has, and which of its axes it sums over; needs no torch.

A table is data (config.yaml, `roles`), found by patterns over the names of parameters.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any, Self

from mup_moe.parametrization import ROLES, VARIABLES

# What a coordinate check looks at, by the module whose output it is.
QUANTITIES = ("embedding", "attention", "feed-forward", "router logits", "output logits")
# What an axis is to the product with the tensor: it is summed over, is an output, numbers experts or replicas, or is
# looked up.
AXES = ("in", "out", "expert", "row", "replica")
GATES = ("softmax", "sigmoid")
# Of a size of the layer; the others a tensor has itself.
SIZES = tuple(name for name in VARIABLES if name not in ("fan_in", "fan_out"))
_KEYS = ("model_types", "gates", "sizes", "follow_width", "observe", "tensors")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 200  # of a pattern or an expression


def evaluate(expression: str, values: Mapping[str, Any]) -> Fraction | None:
    """What "2*width/granularity" comes to; None where a name in it has no value. Raises ValueError."""

    def value(node: ast.expr) -> Fraction | None:
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return Fraction(number)
            case ast.Name(id=name):
                found = values.get(name)
                if found is not None and (not isinstance(found, int | float) or not math.isfinite(found)):
                    raise ValueError(f"`{name}` is {found!r}, not a number")
                return None if found is None else Fraction(found)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                first, second = value(left), value(right)
                return None if first is None or second is None else _OPERATORS[type(op)](first, second)
        raise ValueError(f"{expression!r} is not an expression: write sums and products, such as 2*width/granularity")

    try:
        return value(_parsed(expression))
    except ZeroDivisionError:
        raise ValueError(f"{expression!r} divides by 0") from None


@cache
def _parsed(expression: str) -> ast.expr:
    try:
        if len(expression) <= _LONGEST:
            return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise ValueError(f"{expression[:_LONGEST]!r} is not an expression: write sums and products, such as 2*width")


def names_in(expression: str) -> set[str]:
    """The names in an expression; none in text that is not one."""
    try:
        return {node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name)}
    except ValueError:
        return set()


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """What matches the end of a name that a pattern describes, from a dot or the name's begin; groups are its `*`.

    `*` is one part between dots, `{a,b}` is a or b. Raises ValueError.
    """
    if not re.fullmatch(r"[\w.*]*(\{[\w.*]+(,[\w.*]+)*\}[\w.*]*)*", pattern) or not 0 < len(pattern) <= _LONGEST:
        raise ValueError(f"{pattern!r} is not a pattern: write parts of a name, `*` for any one, {{a,b}} for a or b")
    return re.compile(r"(?:.*\.)?" + regex_text(pattern, part=r"([^.]+)"))


def regex_text(pattern: str, part: str = r"[^.]+") -> str:
    """A pattern in the language of regular expressions. part: what stands for its `*`."""
    text = {"*": part, "{": "(?:", "}": ")", ",": "|"}
    return "".join(text.get(piece, re.escape(piece)) for piece in re.split(r"([*{},])", pattern))


@dataclass(frozen=True)
class RoleEntry:
    """A pattern over names, and what the tensors of these names are."""

    pattern: str
    role: str
    axes: tuple[str, ...]
    fill: float | None = None  # what the tensor starts from in place of random numbers
    into_residual: bool = False  # its output is added to the residual stream

    @classmethod
    def parse(cls, pattern: str, entry: Any) -> Self:
        """Reads `{ROLE: AXES}`, with `fill` and `residual` beside it. Raises ValueError."""
        compiled(pattern)
        if not isinstance(entry, Mapping):
            raise ValueError(f"`{pattern}` is {entry!r} but must give a role its axes, such as {{attention: out in}}")
        roles = [key for key in entry if key not in ("fill", "residual")]
        if len(roles) != 1 or roles[0] not in ROLES:
            raise ValueError(f"`{pattern}` must have one role, of {', '.join(ROLES)}, but has {entry!r}")
        axes = tuple(str(entry[roles[0]]).split())
        # A number alone has no axis.
        if not set(axes) <= set(AXES) or not (axes or roles[0] == "norm"):
            raise ValueError(f"`{pattern}` has the axes {entry[roles[0]]!r}: write {', '.join(AXES)} for each")
        if roles[0] not in ("embedding", "norm") and "in" not in axes:
            raise ValueError(f"`{pattern}` has no axis `in`: say which one the product with this matrix sums over")
        fill, residual = entry.get("fill"), entry.get("residual", False)
        known = fill is None or (isinstance(fill, int | float) and not isinstance(fill, bool) and math.isfinite(fill))
        if not known or not isinstance(residual, bool):
            raise ValueError(f"`{pattern}`: `fill` is a number, and `residual` is true or false")
        return cls(pattern, roles[0], axes, fill if fill is None else float(fill), residual)

    def matches(self, name: str) -> bool:
        """Whether a parameter's name is one of these."""
        return compiled(self.pattern).fullmatch(name) is not None


@dataclass(frozen=True)
class RoleTable:
    """The roles of all tensors of an architecture, and where a config of it has the sizes that rules refer to.

    model_types: of transformers' configs that it is for. gates: how router logits become an expert's score. sizes: for
    each of `SIZES`, expressions over the config's fields, of which the first that has a value counts. follow_width: the
    fields that a narrower model has less of. observe: for each of `QUANTITIES`, a pattern over names of modules.
    """

    name: str = field(compare=False)
    entries: tuple[RoleEntry, ...]
    sizes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    observe: tuple[tuple[str, str], ...] = ()
    gates: str = "softmax"
    model_types: tuple[str, ...] = field(default=(), compare=False)
    follow_width: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, name: str, table: Any) -> Self:
        """Reads an entry of `roles`. Raises ValueError naming the key."""
        try:
            if (
                not isinstance(table, Mapping)
                or not isinstance(tensors := table.get("tensors"), Mapping)
                or not tensors
            ):
                raise ValueError("`tensors` is missing: give patterns over names, and a role for each")
            for key in table:
                if key not in _KEYS:
                    raise ValueError(f"`{key}` is not a known key: the keys are {', '.join(_KEYS)}")
            sizes, observe = _mapping(table, "sizes", SIZES), _mapping(table, "observe", QUANTITIES)
            alternatives = {
                key: tuple(text if isinstance(text, list | tuple) else [text]) for key, text in sizes.items()
            }
            for text in (text for texts in alternatives.values() for text in texts):
                evaluate(str(text), {})
            for pattern in observe.values():
                compiled(str(pattern))
            gates = table.get("gates", "softmax")
            if gates not in GATES:
                raise ValueError(f"`gates` is {gates!r} but must be one of {', '.join(GATES)}")
            return cls(
                name,
                tuple(RoleEntry.parse(str(pattern), tensors[pattern]) for pattern in sorted(tensors, key=str)),
                tuple((key, tuple(map(str, texts))) for key, texts in sorted(alternatives.items())),
                tuple((key, str(pattern)) for key, pattern in sorted(observe.items())),
                gates,
                _words(table, "model_types"),
                _words(table, "follow_width"),
            )
        except ValueError as error:
            raise ValueError(f"`roles.{name}`: {error}") from None

    def entry(self, parameter: str) -> RoleEntry:
        """The one entry for a parameter's name. Raises ValueError where none matches, or several do."""
        found = [entry for entry in self.entries if entry.matches(parameter)]
        if len(found) == 1:
            return found[0]
        if found:
            patterns = " and ".join(f"`{entry.pattern}`" for entry in found)
            raise ValueError(f"`{parameter}` matches {patterns} of roles {self.name!r}: make one of them narrower")
        raise ValueError(f"`{parameter}` has no role in roles {self.name!r}: add a pattern for it")

    def sizes_of(self, fields: Mapping[str, Any]) -> dict[str, int]:
        """The sizes that a config with these fields has. Raises ValueError for one that is not whole."""
        found = {}
        for size, texts in self.sizes:
            value = next((value for text in texts if (value := evaluate(text, fields)) is not None), None)
            if value is not None:
                if value.denominator != 1 or value < 1:
                    raise ValueError(f"`{size}` is {float(value):g} by roles {self.name!r}, not a whole number from 1")
                found[size] = int(value)
        return found

    def as_data(self) -> dict[str, Any]:
        """All that a model's numbers depend on, as plain data that `parse` reads back."""
        tensors = {}
        for entry in self.entries:
            of_one: dict[str, Any] = {entry.role: " ".join(entry.axes)}
            of_one |= {} if entry.fill is None else {"fill": entry.fill}
            tensors[entry.pattern] = of_one | ({"residual": True} if entry.into_residual else {})
        sizes = {size: list(texts) for size, texts in self.sizes}
        return {"gates": self.gates, "sizes": sizes, "observe": dict(self.observe), "tensors": tensors}


def _mapping(table: Mapping[str, Any], key: str, known: Sequence[str]) -> Mapping[str, Any]:
    found = table.get(key, {})
    if not isinstance(found, Mapping) or not set(found) <= set(known):
        raise ValueError(f"`{key}` is {found!r} but must give a value to some of {', '.join(known)}")
    return found


def _words(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = table.get(key, ())
    if not isinstance(found, list | tuple) or not all(isinstance(word, str) for word in found):
        raise ValueError(f"`{key}` is {found!r} but must be a list of names")
    return tuple(found)
