"""Learning rates as exact values with one spelling."""

import math
import re
from typing import Any

_POWER = re.compile(r"2\^(-?\d+(?:\.\d+)?)")


class LearningRate(float):
    """A positive, finite learning rate, exact through its own text.

    Accepts a number or text ("0.001", "2^-9", "2^-6.5"). `str` gives the canonical spelling:
    a power of two whose exponent is a multiple of 1/4 as "2^-9", anything else as the shortest
    decimal that reads back to the same float.
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
        """How pydantic validates a field of this type."""
        # Imported here: the trainer builds learning rates on machines without pydantic.
        from pydantic_core import core_schema

        number_or_text = core_schema.union_schema(
            [core_schema.float_schema(strict=True), core_schema.str_schema(strict=True)]
        )
        return core_schema.no_info_after_validator_function(cls, number_or_text)
