# What a run does before its first job and after its last job.
from pathlib import Path

from snakemake.settings.types import SharedFSUsage

from mup_moe.analysis.collect import join_finished_tables
from mup_moe.data.corpus import remark_of
from mup_moe.files import hold_folder, settle_times
from mup_moe.ops.progress.report import report_progress


def begin():
    """Locks the folder of results, and keeps the config for the jobs and for people. Raises UserError."""
    # The kernel releases this lock when the process ends, so a killed run leaves nothing to unlock.
    hold_folder(Path("results"))
    LAYERS.show(Path("results/config.yaml"))
    kept = keep_config()
    # Snakemake passes the paths of configs to its jobs on a cluster, not their contents.
    if SharedFSUsage.SOURCES in workflow.storage_settings.shared_fs_usage:
        workflow.config_settings.configfiles = [kept]


def jobs_at_once(job):
    """Returns how many such jobs this machine runs at once; None on a cluster, where it is not known beforehand."""
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
    """Updates the top-level tables with every finished figure, and repeats the remarks of jobs that ran elsewhere.

    These remarks say what tokenizing left out of a corpus.
    """
    cells = {figure: SWEEP.fingerprints(figure) for figure in CONFIG.figures}
    for problem in join_finished_tables(Path("results"), cells):
        logger.warning(problem)
    for job in () if workflow.local_exec else workflow.dag.finished_jobs:
        if manifest := job.output.get("manifest"):
            folder = Path(manifest).parent
            if said := remark_of(folder):
                logger.warning(f"corpus {folder.name}: {said}")


onstart:
    as_workflow_error(begin)()
    # Here, because only Snakemake knows which jobs it will run and which files it will look at.
    planned = list(workflow.dag.needrun_jobs())
    # All files of all jobs, finished or not, so that their order in time is kept. Files outside belong to others.
    known = {
        path for job in workflow.dag.jobs for path in (*job.input, *job.output)
    }
    for path in settle_times(map(Path, known), within=Path()):
        logger.warning(
            f"{path} is dated in the future, so everything made from it is remade until that date: touch it"
        )
    made = {job.wildcards.figure for job in planned if job.rule.name == "aggregate"}
    training = [job for job in planned if "summary" in dict(job.output.items())]
    report_progress(
        LAYERS.document,
        [job.output for job in training],
        # Figures that this run makes come first: a cell of several figures is reported under the first.
        {
            figure: [cell.id for cell in SWEEP.figures[figure]]
            for figure in sorted(CONFIG.figures, key=lambda name: name not in made)
        },
        benchmark=Path(BENCHMARK),
        processes=jobs_at_once(training[0]) if training else None,
        tokenizing=any(job.rule.name == "tokenize" for job in planned),
        keep_going=workflow.execution_settings.keep_going,
    )


onsuccess:
    finish()


onerror:
    finish()
