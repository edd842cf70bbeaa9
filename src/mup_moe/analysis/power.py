"""Says how many seeds a probe needs, so that the slopes of the claims can be decided; from a pilot's values.

A slope's interval has to lie within the margin. With W widths and S seeds, whose values depart from a line with a
standard deviation s each, the slope's standard error is s / sqrt(S * sum((x - mean x)^2)), x being log2 of the widths.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mup_moe.analysis.markup import markdown_table
from mup_moe.analysis.slopes import log2_of_positive, read_values
from mup_moe.config.settings import SlopeTest
from mup_moe.options import add_config_arguments, read_sweep
from mup_moe.sweep import one_of

MOST_SEEDS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("probe", help="its name in the config, whose widths are to be measured")
    help_pilot = "the values.csv that a pilot measured, such as that of a recorded sweep"
    parser.add_argument("--pilot", required=True, type=Path, metavar="CSV", help=help_pilot)
    help_power = "the probability that each interval lies within the margin (default: 0.9)"
    parser.add_argument("--power", type=float, default=0.9, metavar="P", help=help_power)
    help_off = "how far the true slope lies from the predicted one, in margins (default: 1/3)"
    parser.add_argument("--off", type=float, default=1 / 3, metavar="F", help=help_off)
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints a row per slope test of the claims and block, and the seeds that all of them need. Raises UserError."""
    sweep = read_sweep(arguments)
    name = one_of(arguments.probe, sweep.config.probes, "probes")
    widths, pilot, claims = sweep.config.probes[name].axes.width, read_values(arguments.pilot), sweep.config.claims
    rows, most = [], 0
    for test in (slope for claim in claims.table.values() for slope in claim.slopes if slope.probe == name):
        for block, deviation in deviations(pilot, test).items():
            free = claims.slope_margin * (1 - arguments.off)
            seeds = seeds_needed(deviation, widths, free, sweep.config.analysis.confidence, arguments.power)
            rows.append([test.quantity, str(test.step), block, f"{deviation:.3f}", str(seeds)])
            most = max(most, seeds)
    print(markdown_table(("quantity", "step", "block", "deviation", "seeds"), rows))
    print(f"{most} seeds over {len(widths)} widths decide every test with a power of {arguments.power:g} each.")


def deviations(pilot: pd.DataFrame, test: SlopeTest) -> dict[str, float]:
    """Block -> standard deviation, in octaves, of a seed's value about the mean of its width; seeds have offsets."""
    chosen = log2_of_positive(pilot)
    for column in ("parametrization", "quantity", "step"):
        chosen = chosen[chosen[column] == getattr(test, column)]
    found = {}
    for block, values in chosen.groupby("block"):
        table = values.pivot_table(index="seed", columns="width", values="value")
        rest = table.sub(table.mean(axis=0), axis=1)
        rest = rest.sub(rest.mean(axis=1), axis=0)
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        found[str(block)] = float(np.sqrt(np.nansum(rest.to_numpy() ** 2) / freedom)) if freedom else math.nan
    return found


def seeds_needed(deviation: float, widths: tuple[int, ...], free: float, confidence: float, power: float) -> int:
    """The fewest seeds whose interval reaches less than `free` from the true slope, with this probability.

    By the interval of the means over seeds, which has W - 2 degrees of freedom and is the wider one.
    """
    spread = float(np.sum((np.log2(widths) - np.log2(widths).mean()) ** 2))
    freedom = len(widths) - 2
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom) + stats.t.ppf(power, freedom))
    return min(max(2, math.ceil((reach * deviation / free) ** 2 / spread)), MOST_SEEDS)
