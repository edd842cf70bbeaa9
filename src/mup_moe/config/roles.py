"""Role tables: the role of each tensor of an architecture, and the meaning of its axes; needs no torch.

A table is data (config.yaml, `roles`); its entries match parameters by patterns over their names.
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

# The quantities that a coordinate check observes, each the output of a module.
QUANTITIES = ("embedding", "attention", "feed-forward", "router logits", "output logits")
# The role of an axis in the product with the tensor: "in" is summed over, "out" is an output, "row" is looked up;
# "expert" and "replica" number experts and replicas.
AXES = ("in", "out", "expert", "row", "replica")
GATES = ("softmax", "sigmoid")
# The sizes of the layer; fan_in and fan_out come from the tensor itself.
SIZES = tuple(name for name in VARIABLES if name not in ("fan_in", "fan_out"))
_KEYS = ("model_types", "gates", "sizes", "follow_width", "observe", "tensors")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 200  # characters of a pattern or an expression


def evaluate(expression: str, values: Mapping[str, Any]) -> Fraction | None:
    """Evaluates an expression such as "2*width/granularity"; None if a name in it has no value. Raises ValueError."""

    def value(node: ast.expr) -> Fraction | None:
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return Fraction(number)
            case ast.Name(id=name):
                found = values.get(name)
                if found is not None and (not isinstance(found, int | float) or not math.isfinite(found)):
                    raise ValueError(f"`{name}` is {found!r} but must be a number")
                return None if found is None else Fraction(found)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                first, second = value(left), value(right)
                return None if first is None or second is None else _OPERATORS[type(op)](first, second)
        raise ValueError(f"{expression!r} is not an expression: write sums and products, such as 2*width/granularity")

    try:
        return value(_parsed(expression))
    except ZeroDivisionError:
        raise ValueError(f"{expression!r} divides by 0: correct it") from None


@cache
def _parsed(expression: str) -> ast.expr:
    try:
        if len(expression) <= _LONGEST:
            return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise ValueError(f"{expression[:_LONGEST]!r} is not an expression: write sums and products, such as 2*width")


def names_in(expression: str) -> set[str]:
    """Returns the names in an expression; empty for text that is not an expression."""
    try:
        return {node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name)}
    except ValueError:
        return set()


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern to a regular expression that matches whole names ending in it; the groups are its `*`.

    The match starts at the beginning of the name or after a dot. `*` is one part between dots, `{a,b}` is a or b.
    Raises ValueError.
    """
    if not re.fullmatch(r"[\w.*]*(\{[\w.*]+(,[\w.*]+)*\}[\w.*]*)*", pattern) or not 0 < len(pattern) <= _LONGEST:
        raise ValueError(f"{pattern!r} is not a pattern: write parts of a name, `*` for any part, {{a,b}} for a or b")
    return re.compile(r"(?:.*\.)?" + regex_text(pattern, part=r"([^.]+)"))


def regex_text(pattern: str, part: str = r"[^.]+") -> str:
    """Converts a pattern to a regular expression. part: the expression that replaces `*`."""
    text = {"*": part, "{": "(?:", "}": ")", ",": "|"}
    return "".join(text.get(piece, re.escape(piece)) for piece in re.split(r"([*{},])", pattern))


@dataclass(frozen=True)
class RoleEntry:
    """A pattern over names, and the role and axes of the tensors that it matches."""

    pattern: str
    role: str
    axes: tuple[str, ...]
    fill: float | None = None  # the constant initial value, instead of random numbers
    into_residual: bool = False  # whether the output is added to the residual stream

    @classmethod
    def parse(cls, pattern: str, entry: Any) -> Self:
        """Reads `{ROLE: AXES}`, optionally with `fill` and `residual`. Raises ValueError."""
        compiled(pattern)
        if not isinstance(entry, Mapping):
            raise ValueError(f"`{pattern}` is {entry!r} but must map a role to its axes, such as {{attention: out in}}")
        roles = [key for key in entry if key not in ("fill", "residual")]
        if len(roles) != 1 or roles[0] not in ROLES:
            raise ValueError(f"`{pattern}` is {entry!r} but must have exactly one role, one of {', '.join(ROLES)}")
        axes = tuple(str(entry[roles[0]]).split())
        # A single number has no axes.
        if not set(axes) <= set(AXES) or not (axes or roles[0] == "norm"):
            raise ValueError(f"`{pattern}` has the axes {entry[roles[0]]!r} but each must be one of {', '.join(AXES)}")
        if roles[0] not in ("embedding", "norm") and "in" not in axes:
            raise ValueError(f"`{pattern}` has no axis `in`: mark the axis that the product with this matrix sums over")
        fill, residual = entry.get("fill"), entry.get("residual", False)
        known = fill is None or (isinstance(fill, int | float) and not isinstance(fill, bool) and math.isfinite(fill))
        if not known or not isinstance(residual, bool):
            raise ValueError(f"`{pattern}`: `fill` must be a number, and `residual` must be true or false")
        return cls(pattern, roles[0], axes, fill if fill is None else float(fill), residual)

    def matches(self, name: str) -> bool:
        """Whether the pattern matches a parameter's name."""
        return compiled(self.pattern).fullmatch(name) is not None


@dataclass(frozen=True)
class RoleTable:
    """The roles of all tensors of an architecture, and where its config has the sizes that rules refer to.

    model_types: the transformers model types that the table is for. gates: how router logits become expert scores.
    sizes: for each of `SIZES`, expressions over the config's fields; the first one with a value counts. follow_width:
    the fields that are smaller in a narrower model. observe: for each of `QUANTITIES`, a pattern over module names.
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
                raise ValueError("`tensors` is missing: map patterns over names to roles")
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
        """Returns the one entry for a parameter's name. Raises ValueError if none or several match."""
        found = [entry for entry in self.entries if entry.matches(parameter)]
        if len(found) == 1:
            return found[0]
        if found:
            patterns = " and ".join(f"`{entry.pattern}`" for entry in found)
            raise ValueError(f"`{parameter}` matches {patterns} of roles {self.name!r}: make one of them narrower")
        raise ValueError(f"`{parameter}` has no role in roles {self.name!r}: add a pattern for it")

    def sizes_of(self, fields: Mapping[str, Any]) -> dict[str, int]:
        """Returns the sizes for a config with these fields. Raises ValueError if one is not a positive whole number."""
        found = {}
        for size, texts in self.sizes:
            value = next((value for text in texts if (value := evaluate(text, fields)) is not None), None)
            if value is not None:
                if value.denominator != 1 or value < 1:
                    raise ValueError(
                        f"`{size}` is {float(value):g} by roles {self.name!r} but must be a whole number of at least 1"
                    )
                found[size] = int(value)
        return found

    def as_data(self) -> dict[str, Any]:
        """Returns everything that a model's numbers depend on, as plain data that `parse` reads back."""
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
        raise ValueError(f"`{key}` is {found!r} but must be a mapping with keys from {', '.join(known)}")
    return found


def _words(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = table.get(key, ())
    if not isinstance(found, list | tuple) or not all(isinstance(word, str) for word in found):
        raise ValueError(f"`{key}` is {found!r} but must be a list of names")
    return tuple(found)
