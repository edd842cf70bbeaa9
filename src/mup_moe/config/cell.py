"""A cell: one training run of the sweep, and its name."""

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from mup_moe.parametrization import GROUPS

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_LONGEST_ID = 200
_POWER = re.compile(r"2\^(-?\d+(?:\.\d+)?)")
# The paper's architectures; any other one is an entry of `architectures`.
ARCHITECTURES = ("moe", "dense")
# The limits of an axis: far beyond any real sweep, but tight enough that nothing computed from them overflows.
_RANGES: dict[str, tuple[float, float, str]] = {
    "width": (1, 2**20, "2^20"),
    "experts": (1, 2**20, "2^20"),
    "granularity": (1, 2**20, "2^20"),
    "learning_rate": (1e-30, 1e30, "1e+30"),
    "seed": (0, 2**63 - 1, "2^63 - 1"),
}


class LearningRate(float):
    """A positive, finite learning rate with an exact text form.

    Accepts a number or text ("0.001", "2^-9", "2^-6.5"). `str` gives the canonical spelling: a power of two with an
    exponent that is a multiple of 1/4 as "2^-9", and anything else as the shortest decimal that reads back to the same
    float.
    """

    def __new__(cls, value: float | str) -> "LearningRate":
        """Reads a number or its text. Raises ValueError for anything else."""
        try:
            power = _POWER.fullmatch(value.strip()) if isinstance(value, str) else None
            number = 2.0 ** float(power[1]) if power else float(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{value!r} is not a learning rate: write 0.001, 1e-3 or 2^-10") from None
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{value!r} is not a learning rate: it must be positive and finite")
        return super().__new__(cls, number)

    def __str__(self) -> str:
        exponent = round(4 * math.log2(self)) / 4
        if 2.0**exponent == float(self):
            return f"2^{exponent:g}"
        return float.__repr__(self)

    __repr__ = __str__

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Returns the schema by which pydantic validates a field of this type."""
        # Imported here because the trainer creates learning rates on machines without pydantic.
        from pydantic_core import core_schema

        number_or_text = core_schema.union_schema(
            [core_schema.float_schema(strict=True), core_schema.str_schema(strict=True)]
        )
        return core_schema.no_info_after_validator_function(cls, number_or_text)


class GroupRate(NamedTuple):
    """A factor on the learning rate of a group of roles (a key of `parametrization.GROUPS`)."""

    group: str
    factor: LearningRate

    def __str__(self) -> str:
        return f"{self.group}-lr{self.factor}"

    @classmethod
    def parse(cls, text: str) -> "GroupRate":
        """Parses text such as "experts-lr2^-3". Raises ValueError."""
        group, mark, factor = text.rpartition("-lr")
        if not mark or group not in GROUPS:
            raise ValueError(f"{text!r} is not the learning rate of a group of roles: write experts-lr2^-3")
        found = cls(group, LearningRate(factor))
        if str(found) != text:
            raise ValueError(f"{text!r} is not in canonical form: write {str(found)!r}")
        return found


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the sweep. Every field except `setup` is an axis that a figure may span.

    `experts` is the number of experts at granularity 1; the model has `experts * granularity`. A dense cell has no
    experts, which is written as experts = granularity = 1. `learning_rate_of` is empty, or names a group of roles and a
    factor on its learning rate: `GroupRate.parse` reads it.
    """

    setup: str
    architecture: str
    parametrization: str
    width: int
    experts: int
    granularity: int
    learning_rate: LearningRate
    seed: int
    learning_rate_of: str = ""

    def __post_init__(self) -> None:
        for name in ("setup", "architecture", "parametrization"):
            if not NAME.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"{name} {getattr(self, name)!r} must be lower-case letters and digits, in words joined by '-'"
                )
        for axis in _RANGES:
            check_range(axis, getattr(self, axis))
        if len(self.id) > _LONGEST_ID:
            raise ValueError(f"{self.id[:60]}... is too long for a file name: shorten its names")
        if self.architecture == "dense" and (self.experts, self.granularity) != (1, 1):
            raise ValueError("a dense cell has no experts: set `experts` and `granularity` to [1]")
        if self.learning_rate_of:
            GroupRate.parse(self.learning_rate_of)

    @property
    def id(self) -> str:
        """The cell's name, exact and safe as a file name: `Cell.parse(cell.id) == cell`.

        New axes are appended after the seed and left out at their default, so that adding one renames no cell.
        """
        return self.name()

    def name(self, without: Collection[str] = ()) -> str:
        """Returns the id without some axes: a shared name for cells that differ only in those axes."""
        parts = {part: str(getattr(self, part)) for part in _MARKS if part not in without}
        return "_".join(f"{_MARKS[part]}{value}" for part, value in parts.items() if value)

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Returns the cell with this id. Raises ValueError for text that is not a cell's id."""
        match = _ID.fullmatch(text)
        if not match:
            marks = {part: mark for part, mark in _MARKS.items() if part != "learning_rate_of"}
            scheme = "_".join(f"{mark}{part.removeprefix('learning_').upper()}" for part, mark in marks.items())
            raise ValueError(f"{text!r} is not a cell's id: write it as {scheme}")
        setup, kind, rules, width, experts, granularity, rate, seed, group = match.groups()
        counts = (int(width), int(experts), int(granularity))
        cell = cls(setup, kind, rules, *counts, LearningRate(rate), int(seed), group or "")
        if cell.id != text:
            raise ValueError(f"{text!r} is not a cell's id: the id of that cell is {cell.id!r}")
        return cell


def check_range(axis: str, value: Any) -> None:
    """Raises ValueError, with a sentence, for a value outside the limits of a numeric axis."""
    least, most, shown = _RANGES.get(axis, (value, value, ""))
    if not least <= value <= most:
        # Not formatted as a LearningRate, since its spelling fails outside this range.
        value = float(value) if isinstance(value, float) else value
        raise ValueError(f"{axis} is {value} but must be between {least} and {shown}")


# The prefix of each field's value in an id.
_MARKS = {
    **dict.fromkeys(("setup", "architecture", "parametrization"), ""),
    **{"width": "w", "experts": "e", "granularity": "g", "learning_rate": "lr", "seed": "s"},
    "learning_rate_of": "",
}
_ID = re.compile(
    r"([a-z0-9-]+)_([a-z0-9-]+)_([a-z0-9-]+)_w(\d+)_e(\d+)_g(\d+)_lr([0-9.e^+-]+)_s(\d+)(?:_([a-z-]+-lr[0-9.e^+-]+))?"
)
AXES = tuple(field.name for field in fields(Cell) if field.name != "setup")


def grid(setup: str, axes: Mapping[str, Sequence[Any]]) -> Iterator[Cell]:
    """Yields all cells of a set-up over the product of `axes` (axis name -> its values)."""
    for values in itertools.product(*(axes[axis] for axis in AXES)):
        yield Cell(setup, *values)
