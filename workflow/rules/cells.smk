# One cell, one training run.


rule train:
    input:
        # The manifest holds the tokens' digest, and stands for them.
        manifest=lambda wildcards: f"{corpus_of(wildcards.cell)}/manifest.json",
        tokens=lambda wildcards: ancient(
            [
                f"{corpus_of(wildcards.cell)}/{split}.bin"
                for split in ("train", "valid")
            ]
        ),
        # All that can change a result. What the files say enters below, as CODE: an edit that means
        # something retrains, a touch or a comment does not.
        sources=ancient(SOURCE_FILES),
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
        gpu=1 if CONFIG.execution.device == "cuda" else 0,
        mem_mb=1500,
        runtime=720,
        # Not params: how a cell is run must not make it run again.
        device=CONFIG.execution.device,
        checkpoint_seconds=str(CONFIG.execution.checkpoint_seconds),
    params:
        request=lambda wildcards: request_json(wildcards.cell),
        code=CODE,
    shell:
        "python -m mup_moe train --request {params.request:q}"
        " --tokens $(dirname {input.manifest}) --out results/cells/{wildcards.cell}"
        " --device {resources.device} --threads {threads}"
        " --checkpoint-seconds {resources.checkpoint_seconds} 2>> {log}"
