# What a run does before its first job and after its last one.
from pathlib import Path

from snakemake.settings.types import SharedFSUsage

from mup_moe.analysis.collect import join_finished_tables
from mup_moe.data.corpus import remark_of
from mup_moe.files import hold_folder, settle_times
from mup_moe.ops.progress.report import report_progress


def begin():
    """Takes the folder of results, and keeps the config: for the jobs, and for people. Raises UserError."""
    # The kernel drops this lock with the process, so that a killed run leaves nothing to unlock.
    hold_folder(Path("results"))
    LAYERS.show(Path("results/config.yaml"))
    kept = keep_config()
    # Snakemake hands its jobs on a cluster the paths of configs, not what they held.
    if SharedFSUsage.SOURCES in workflow.storage_settings.shared_fs_usage:
        workflow.config_settings.configfiles = [kept]


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


def finish():
    """Has the tables at the top hold every finished figure, and says what corpora left out if no job could here."""
    cells = {figure: SWEEP.fingerprints(figure) for figure in CONFIG.figures}
    for problem in join_finished_tables(Path("results"), cells):
        logger.warning(problem)
    for job in () if workflow.local_exec else workflow.dag.finished_jobs:
        if manifest := job.output.get("manifest"):
            folder = Path(manifest).parent
            if said := remark_of(folder):
                logger.warning(f"corpus {folder.name}: {said}")


onstart:
    in_a_sentence(begin)()
    # Only Snakemake knows which jobs it will run, and which files it will look at.
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
        LAYERS.document,
        [job.output for job in training],
        # A cell that several figures show is named by one that this run makes.
        {
            figure: [cell.id for cell in SWEEP.figures[figure]]
            for figure in sorted(CONFIG.figures, key=lambda name: name not in made)
        },
        benchmark=Path(BENCHMARK),
        processes=side_by_side(training[0]) if training else None,
        tokenizing=any(job.rule.name == "tokenize" for job in planned),
        keep_going=workflow.execution_settings.keep_going,
    )


onsuccess:
    finish()


onerror:
    finish()
