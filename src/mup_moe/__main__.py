"""The commands that the workflow's rules, and its users, call: python -m mup_moe COMMAND --help."""

import argparse
import importlib
import sys

from mup_moe.files import UserError

# Each module has `add_arguments(parser)` and `run(arguments)`; only the one asked for is imported,
# so that training starts without pandas and plotting without torch.
COMMANDS = {
    "tokenize": "mup_moe.data.tokenize",
    "train": "mup_moe.training.command",
    "aggregate": "mup_moe.analysis.aggregate",
    "optima": "mup_moe.analysis.optima",
    "collect": "mup_moe.analysis.collect",
    "figure": "mup_moe.analysis.figure",
    "composition": "mup_moe.analysis.composition",
    "reference": "mup_moe.analysis.reference",
    "table1": "mup_moe.analysis.table1",
    "table2": "mup_moe.analysis.table2",
    "plan": "mup_moe.analysis.plan",
    "probe": "mup_moe.training.probe",
    "slopes": "mup_moe.analysis.slopes",
    "probe-figure": "mup_moe.analysis.probe_figure",
    "claims": "mup_moe.analysis.claims",
    "record": "mup_moe.analysis.record",
    "status": "mup_moe.status.command",
    "export-jobs": "mup_moe.offsite.export_jobs",
    "run-jobs": "mup_moe.offsite.run_jobs",
    "import-cells": "mup_moe.offsite.import_cells",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. A UserError becomes one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m mup_moe", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(name)
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(subparser)
    arguments = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[arguments.command]).run(arguments) or 0
    except UserError as error:
        print(f"mup-moe: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
