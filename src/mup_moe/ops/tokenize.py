"""Turns a corpus of the config into tokens: python -m mup_moe tokenize."""

import argparse
import os
import sys

from mup_moe.data.corpus import remark_of
from mup_moe.data.tokenize import tokenize
from mup_moe.options import add_config_arguments, read_sweep
from mup_moe.sweep import one_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("corpus", help="name of the corpus in the config")
    add_config_arguments(parser)
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="encoding threads; the output does not depend on it"
    )


def run(arguments: argparse.Namespace) -> None:
    """Tokenizes the corpus and prints what was skipped or changed. Raises UserError."""
    sweep = read_sweep(arguments)
    folder = sweep.tokens(one_of(arguments.corpus, sweep.config.corpora, "corpora"))
    tokenize(sweep.config.corpora[arguments.corpus], folder, arguments.threads)
    if remark := remark_of(folder):
        _report(f"corpus {folder.name}: {remark}")


def _report(sentence: str) -> None:
    """Prints to stderr and, unless it is the same file, to stdout: the workflow redirects stderr to a log."""
    print(sentence, file=sys.stderr, flush=True)
    try:
        separate = not os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (AttributeError, OSError):  # one of them is closed
        return
    if separate:
        print(sentence, flush=True)
