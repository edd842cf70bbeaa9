# One cell, one training run. Cells that `execution.lockstep` lets differ share a process: a rule is
# made for each such job, with the folders of its cells as outputs.

for job, cells in JOBS.items():

    rule:
        name:
            f"train_{job}"
        input:
            # The manifest holds the tokens' digest, and stands for them.
            manifest=f"{corpus_of(cells[0])}/manifest.json",
            tokens=ancient(token_files(cells[0])),
        output:
            history=expand("results/cells/{cell}/history.csv", cell=cells),
            summary=expand("results/cells/{cell}/summary.json", cell=cells),
        log:
            f"results/logs/train/{job}.log",
        benchmark:
            f"results/benchmarks/train/{job}.tsv"
        # The longest first, so that none is left over in the end.
        priority: request_of(cells[0]).cell.width
        conda:
            "../../environment.yml"
        threads: CONFIG.execution.threads
        resources:
            **TRAINING_RESOURCES,
            mem_mb=memory_of(cells),
        params:
            # As a function of the outputs it is none of what Snakemake compares: a cell more trains it alone.
            requests=lambda wildcards, output: request_lines(output.summary),
            settings=settings_of(cells),
            code=CODE,
        shell:
            TRAIN


# A cell on its own: every one where nothing is shared, and those of no figure.
rule train:
    input:
        manifest=lambda wildcards: f"{corpus_of(wildcards.cell)}/manifest.json",
        tokens=lambda wildcards: ancient(token_files(wildcards.cell)),
    output:
        history="results/cells/{cell}/history.csv",
        summary="results/cells/{cell}/summary.json",
    log:
        "results/logs/train/{cell}.log",
    benchmark:
        "results/benchmarks/train/{cell}.tsv"
    conda:
        "../../environment.yml"
    threads: CONFIG.execution.threads
    resources:
        **TRAINING_RESOURCES,
        mem_mb=memory_of(["{cell}"]),
    params:
        requests=lambda wildcards, output: request_lines([output.summary]),
        settings=lambda wildcards: settings_of([wildcards.cell]),
        code=CODE,
    shell:
        TRAIN
