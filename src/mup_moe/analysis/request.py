"""What the workflow asks of `optima` and `figure`, as JSON on their command lines.

Standard library only, so that a Snakefile can import it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from mup_moe.config.cell import AXES
from mup_moe.config.learning_rate import LearningRate
from mup_moe.config.settings import AnalysisSettings, AxesSettings, Config, FigureSettings
from mup_moe.files import UserError, argument_text


def figure_request(config: Config, name: str) -> dict[str, Any]:
    """All that the results of one figure depend on besides its runs, as JSON-ready data.

    Keys: setup, panel, curve, base (the curve axis' value at which the set-up's parametrizations
    agree), axes (axis -> values, learning rates in their exact spelling), analysis. What draws a
    figure adds its `reference`, the path of a CSV as seen from where it runs: optima do without.
    """
    figure = config.figures[name]
    model = config.setups[figure.setup].model
    base = {"width": model.base_width, "experts": model.base_experts, "granularity": 1}[figure.curve]
    axes = {axis: list(getattr(figure.axes, axis)) for axis in AXES}
    return {
        "setup": figure.setup,
        "panel": figure.panel,
        "curve": figure.curve,
        "base": base,
        "axes": axes | {"learning_rate": [str(rate) for rate in figure.axes.learning_rate]},
        "analysis": asdict(config.analysis),
    }


@dataclass(frozen=True)
class FigureRequest:
    """What a figure's results depend on besides its runs.

    base: the value of the curve axis at which the set-up's parametrizations agree.
    """

    figure: FigureSettings
    base: int | None
    analysis: AnalysisSettings

    @classmethod
    def of(cls, config: Config, name: str) -> Self:
        """That of a figure of a config."""
        figure = config.figures[name]
        model = config.setups[figure.setup].model
        base = {"width": model.base_width, "experts": model.base_experts, "granularity": 1}[figure.curve]
        return cls(figure, base, config.analysis)

    @classmethod
    def parse(cls, request: Mapping[str, Any]) -> Self:
        """Reads what `figure_request` made. Raises UserError for anything else."""
        try:
            axes = {axis: tuple(values) for axis, values in request["axes"].items()}
            axes["learning_rate"] = tuple(LearningRate(rate) for rate in axes["learning_rate"])
            figure = FigureSettings(
                setup=request["setup"],
                panel=request["panel"],
                curve=request["curve"],
                axes=AxesSettings(**axes),
                reference=request.get("reference"),
            )
            return cls(figure, request["base"], AnalysisSettings(**request["analysis"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"the figure's request is not what figure_request() makes ({error!r}): pass that") from None

    @property
    def panels(self) -> tuple[Any, ...]:
        """The values of the panel axis, in the order of the config."""
        return tuple(getattr(self.figure.axes, self.figure.panel))

    @property
    def values(self) -> tuple[int, ...]:
        """The values of the curve axis, ascending."""
        return tuple(sorted(getattr(self.figure.axes, self.figure.curve)))

    def parametrization(self, panel: Any) -> str:
        """The parametrization drawn in a panel."""
        return str(panel) if self.figure.panel == "parametrization" else self.figure.axes.parametrization[0]


def parse_json(text: str, option: str) -> dict[str, Any]:
    """The mapping that a command-line option, or standard input for "-", holds as JSON. Raises UserError."""
    try:
        value = json.loads(argument_text(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{option} is not JSON ({error}): pass what the workflow passes") from None
    if not isinstance(value, dict):
        raise UserError(f"{option} must hold a JSON object: pass what the workflow passes")
    return value


assert {field.name for field in fields(AxesSettings)} == set(AXES)
