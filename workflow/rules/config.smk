# The config that this Snakemake was given, laid together; and the command line, as far as Snakemake would drop of it.
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

# Here a run keeps its config for its jobs, which go by that whatever is edited or started meanwhile.
KEPT = Path(".snakemake/mup-moe")


def check_command_line():
    """Refuses options that Snakemake drops in silence. Raises ConfigError."""
    if Path(sys.argv[0]).name not in ("snakemake", "__main__.py"):
        return  # another program's own
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
    """Writes the config for the jobs of this run, and has their commands read it. Returns the path."""
    path = LAYERS.keep(KEPT, VERSION).absolute()
    os.environ[CONFIG_VARIABLE] = str(path)
    return path


def lay_config():
    """The config with everything laid over it. Raises ConfigError."""
    # Snakemake's own, since its `config` has numbers as text, and not what was given where.
    settings = workflow.config_settings
    if "layers" in settings.overwrite_config:
        # A job on a cluster, whose run has handed on what it has kept.
        if settings.overwrite_config["version"] != VERSION:
            raise WorkflowError(
                "VERSION of the code is no longer that of the run that this job is of: restore it, or stop that run"
                " and start it again, which trains again what is not finished"
            )
        os.environ[CONFIG_VARIABLE] = str(settings.configfiles[0])
        return Layers.lay(settings.configfiles[0], [], [])
    if workflow.is_main_process:
        check_command_line()
    base = Path(workflow.basedir) / "config.yaml"
    return Layers.lay(base, settings.configfiles, settings.config_args or ())


try:
    LAYERS = lay_config()
    CONFIG = LAYERS.config
except ConfigError as error:
    raise WorkflowError(f"config.yaml: {error}") from None
if workflow.is_main_process:
    logger.info(f"Config: {LAYERS}")
elif "layers" not in workflow.config_settings.overwrite_config:
    keep_config()  # of a job that got a copy of everything
