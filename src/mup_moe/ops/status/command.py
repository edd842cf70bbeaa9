"""Shows how a sweep stands, while it runs or afterwards: python -m mup_moe status. It changes no file.

It shows the last sweep that was run here, or the one of the preset and the config files that you name.
"""

import argparse
import json
import time
from pathlib import Path

from mup_moe.config.options import add_sweep_arguments, read_layers
from mup_moe.files import UserError
from mup_moe.ops.status.sweep import SweepStatus
from mup_moe.ops.status.text import lines
from mup_moe.sweep import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `status`."""
    add_sweep_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for a program: all that is known, of every cell")


def run(arguments: argparse.Namespace) -> None:
    """Prints how the sweep stands. Raises UserError for a mistake in the config or the options, for nothing else."""
    layers = read_layers(arguments)
    # The default is absent from a fresh checkout.
    if arguments.results != Path("results") and not arguments.results.is_dir():
        raise UserError(f"--results is {arguments.results}, which is not a folder: name the one that Snakemake writes")
    sweep = Sweep(layers.config, arguments.results)
    # No figure shows a probe: they are told with the whole.
    probes = layers.config.probes if arguments.figures is None else {}
    beside = layers.base.parent / "benchmarks"
    benchmark = sweep.benchmark(beside) if beside.is_dir() else sweep.benchmark()
    status = SweepStatus.of(sweep, sweep.chosen(arguments.figures), probes, benchmark, time.time())
    print(json.dumps(status.as_json(), indent=2) if arguments.json else "\n".join(lines(status)))
