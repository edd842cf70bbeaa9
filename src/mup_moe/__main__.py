"""The commands that the workflow's rules, and its users, call: python -m mup_moe COMMAND --help."""

import os
import sys

if __name__ == "__main__":
    # Of -m, or of an empty entry of PYTHONPATH: a file of the user's may have the name of a module.
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.realpath("")]

import argparse
import importlib
import io

# Name -> what it does, and its module, which has `add_arguments(parser)` and `run(arguments)`. Only the
# module asked for is imported, so that training starts without pandas and plotting without torch.
COMMANDS = {
    "tokenize": ("turns a corpus into tokens", "mup_moe.data.tokenize"),
    "train": ("trains the cells of one job", "mup_moe.ops.train"),
    "aggregate": ("collects the results of a figure's cells in one table", "mup_moe.analysis.aggregate"),
    "optima": ("estimates the best learning rate of each curve", "mup_moe.analysis.optima"),
    "collect": ("joins tables with the same columns", "mup_moe.analysis.collect"),
    "figure": ("draws a figure, a composition or what a probe measured", "mup_moe.figures.command"),
    "reference": ("compares a figure's losses with published ones", "mup_moe.analysis.reference"),
    "table1": ("writes the table of parametrizations", "mup_moe.tables.table1"),
    "table2": ("writes the table of models", "mup_moe.tables.table2"),
    "plan": ("estimates what each sweep costs", "mup_moe.tables.plan"),
    "probe": ("measures the models of one width in their first steps", "mup_moe.training.probe"),
    "slopes": ("fits how a probe's values scale with width", "mup_moe.analysis.slopes"),
    "claims": ("decides on the paper's claims", "mup_moe.analysis.claims"),
    "record": ("copies finished results, with what made them, to results/recorded", "mup_moe.analysis.record"),
    "status": ("shows how a sweep stands, and changes no file", "mup_moe.ops.status.command"),
    "export-jobs": ("lists jobs for a machine without Snakemake", "mup_moe.ops.offsite.export_jobs"),
    "run-jobs": ("trains the jobs of such a list", "mup_moe.ops.offsite.run_jobs"),
    "import-cells": ("brings home the cells that were trained there", "mup_moe.ops.offsite.import_cells"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. A mistake that users can mend becomes one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    _open_streams()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough, as head has.
        _drop_output()
        return 1
    except OSError as error:
        from mup_moe.files import explain_disk_error

        # Of a named file, its writer says what to do; what is printed has no name.
        if error.filename or not explain_disk_error(error):
            raise
        _drop_output()
        return _fail(f"the output cannot be written ({error.strerror}): free space, and run the same command again")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "mup_moe" or package in sys.stdlib_module_names:
            raise
        return _fail(
            f"the package `{package}` is missing from {sys.executable}: activate the environment"
            " (. .venv/bin/activate), or make it by `make install`"
        )


def _open_streams() -> None:
    """Opens the streams that the caller closed (`>&-`); else the next file would take their number."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is


def _drop_output() -> None:
    """Sends what is not printed yet nowhere, which Python would try again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    from mup_moe.files import UserError  # here, as it needs a package too

    parser = argparse.ArgumentParser(prog="python -m mup_moe", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, module) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=purpose)
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(subparser)
    arguments = parser.parse_args(argv)
    if layers := os.environ.get("MUP_MOE_CONFIG"):
        print(f"config: {layers}", file=sys.stderr, flush=True)
    try:
        return importlib.import_module(COMMANDS[arguments.command][1]).run(arguments) or 0
    except UserError as error:
        return _fail(str(error))


def _fail(sentence: str) -> int:
    print(f"mup-moe: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
