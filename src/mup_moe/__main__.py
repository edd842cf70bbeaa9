"""The commands that the workflow's rules and its users call: python -m mup_moe COMMAND --help."""

import gc
import os
import sys

if __name__ == "__main__":
    # Imported modules are never freed: scanning them for garbage would take an eighth of the startup time.
    gc.disable()
    # -m and an empty PYTHONPATH entry add the working folder, where a user's file could shadow a module.
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != os.path.realpath("")]

import argparse
import atexit
import difflib
import importlib
import io

from mup_moe.files import UserError, explain_disk_error

# Group -> command -> (what it does, its module in this package, example arguments). The module has `run(arguments)`;
# without `add_arguments(parser)`, the command takes only the config options. Only the requested module is imported, so
# that training starts without pandas.
GROUPS = {
    "produce results by hand": {
        "tokenize": ("turns a corpus into tokens", "ops.tokenize", "python --threads 2"),
        "train": ("trains cells", "ops.train", "mixtral_moe_mup_w64_e8_g1_lr2^-5_s0"),
        "aggregate": ("collects the results of a figure's cells into one table", "analysis.aggregate", "figure1"),
        "optima": ("estimates the best learning rate of each of a figure's curves", "analysis.optima", "figure1"),
        "attribution": ("measures what each group of roles contributes", "analysis.attribution", "attribution"),
        "sensitivity": ("reports which groups of roles a set-up detects", "analysis.sensitivity", "sensitivity"),
        "comparison": ("compares rules on the same seeds", "analysis.comparison", "figure6 --preset granularity"),
        "collect": ("joins the tables of all figures", "analysis.collect", "runs"),
        "figure": ("draws a figure, a composition or the values of a probe", "figures.command", "figure1"),
        "reference": ("compares a figure's losses with published ones", "analysis.reference", "figure1"),
        "probe": ("measures the models of a probe over their first steps", "ops.probe", "lemma_b1"),
        "slopes": ("fits how a probe's values scale with width", "analysis.slopes", "coordinate_check"),
        "power": ("estimates how many seeds a probe needs", "analysis.power", "lemma_b1_slopes --pilot values.csv"),
        "claims": ("decides the paper's claims", "analysis.claims", "--preset gpu"),
        "verdicts": ("shows the verdicts of recorded sweeps together", "analysis.verdicts", "results/recorded/default"),
        "table1": ("writes the table of parametrizations", "tables.table1", ""),
        "table2": ("writes the table of models", "tables.table2", ""),
        "plan": ("estimates what each sweep costs", "tables.plan", "--preset paper"),
    },
    "monitor and record a sweep": {
        "status": ("shows the state of a sweep without changing any file", "ops.status.command", "--figures figure1"),
        "record": ("copies finished results, with what made them, to results/recorded", "analysis.record", "default"),
    },
    "use the rules on your own model": {
        "roles": ("prints the rules for a Hugging Face model", "library.command", "CONFIG.json --base-width 256"),
    },
    "use other machines": {
        "export-jobs": (
            "writes a list of figures' jobs",
            "ops.offsite.export_jobs",
            "--figures figure1 --out jobs.jsonl",
        ),
        "run-jobs": ("trains the jobs of an exported list", "ops.offsite.run_jobs", "--jobs jobs.jsonl --archive out"),
        "import-cells": ("imports the cells that run-jobs trained", "ops.offsite.import_cells", "out/cells-000.tar.gz"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
_PROGRAM = "python -m mup_moe"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status. Prints an error that users can fix as one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    _open_streams()
    try:
        try:
            return _run(argv)
        except UserError as error:
            return _fail(str(error))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe early, as `head` does.
        _drop_output()
        return 1
    except OSError as error:
        # Code that writes a named file explains its own errors; an error on stdout names no file.
        if error.filename or not explain_disk_error(error):
            raise
        _drop_output()
        return _fail(f"the output cannot be written ({error.strerror}): free space and run the same command again")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "mup_moe" or package in sys.stdlib_module_names:
            raise
        return _fail(
            f"the package `{package}` is missing from {sys.executable}: activate the environment"
            " (. .venv/bin/activate), or create it with `make install`"
        )


def _open_streams() -> None:
    """Opens standard streams that the caller closed (`>&-`), so that no other file gets their descriptors."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is


def _drop_output() -> None:
    """Discards buffered output, which Python would otherwise flush again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
        print(f"mup-moe: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2
    arguments = parser_of(name).parse_args(argv[1:])
    return arguments.run(arguments) or 0


def parser_of(name: str) -> argparse.ArgumentParser:
    """Returns a command's argument parser; the parsed arguments have the command's function as `run`."""
    from mup_moe.options import add_config_arguments

    purpose, path, example = COMMANDS[name]
    module = importlib.import_module(f"mup_moe.{path}")
    gc.enable()
    parser = argparse.ArgumentParser(
        prog=f"{_PROGRAM} {name}",
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example: {_PROGRAM} {name} {example}",
    )
    getattr(module, "add_arguments", add_config_arguments)(parser)
    parser.set_defaults(run=module.run)
    return parser


def overview() -> str:
    """Lists all commands by group, one line each."""
    lines = [f"usage: {_PROGRAM} COMMAND ...", ""]
    lines += ["The steps that the workflow's rules call, and commands for monitoring a sweep.", ""]
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<14}{purpose}" for name, (purpose, *_) in commands.items()), ""]
    lines += [
        "Every step reads the config of the last run (results/config.yaml) or, if there is none, config.yaml.",
        "To name other config files:",
        f"  {_PROGRAM} optima figure1 --config config.yaml mine.yaml",
        f"{_PROGRAM} COMMAND --help shows a command's arguments and an example.",
    ]
    return "\n".join(lines)


def _fail(sentence: str) -> int:
    print(f"mup-moe: {sentence}", file=sys.stderr)
    return 1


def _leave(status: int) -> None:
    """Exits. Skips the interpreter's teardown once torch is loaded, as it takes a quarter of the startup time."""
    if "torch" in sys.modules:
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _leave(main())
