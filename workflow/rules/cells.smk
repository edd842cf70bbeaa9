# One cell, one training run. Cells that `execution.lockstep` lets differ share a process: a rule is made for each
# such job, with the folders of its cells as outputs; and `train`, for a cell on its own: every one where nothing is
# shared, and those of no figure.
from pathlib import Path


def of_cells(value, cells):
    """As a function of wildcards: the value for these cells or, without any, for the one of the wildcard."""
    return in_a_sentence(lambda wildcards: value(cells or [wildcards.cell]))


def memory_of(cells):
    """The memory of a job, for Snakemake to ask with each attempt."""
    wanted = of_cells(SWEEP.memory_mb, cells)
    return lambda wildcards, attempt: growing(wanted(wildcards), attempt)


def manifest_of(cells):
    """It holds the tokens' digest, and stands for them."""
    return SWEEP.tokens(SWEEP.corpus(cells[0])) / "manifest.json"


def tokens_of(cells):
    """The tokens themselves, which have to be there."""
    return ancient(SWEEP.token_files(SWEEP.corpus(cells[0])))


JOBS = SWEEP.jobs if CONFIG.execution.lockstep else {}

for job, cells in (JOBS | {"{cell}": []}).items():

    rule:
        name:
            f"train_{job}" if cells else "train"
        input:
            manifest=of_cells(manifest_of, cells),
            tokens=of_cells(tokens_of, cells),
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
        # The longest first, so that none is left over in the end.
        priority: cells[0].width if cells else 0
        conda:
            "../../environment.yml"
        threads: CONFIG.execution.threads
        resources:
            **GPU,
            mem_mb=memory_of(cells),
        params:
            # As a function of the outputs it is none of what Snakemake compares: a cell more trains it alone.
            cells=lambda wildcards, output: [
                Path(path).parent.name for path in output.summary
            ],
            settings=of_cells(SWEEP.settings_digest, cells),
            version=VERSION,
        # How cells are run is in the config: it must not make them run again.
        shell:
            "python -m mup_moe train {params.cells:q} --threads {threads} 2>> {log:q}"
