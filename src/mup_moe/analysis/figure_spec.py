"""The settings that a figure's results depend on, besides its runs.

Uses only the standard library, so that a Snakefile can import it.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

from mup_moe.config.cell import GroupRate
from mup_moe.config.settings import AnalysisSettings, Config, FigureSettings


@dataclass(frozen=True)
class FigureSpec:
    """A figure and its base: the value of the curve axis at which the set-up's parametrizations agree."""

    figure: FigureSettings
    base: int
    analysis: AnalysisSettings

    @classmethod
    def of(cls, config: Config, name: str) -> Self:
        """Returns the spec of a figure of a config."""
        return cls(config.figures[name], config.base_of(name), config.analysis)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that optima depend on, as plain data; how a figure is drawn is not part of it."""
        figure = {name: value for name, value in asdict(self.figure).items() if name not in ("kind", "reference")}
        return asdict(self) | {"figure": figure}

    @property
    def log2_rates(self) -> dict[float, int]:
        """log2 of the tuned value -> its index on the axis; tuned is the global learning rate or a group's factor."""
        values = self.figure.axes.values(self.figure.rate)
        if not self.figure.tunes:
            return {math.log2(rate): place for place, rate in enumerate(values)}
        # A cell that names no group has factor 1.
        return {math.log2(GroupRate.parse(value).factor) if value else 0.0: at for at, value in enumerate(values)}

    @property
    def panels(self) -> tuple[Any, ...]:
        """The values of the panel axis, in the order of the config."""
        return tuple(getattr(self.figure.axes, self.figure.panel))

    @property
    def values(self) -> tuple[int, ...]:
        """The values of the curve axis, ascending."""
        return tuple(sorted(getattr(self.figure.axes, self.figure.curve)))

    def parametrization(self, panel: Any) -> str:
        """Returns the parametrization drawn in a panel."""
        return str(panel) if self.figure.panel == "parametrization" else self.figure.axes.parametrization[0]
