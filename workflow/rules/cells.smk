# Trains the cells. Cells that differ only in the axes of `execution.lockstep` share a process: each such job has a rule
# whose outputs are the files of its cells. `train` is for a single cell, which is any cell if nothing is shared, and
# otherwise one that no figure needs.
from pathlib import Path


def for_cells(value, cells):
    """Returns a function of the wildcards: the value for these cells or, if there are none, for the wildcard's cell."""
    return as_workflow_error(lambda wildcards: value(cells or [wildcards.cell]))


def memory_of(cells):
    """Returns the memory of a job as a function that Snakemake calls for each attempt."""
    wanted = for_cells(SWEEP.memory_mb, cells)
    return lambda wildcards, attempt: memory_for_attempt(wanted(wildcards), attempt)


def manifest_of(cells):
    """Returns the manifest of the cells' tokens, which represents them as an input because it has their digest."""
    return SWEEP.tokens(SWEEP.corpus(cells[0])) / "manifest.json"


def tokens_of(cells):
    """Returns the files of the tokens, which only have to exist."""
    return ancient(SWEEP.token_files(SWEEP.corpus(cells[0])))


JOBS = SWEEP.jobs if CONFIG.execution.lockstep else {}

for job, cells in (JOBS | {"{cell}": []}).items():

    rule:
        name:
            f"train_{job}" if cells else "train"
        input:
            manifest=for_cells(manifest_of, cells),
            tokens=for_cells(tokens_of, cells),
        output:
            history=expand(
                "results/cells/{cell}/history.csv",
                cell=[cell.id for cell in cells] or "{cell}",
            ),
            summary=expand(
                "results/cells/{cell}/summary.json",
                cell=[cell.id for cell in cells] or "{cell}",
            ),
        log:
            f"results/logs/train/{job}.log",
        benchmark:
            f"results/benchmarks/train/{job}.tsv"
        # The longest jobs first, so that none of them is left to run alone at the end.
        priority: cells[0].width if cells else 0
        conda:
            "../../environment.yml"
        threads: CONFIG.execution.threads
        resources:
            **GPU,
            mem_mb=memory_of(cells),
        params:
            # Snakemake does not compare a function of the outputs, so adding a cell to a job trains only that cell.
            cells=lambda wildcards, output: [
                Path(path).parent.name for path in output.summary
            ],
            settings=for_cells(SWEEP.settings_digest, cells),
            version=VERSION,
        # Execution settings are read from the config and are not params, because they must not cause reruns.
        shell:
            "python -m mup_moe train {params.cells:q} --threads {threads} 2>> {log:q}"
