# The environment of a job: the packages and the interpreter of the Snakemake that started it, or those of
# environment.yml with --sdm conda. Nothing is imported from the user's working folder.
import getpass
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

# The path to the Snakefile may contain .., which Snakemake keeps in some places and resolves in others.
CHECKOUT = Path(os.path.abspath(workflow.current_basedir)).parents[1]
if Path(os.path.abspath(workflow.main_snakefile)) != CHECKOUT / "Snakefile":
    raise WorkflowError(
        "mup-moe is not a module for other workflows, because its rules call its own src: clone the repository and"
        " run snakemake there, or with --snakefile PATH/Snakefile"
    )

# Snakemake substitutes text in braces, PYTHONPATH is split at colons, and <> in a relative path would be a pattern.
if re.search("[{}:]", str(CHECKOUT)) or re.search("<.+>", os.path.relpath(CHECKOUT)):
    raise WorkflowError(
        f"the path of the checkout, {CHECKOUT}, contains {{}}, <> or a colon, which does not work: rename that folder"
    )

# Every job uses the checkout's own source, even if another version is installed.
SOURCE = CHECKOUT / "src"
# Folders on Python's or Snakemake's default path that no package may come from; and the source, which is put first.
OWN_FOLDERS = [CHECKOUT, CHECKOUT / "workflow/rules", workflow.workdir_init, "", SOURCE]
OWN_FOLDERS = set(map(os.path.realpath, OWN_FOLDERS))


def foreign(paths):
    """Returns the paths except our own folders, resolved against the folder in which Snakemake was started."""
    paths = (os.path.join(workflow.workdir_init, path) for path in paths)
    return [path for path in paths if os.path.realpath(path) not in OWN_FOLDERS]


INHERITED = foreign(os.environ.get("PYTHONPATH", "").split(os.pathsep))
sys.path[:] = [str(SOURCE), *foreign(sys.path)]
PYTHONPATH = os.pathsep.join([str(SOURCE), *INHERITED])
# For every process started from here, including the Snakemake processes that run jobs on other nodes.
os.environ |= {
    "PYTHONPATH": PYTHONPATH,
    "PYTHONSAFEPATH": "1",
    # Caches of our own, not the user's shared ones.
    "MPLCONFIGDIR": os.path.abspath(".snakemake/matplotlib"),
    "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    or os.path.abspath(".snakemake/torch"),
}

# In a container the user id may have no name, which would make Snakemake fail.
try:
    getpass.getuser()
except (KeyError, OSError):
    os.environ |= {"LOGNAME": str(os.getuid())}

CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
# `python` in a rule is a shell function, because the linter accepts no variable of ours there.
PYTHON = "" if CONDA else f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; '
# Snakemake removes PYTHONPATH from the environment of a conda job.
PREFIX = f"export PYTHONPATH={shlex.quote(str(SOURCE) if CONDA else PYTHONPATH)}; "
# Doubled braces, because Snakemake formats the prefix.
shell.prefix((PREFIX + PYTHON).replace("{", "{{").replace("}", "}}"))
