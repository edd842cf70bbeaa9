"""Places axis labels without overlap, with at least two labels if there are two values."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from mup_moe.figures.plotting import Axes, Axis, FuncFormatter, MaxNLocator, ScalarFormatter

CHARACTER, GAP = 0.071, 0.03  # inches: the width of an 8-point digit, and the least space between two labels
USUAL = 4  # characters in a usual label
POWER = 0.24  # inches, the width of a label such as 2^-10
NICE = (1, 2, 5, 10)

Ticks = dict[float, str]  # place on the axis -> text
Limits = tuple[float, float]


def labels(axis: Axis) -> list[str]:
    """Returns the texts of an axis's labels."""
    return axis.get_major_formatter().format_ticks(list(axis.get_majorticklocs()))


def excess(*texts: str) -> float:
    """Returns the width, in inches, that the longest label takes beyond a label of USUAL characters."""
    return max([0.0, *(_width(text) - CHARACTER * USUAL for text in texts)])


def _width(label: str) -> float:
    return POWER if label.startswith("$") else CHARACTER * len(label)


def label_axis(axes: Axes, ticks: Mapping[float, str], inches: float) -> None:
    """Labels the horizontal axis of a panel; rotates the labels if two would overlap."""
    axes.set_xticks(list(ticks), list(ticks.values()))
    if not keep_apart(ticks, axes.get_xlim(), inches - excess(*ticks.values())):
        axes.tick_params(axis="x", labelrotation=90)


def keep_apart(ticks: Mapping[float, str], limits: Limits, inches: float) -> bool:
    """Whether labels do not touch each other on an axis of this length."""
    unit = inches / (limits[1] - limits[0])
    return all((b - a) * unit - (_width(ticks[a]) + _width(ticks[b])) / 2 >= GAP for a, b in pairwise(sorted(ticks)))


def thinned(ticks: Mapping[float, str], limits: Limits, inches: float, most: int | None = None) -> Ticks:
    """Returns every n-th tick, for the least n with at most `most` labels and no overlap; otherwise the two ends."""
    places = sorted(ticks)
    for n in range(math.ceil(len(places) / (most or len(places))), len(places)):
        chosen = {place: ticks[place] for place in places[::n]}
        if keep_apart(chosen, limits, inches):
            return chosen
    return {place: ticks[place] for place in (places[0], places[-1])}


def rate_ticks(log2_rates: Sequence[float], limits: Limits, inches: float) -> Ticks:
    """Returns ticks of an axis in log2 of the learning rate: powers of 2 if two are in view, else decimal numbers."""
    octaves = range(math.ceil(limits[0]), math.floor(limits[1]) + 1)
    for step in (2**power for power in range(20)):
        powers: Ticks = {octave: f"$2^{{{octave}}}$" for octave in octaves if octave % step == 0}
        if keep_apart(powers, limits, inches):
            break
    if len(powers) > 1 or powers.keys() == set(log2_rates):
        return powers
    if len(log2_rates) == 1:
        return {log2_rates[0]: f"{2 ** log2_rates[0]:.9g}"}
    low, high = 2 ** limits[0], 2 ** limits[1]
    for count in range(5, 0, -1):
        ticks = MaxNLocator(count, steps=NICE).tick_values(low, high)
        found = {math.log2(tick): f"{tick:.12g}" for tick in ticks if low <= tick <= high}
        if len(found) > 1 and keep_apart(found, limits, inches):
            return found
    return {place: f"{2**place:.9g}" for place in (min(log2_rates), max(log2_rates))}


def number_formatter(limits: Limits) -> FuncFormatter | ScalarFormatter:
    """Returns a formatter that writes each number in full, without an offset or exponent at the end of the axis."""
    if max(map(abs, limits)) >= 1e5:
        return FuncFormatter(lambda number, _: f"{number:.7g}")
    return ScalarFormatter(useOffset=False)
