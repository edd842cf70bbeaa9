# What several files of rules need: the sweep of the config, and digests of code and settings.
import os
import re
from functools import wraps
from pathlib import Path

from snakemake.exceptions import WorkflowError

from mup_moe.config.document import in_one_line
from mup_moe.files import UserError
from mup_moe.provenance import source_digest
from mup_moe.sweep import Sweep, digest

SWEEP = Sweep(CONFIG, layers=str(LAYERS))
ANALYSIS_CODE = source_digest(
    sorted(
        path
        for part in ("analysis", "figures", "tables")
        for path in SOURCE.glob(f"mup_moe/{part}/*.py")
    )
)
# The speed of the device that will train, in the checkout.
BENCHMARK = str(SWEEP.benchmark(Path(os.path.relpath(CHECKOUT)) / "benchmarks"))
# What no name matches, for a kind of result that the config has none of.
NOTHING = "(?!)"


wildcard_constraints:
    # A loose pattern and a check of each name scale to 10,000 cells; an alternation of ids does not.
    cell=r"[a-z0-9-]+_[a-z0-9-]+_[a-z0-9-]+_w[^/]+",
    corpus="|".join(CONFIG.corpora),
    figure="|".join(CONFIG.figures),
    probe="|".join(CONFIG.probes) or NOTHING,


def in_a_sentence(function):
    """The function, of whose UserErrors Snakemake tells the sentence alone."""

    @wraps(function)
    def call(*arguments, **more):
        try:
            return function(*arguments, **more)
        except UserError as error:
            raise WorkflowError(str(error)) from None

    return call


def literal(paths):
    """The paths, all of which Snakemake takes as they are. Raises UserError."""
    for path in paths:
        if re.search("{.+}|<.+>|[\ud800-\udfff]", str(path), re.DOTALL):
            raise UserError(
                f"{in_one_line(str(path))} has a name that Snakemake does not take as it is, with {{}} or <>"
                " or not in UTF-8: rename it"
            )
    return paths


# What a cluster gives a job that trains. Where a GPU is taken if there is one, the profile says whether
# to ask for it, and so it does of the time.
GPU = {"cuda": {"gpu": 1}, "cpu": {"gpu": 0}, "auto": {}}[CONFIG.execution.device]


def growing(memory, attempt):
    """The memory of a job's try: each gets more, up to three times, as most end for want of time, not of memory."""
    return memory * min(attempt, 3)
