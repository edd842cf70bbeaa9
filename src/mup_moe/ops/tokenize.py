"""Turns a corpus of the config into tokens: python -m mup_moe tokenize."""

import argparse
import os
import sys

from mup_moe.data.corpus import remark_of
from mup_moe.data.tokenize import tokenize
from mup_moe.options import add_config_arguments, read_sweep
from mup_moe.sweep import one_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("corpus", help="its name in the config")
    add_config_arguments(parser)
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads that encode; the files do not depend on it"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command. Raises UserError."""
    sweep = read_sweep(arguments)
    folder = sweep.tokens(one_of(arguments.corpus, sweep.config.corpora, "corpora"))
    tokenize(sweep.config.corpora[arguments.corpus], folder, arguments.threads)
    if said := remark_of(folder):
        _say(f"corpus {folder.name}: {said}")


def _say(sentence: str) -> None:
    """Prints to stderr, and to stdout where that leads elsewhere: the workflow keeps stderr in a log."""
    print(sentence, file=sys.stderr, flush=True)
    try:
        apart = not os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (AttributeError, OSError):  # one of them is closed
        return
    if apart:
        print(sentence, flush=True)
