# Shared by the other files of rules: the sweep of the config, and digests of code and settings.
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
# Measured speeds of the device that will train, from the checkout.
BENCHMARK = str(SWEEP.benchmark(Path(os.path.relpath(CHECKOUT)) / "benchmarks"))
# A pattern that matches no name, for kinds of results that the config does not have.
NOTHING = "(?!)"


wildcard_constraints:
    # A loose pattern and a check of each name scale to 10,000 cells; an alternation of ids does not.
    cell=r"[a-z0-9-]+_[a-z0-9-]+_[a-z0-9-]+_w[^/]+",
    corpus="|".join(CONFIG.corpora),
    figure="|".join(CONFIG.figures),
    probe="|".join(CONFIG.probes) or NOTHING,


def as_workflow_error(function):
    """Wraps the function so that Snakemake shows only the sentence of a UserError, without a traceback."""

    @wraps(function)
    def call(*arguments, **more):
        try:
            return function(*arguments, **more)
        except UserError as error:
            raise WorkflowError(str(error)) from None

    return call


def literal(paths):
    """Returns the paths. Raises UserError for one that Snakemake would not take literally."""
    for path in paths:
        if re.search("{.+}|<.+>|[\ud800-\udfff]", str(path), re.DOTALL):
            raise UserError(
                f"{in_one_line(str(path))} has a name that Snakemake does not take literally, with {{}} or <> or not"
                " in UTF-8: rename it"
            )
    return paths


# GPUs that a training job asks a cluster for. With `auto` the profile decides; it also sets the time.
GPU = {"cuda": {"gpu": 1}, "cpu": {"gpu": 0}, "auto": {}}[CONFIG.execution.device]


def memory_for_attempt(memory, attempt):
    """Returns the memory for an attempt at a job: more each time, but at most three times as much.

    The cap is there because most failed attempts run out of time, not of memory.
    """
    return memory * min(attempt, 3)
