"""Estimates, from a pilot's values, how many seeds a probe needs to decide the slope tests of the claims.

A slope's interval has to be within the margin. The mean over S seeds at a width departs from a line for two reasons:
noise, of variance n^2 / S, and a departure that all seeds share, of variance b^2, since a quantity need not follow a
power law. More seeds only reduce the noise. With x the log2 of the W widths, the slope's variance is
(n^2 / S + b^2) / sum((x - mean x)^2).
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from mup_moe.analysis.markup import markdown_table
from mup_moe.analysis.slopes import log2_of_positive, over, read_values
from mup_moe.config.settings import SlopeTest
from mup_moe.files import UserError
from mup_moe.options import add_config_arguments, read_sweep
from mup_moe.sweep import one_of


class Spread(NamedTuple):
    """Standard deviations of a pilot's values from a line, in octaves.

    noise: of a seed's values around the means of their widths, after removing the seed's offset. shared: of those means
    around the line, beyond what noise explains.
    """

    noise: float
    shared: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("probe", help="the probe in the config, with the widths to be measured")
    help_pilot = "the values.csv of a pilot, or the values.csv.gz of a recorded sweep"
    parser.add_argument("--pilot", required=True, type=Path, metavar="CSV", help=help_pilot)
    help_power = "the probability that each interval is within the margin (default: 0.9)"
    parser.add_argument("--power", type=_share, default=0.9, metavar="P", help=help_power)
    help_off = "distance of the true slope from the predicted one, in margins (default: 1/3)"
    parser.add_argument("--off", type=_share, default=1 / 3, metavar="F", help=help_off)
    add_config_arguments(parser)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and less than 1")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Prints a row per slope test of the claims and block, and the seeds that they all need. Raises UserError."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.probe, sweep.config.probes, "probes")
    probe, pilot, claims = sweep.config.probes[name], read_values(arguments.pilot), sweep.config.claims
    values = probe.axes.values(probe.over)
    free = claims.slope_margin * (1 - arguments.off)
    rows, found = [], []
    for test in (slope for claim in claims.table.values() for slope in claim.slopes if slope.probe == name):
        for block, spread in spreads(pilot, test).items():
            found.append(seeds_needed(spread, values, free, sweep.config.analysis.confidence, arguments.power))
            shown = [f"{octaves:.3f}" for octaves in spread]
            rows.append([test.quantity, str(test.step), block, *shown, str(found[-1] or "no number")])
    if not rows:
        raise UserError(
            f"no claim tests a slope of {name} that {arguments.pilot} has values for: name a probe that `claims`"
            " tests, and a pilot of it"
        )
    print(markdown_table(("quantity", "step", "block", "noise", "shared", "seeds"), rows))
    decided = [seeds for seeds in found if seeds]
    if decided:
        power = f"with a power of {arguments.power:g} each"
        seeds = f"{max(decided)} seeds over {len(values)} values of {probe.over}"
        print(f"{seeds} decide {len(decided)} of {len(found)} tests {power}.")
    if len(decided) < len(found):
        print("No number of seeds decides the others at widths like the pilot's: measure more or larger widths.")


def spreads(pilot: pd.DataFrame, test: SlopeTest) -> dict[str, Spread]:
    """Returns block -> how a test's values depart from a line. Raises UserError if the pilot is too small."""
    chosen = log2_of_positive(pilot)
    for column in ("parametrization", "quantity", "step"):
        chosen = chosen[chosen[column] == getattr(test, column)]
    found = {}
    for block, values in chosen.groupby("block"):
        table = values.pivot_table(index="seed", columns=over(pilot), values="value").dropna()
        seeds, widths = table.shape
        if seeds < 2 or widths < 3:
            raise UserError(
                "the pilot is too small: measure at least two seeds that have values at the same three or more widths"
            )
        means = table.mean(axis=0)
        rest = table.sub(means, axis=1)
        rest = rest.sub(rest.mean(axis=1), axis=0)
        noise = float((rest.to_numpy() ** 2).sum()) / ((seeds - 1) * (widths - 1))
        line = np.polynomial.Polynomial.fit(means.index, means, 1)
        about_line = float(((means - line(means.index.to_numpy())) ** 2).sum()) / (widths - 2)
        found[str(block)] = Spread(math.sqrt(noise), math.sqrt(max(about_line - noise / seeds, 0.0)))
    return found


def seeds_needed(spread: Spread, widths: tuple[int, ...], free: float, confidence: float, power: float) -> int | None:
    """Returns the fewest seeds for which the interval stays within `free` of the true slope with probability `power`.

    Returns None if no number of seeds suffices. Uses the interval of the means over seeds, which has W - 2 degrees of
    freedom and is the wider one.
    """
    x, freedom = np.log2(widths), len(widths) - 2
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom) + stats.t.ppf(power, freedom))
    variance = (free / reach) ** 2 * float(np.sum((x - x.mean()) ** 2)) - spread.shared**2
    return max(2, math.ceil(spread.noise**2 / variance)) if variance > 0 else None
