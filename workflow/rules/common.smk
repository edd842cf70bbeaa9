# From config.yaml to typed settings and cells; nothing here knows of tensors.
import hashlib
import json
import os
import re
import shlex
import sys
from contextlib import chdir, redirect_stderr
from functools import cache
from pathlib import Path

from snakemake.cli import get_argument_parser, parse_args
from snakemake.exceptions import WorkflowError
from snakemake.profiles import ProfileConfigFileParser
from snakemake.settings.types import SharedFSUsage

from mup_moe.analysis.collect import collect_finished
from mup_moe.analysis.request import figure_request
from mup_moe.config.cell import Cell
from mup_moe.config.document import ConfigError, in_one_line
from mup_moe.config.given import Layers, check_options
from mup_moe.config.jobs import jobs
from mup_moe.config.load import validate
from mup_moe.data.corpus import remark_of
from mup_moe.data.text_files import find
from mup_moe.data.corpus import tokenizer_paths, vocabulary_of
from mup_moe.files import UserError, hold_folder, settle_times, write_text
from mup_moe.parametrization import parse_table
from mup_moe.provenance import source_digest
from mup_moe.ops.progress.report import report_progress
from mup_moe.ops.memory import memory_mb
from mup_moe.training.request import TrainingRequest, to_lines
from mup_moe.training.version import VERSION

# The merged config, which commands read.
CONFIG_FILE = ".snakemake/mup-moe/config.json"
DEFAULTS = Path(workflow.basedir) / "config.yaml"

CODE = f"version {VERSION}"

# A job on a cluster goes by what its run has handed on, whatever is edited meanwhile.
GIVEN = workflow.config_settings.overwrite_config
HANDED_ON = None if workflow.is_main_process or "document" not in GIVEN else GIVEN


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


def config_document():
    """The config with everything laid over it, typed, and its layers in one line. Raises ConfigError."""
    if HANDED_ON is None:
        if workflow.is_main_process:
            check_command_line()
        settings = workflow.config_settings
        layers = Layers.lay(DEFAULTS, settings.configfiles, settings.config_args or ())
        return layers.document, layers.config, str(layers)
    if HANDED_ON["code"] != CODE:
        raise WorkflowError(
            "the code that trains is no longer that of the run that this job is of: restore it, or stop that run"
            " and start it again, which trains again what is not finished"
        )
    document = HANDED_ON["document"]
    return document, validate(document), HANDED_ON["layers"]


try:
    DOCUMENT, CONFIG, LAYERS = config_document()
except ConfigError as error:
    raise WorkflowError(f"config.yaml: {error}") from None

# For the first line of every log.
os.environ |= {"MUP_MOE_CONFIG": LAYERS}
if workflow.is_main_process:
    logger.info(f"Config: {LAYERS}")

PARAMETRIZATIONS = parse_table(CONFIG.parametrizations)
ANALYSIS_CODE = source_digest(
    sorted(
        path
        for part in ("analysis", "figures", "tables")
        for path in SOURCE.glob(f"mup_moe/{part}/*.py")
        if path.name != "kinds.py"  # what it says for the report enters no result
    )
)


def literal(paths):
    """The paths, all of which Snakemake takes as they are. Raises UserError."""
    for path in paths:
        if re.search("{.+}|<.+>|[\ud800-\udfff]", str(path), re.DOTALL):
            raise UserError(
                f"{in_one_line(str(path))} has a name that Snakemake does not take as it is, with {{}} or <>"
                " or not in UTF-8: rename it"
            )
    return paths


@cache
def text_of(corpus):
    """A corpus's own files; what a source installs or streams by itself is no file of ours."""
    settings = CONFIG.corpora[corpus]
    try:
        return literal(find(settings.files) + tokenizer_paths(settings.tokenizer_files))
    except UserError as error:
        raise WorkflowError(f"config.yaml: `corpora.{corpus}`: {error}") from None


@cache
def vocabulary_size(corpus):
    """How many tokens the models of a corpus know, at most."""
    try:
        return vocabulary_of(CONFIG.corpora[corpus])
    except UserError as error:
        raise WorkflowError(f"config.yaml: `corpora.{corpus}`: {error}") from None


# Text or a vocabulary that is not there is told before anything runs.
for result in [*CONFIG.figures.values(), *CONFIG.probes.values()]:
    text_of(CONFIG.setups[result.setup].corpus)
    vocabulary_size(CONFIG.setups[result.setup].corpus)


# What no name matches, for a kind of result that the config has none of.
NOTHING = "(?!)"


wildcard_constraints:
    # A loose pattern and a check of each name scale to 10,000 cells; an alternation of ids does not.
    cell=r"[a-z0-9-]+_(moe|dense)_[^/]+",
    corpus="|".join(CONFIG.corpora),
    figure="|".join(CONFIG.figures),
    probe="|".join(CONFIG.probes) or NOTHING,
    width=r"\d+",


@cache
def request_of(cell_id):
    """The training request of a cell, in a figure or not, as long as the config can build it."""
    try:
        cell = Cell.parse(cell_id)
        setup = CONFIG.setups[cell.setup]
        setup.model.check(cell)
        rules = PARAMETRIZATIONS[cell.parametrization]
    except KeyError as error:
        raise WorkflowError(f"cell {cell_id}: config.yaml lists no {error}") from None
    except ValueError as error:
        raise WorkflowError(f"cell {cell_id}: {error}") from None
    return TrainingRequest(cell, setup.model, setup.training, rules)


def request_lines(summaries):
    """What asks `train` for the cells of these summaries."""
    return "\n".join(to_lines(request_of(Path(path).parent.name) for path in summaries))


def settings_of(cell_ids):
    """What cells are trained with, apart from what their names say: an edit of it trains them anew."""
    return sorted({request_of(cell_id).settings for cell_id in cell_ids})


def corpus_of(cell_id):
    """The folder of the tokens that a cell is trained on."""
    return f"results/data/{CONFIG.setups[request_of(cell_id).cell.setup].corpus}"


def token_files(cell_id):
    """The files of those tokens."""
    return [f"{corpus_of(cell_id)}/{split}.bin" for split in ("train", "valid")]


@cache
def cells_of(figure):
    """The ids of a figure's cells."""
    return [cell.id for cell in CONFIG.figures[figure].cells()]


def jobs_of(execution):
    """The ids of the cells of each job, by its name; none where every cell is a job for itself."""
    if not execution.lockstep:
        return {}
    shown = {name: figure.cells() for name, figure in CONFIG.figures.items()}
    found = jobs(shown, execution.lockstep, execution.cells_per_job)
    return {job: [cell.id for cell in cells] for job, cells in found.items()}


JOBS = jobs_of(CONFIG.execution)

# The speed of the device that will train, once it is measured.
BENCHMARK = Path(workflow.basedir) / "benchmarks" / "step.csv"
if CONFIG.execution.device == "cuda" and (BENCHMARK.parent / "gpu/step.csv").exists():
    BENCHMARK = BENCHMARK.parent / "gpu/step.csv"
BENCHMARK = os.path.relpath(BENCHMARK)

# What a cluster gives a job that trains. Where a GPU is taken if there is one, the profile says whether
# to ask for it, and so it does of the time.
GPU = {"cuda": {"gpu": 1}, "cpu": {"gpu": 0}, "auto": {}}[CONFIG.execution.device]


def growing(memory, attempt):
    """The memory of a job's try: each gets more, up to three times, as most end for want of time, not of memory."""
    return memory * min(attempt, 3)


def memory_of(cell_ids):
    """The memory of a job of these cells, in MB, for Snakemake to ask with each attempt."""

    def memory(wildcards, attempt):
        requests = [
            request_of(cell.format(cell=wildcards.get("cell"))) for cell in cell_ids
        ]
        vocabulary = vocabulary_size(CONFIG.setups[requests[0].cell.setup].corpus)
        execution = CONFIG.execution
        wanted = memory_mb(
            requests, vocabulary, execution.device, str(execution.replicas)
        )
        return growing(wanted, attempt)

    return memory


TRAINING_RESOURCES = GPU | dict(
    # Not params: how a cell is run must not make it run again.
    device=CONFIG.execution.device,
    replicas=str(CONFIG.execution.replicas),
    step=CONFIG.execution.step,
    checkpoint_seconds=str(CONFIG.execution.checkpoint_seconds),
    hang_seconds=str(CONFIG.execution.hang_seconds),
)
# What can be long comes by standard input: an argument holds 128 KiB, and Snakemake has long text in a file.
TRAIN = (
    "python -m mup_moe train --request -"
    " --tokens $(dirname {input.manifest:q}) --out results/cells --device {resources.device}"
    " --replicas {resources.replicas} --step {resources.step} --threads {threads}"
    " --checkpoint-seconds {resources.checkpoint_seconds} --hang-seconds {resources.hang_seconds}"
    " 2>> {log:q} <<< {params.requests:q}"
)


def probe_cells(wildcards):
    """The models of one width of a probe."""
    return [
        cell
        for cell in CONFIG.probes[wildcards.probe].cells()
        if str(cell.width) == wildcards.width
    ]


def probe_tokens(wildcards):
    """The folder of the tokens that a probe's models see."""
    setup = CONFIG.probes[wildcards.probe].setup
    return f"results/data/{CONFIG.setups[setup].corpus}"


def probe_values(wildcards):
    """What a probe measured, one file per width."""
    widths = CONFIG.probes[wildcards.probe].axes.width
    return [f"results/{wildcards.probe}/w{width}.csv" for width in widths]


def hand_on_config():
    """Has the jobs that other processes run, on a cluster, read the config as it is now."""
    if SharedFSUsage.SOURCES not in workflow.storage_settings.shared_fs_usage:
        return  # those get a copy of everything
    kept = json.dumps({"document": DOCUMENT, "layers": LAYERS, "code": CODE})
    path = Path(f".snakemake/mup-moe/{hashlib.sha256(kept.encode()).hexdigest()}.json")
    write_text(path, kept)
    workflow.config_settings.configfiles = [path.absolute()]


def fingerprints_of(figure):
    """What the rows of a figure's runs.csv have as fingerprints; empty where its tokens are not here."""
    # Here, as it takes numpy along, which no start needs: every job on a cluster is one.
    from mup_moe.data.tokens import Tokens

    try:
        tokens = Tokens.open(Path(corpus_of(cells_of(figure)[0]))).digest
    except UserError:
        return dict.fromkeys(cells_of(figure), "")
    return {cell: request_of(cell).fingerprint(tokens) for cell in cells_of(figure)}


def collect():
    """Has the tables at the top hold every figure that is finished so far."""
    cells = {figure: fingerprints_of(figure) for figure in CONFIG.figures}
    for problem in collect_finished(Path("results"), cells):
        logger.warning(problem)


def side_by_side(job):
    """How many such jobs run at once on this machine; None on a cluster, which decides it as it runs."""
    if not workflow.local_exec:
        return None
    limits = {name: workflow.global_resources.get(name) for name in ("_cores", "gpu")}
    needs = {name: job.resources.get(name) for name in limits}
    return min(
        limits[name].value // needs[name]
        for name in limits
        if limits[name] and needs[name]
    )


def tell_remarks():
    """Says what was left out of corpora of this run, where their jobs cannot say it here."""
    for job in () if workflow.local_exec else workflow.dag.finished_jobs:
        if manifest := job.output.get("manifest"):
            folder = Path(manifest).parent
            if said := remark_of(folder):
                logger.warning(f"corpus {folder.name}: {said}")


onstart:
    # The kernel drops this lock with the process, so that a killed run leaves nothing to unlock.
    try:
        hold_folder(Path("results"))
        hand_on_config()
        write_text(Path(CONFIG_FILE), json.dumps(DOCUMENT | {"preset": "default"}))
    except UserError as error:
        raise WorkflowError(str(error)) from None
    planned = list(workflow.dag.needrun_jobs())
    # All files of all jobs, done or not: their order is to stay. Text of elsewhere is its owner's.
    known = {
        path for job in workflow.dag.jobs for path in (*job.input, *job.output)
    }
    for path in settle_times(map(Path, known), within=Path()):
        logger.warning(
            f"{path} is dated in the future: until then, or until you touch it, what is made of it is made again"
        )
    made = {job.wildcards.figure for job in planned if job.rule.name == "aggregate"}
    training = [job for job in planned if "summary" in dict(job.output.items())]
    report_progress(
        DOCUMENT,
        [job.output for job in training],
        # A cell that several figures show is named by one that this run makes.
        {
            figure: cells_of(figure)
            for figure in sorted(CONFIG.figures, key=lambda name: name not in made)
        },
        benchmark=Path(BENCHMARK),
        processes=side_by_side(training[0]) if training else None,
        tokenizing=any(job.rule.name == "tokenize" for job in planned),
        keep_going=workflow.execution_settings.keep_going,
    )


onsuccess:
    collect()
    tell_remarks()


onerror:
    collect()
    tell_remarks()
