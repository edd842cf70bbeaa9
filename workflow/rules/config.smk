# Merges the config that this Snakemake was given, and refuses command-line options that Snakemake would ignore.
import os
import sys
from contextlib import chdir, redirect_stderr
from pathlib import Path

from snakemake.cli import get_argument_parser, parse_args
from snakemake.exceptions import WorkflowError
from snakemake.profiles import ProfileConfigFileParser

from mup_moe.config.document import ConfigError
from mup_moe.config.given import Layers, check_options
from mup_moe.options import CONFIG_VARIABLE
from mup_moe.training.version import VERSION

# A run keeps its config here for its jobs, which use it even if files are edited or other runs started meanwhile.
KEPT = Path(".snakemake/mup-moe")


def check_command_line():
    """Raises ConfigError for options that Snakemake would silently drop."""
    if Path(sys.argv[0]).name not in ("snakemake", "__main__.py"):
        return  # the command line of another program
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stderr(nowhere),
        chdir(workflow.workdir_init),
    ):
        profiles = {}
        for path in parse_args(sys.argv[1:])[0]._default_config_files:
            with open(path) as stream:
                profiles[path] = ProfileConfigFileParser().parse(stream)
        check_options(get_argument_parser(), sys.argv[1:], profiles)


def keep_config():
    """Writes the config for the jobs of this run and makes their commands read it. Returns its path."""
    path = LAYERS.keep(KEPT, VERSION).absolute()
    os.environ[CONFIG_VARIABLE] = str(path)
    return path


def merge_config():
    """Returns the config with all overlays applied. Raises ConfigError."""
    # From Snakemake's settings: its `config` has numbers as text and does not say where a value came from.
    settings = workflow.config_settings
    if "layers" in settings.overwrite_config:
        # A job on a cluster, to which its run passed the config that it kept.
        if settings.overwrite_config["version"] != VERSION:
            raise WorkflowError(
                "the VERSION of the code has changed since the run of this job started: restore it, or stop that run"
                " and start it again, which retrains all unfinished cells"
            )
        os.environ[CONFIG_VARIABLE] = str(settings.configfiles[0])
        return Layers.lay(settings.configfiles[0], [], [])
    if workflow.is_main_process:
        check_command_line()
    base = Path(workflow.basedir) / "config.yaml"
    return Layers.lay(base, settings.configfiles, settings.config_args or ())


try:
    LAYERS = merge_config()
except ConfigError as error:
    raise WorkflowError(f"config: {error}") from None
try:
    CONFIG = LAYERS.config
except ConfigError as error:
    raise WorkflowError(f"config ({LAYERS}): {error}") from None
if workflow.is_main_process:
    logger.info(f"Config: {LAYERS}")
elif "layers" not in workflow.config_settings.overwrite_config:
    keep_config()  # for a job that works on a copy of everything
