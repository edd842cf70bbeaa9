# What a job finds around it: the packages and the interpreter of the Snakemake that started it, or, with
# --sdm conda, of environment.yml; and nothing of the folder that the user works in.
import getpass
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

# A path to the Snakefile may have .. in it, which Snakemake keeps in some places and resolves in others.
CHECKOUT = Path(os.path.abspath(workflow.current_basedir)).parents[1]
if Path(os.path.abspath(workflow.main_snakefile)) != CHECKOUT / "Snakefile":
    raise WorkflowError(
        "mup-moe is not a module for other workflows, as its rules call its own src: clone the repository,"
        " and run snakemake there, or with --snakefile PATH/Snakefile"
    )

# Snakemake looks up what braces hold, PYTHONPATH is cut at colons, and on the way here <> would be a pattern.
if re.search("[{}:]", str(CHECKOUT)) or re.search("<.+>", os.path.relpath(CHECKOUT)):
    raise WorkflowError(
        f"the checkout is in {CHECKOUT}, and {{}}, <> and : cannot be used there: rename that folder"
    )

# The checkout's own source serves every job, installed or not.
SOURCE = CHECKOUT / "src"
# Where Python and Snakemake import from by themselves, but no package is to come from; and the source, which comes first.
OWN_FOLDERS = [CHECKOUT, CHECKOUT / "workflow/rules", workflow.workdir_init, "", SOURCE]
OWN_FOLDERS = set(map(os.path.realpath, OWN_FOLDERS))


def foreign(paths):
    """The paths, as seen from where Snakemake was started, but for our own folders."""
    paths = (os.path.join(workflow.workdir_init, path) for path in paths)
    return [path for path in paths if os.path.realpath(path) not in OWN_FOLDERS]


INHERITED = foreign(os.environ.get("PYTHONPATH", "").split(os.pathsep))
sys.path[:] = [str(SOURCE), *foreign(sys.path)]
PYTHONPATH = os.pathsep.join([str(SOURCE), *INHERITED])
# For every process that is started from here: jobs on other nodes are Snakemakes of their own.
os.environ |= {
    "PYTHONPATH": PYTHONPATH,
    "PYTHONSAFEPATH": "1",
    # Caches are ours, not everybody's.
    "MPLCONFIGDIR": os.path.abspath(".snakemake/matplotlib"),
    "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    or os.path.abspath(".snakemake/torch"),
}

# A container's number without a name, at which Snakemake would stop.
try:
    getpass.getuser()
except (KeyError, OSError):
    os.environ |= {"LOGNAME": str(os.getuid())}

CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
# `python` in a rule: a function, as the linter takes no variable of ours there.
PYTHON = "" if CONDA else f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; '
# Snakemake takes PYTHONPATH from a conda job.
PREFIX = f"export PYTHONPATH={shlex.quote(str(SOURCE) if CONDA else PYTHONPATH)}; "
# Snakemake formats it.
shell.prefix((PREFIX + PYTHON).replace("{", "{{").replace("}", "}}"))
