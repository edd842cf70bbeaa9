# Text to tokens, once per corpus.
from dataclasses import asdict


rule tokenize:
    input:
        lambda wildcards: text_of(wildcards.corpus),
    output:
        multiext(
            "results/data/{corpus}/",
            tokenizer="tokenizer.json",
            train="train.bin",
            valid="valid.bin",
            manifest="manifest.json",
        ),
    log:
        "results/logs/tokenize/{corpus}.log",
    benchmark:
        "results/benchmarks/tokenize/{corpus}.tsv"
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        gpu=0,
        mem_mb=lambda wildcards, attempt: growing(2000, attempt),
    params:
        corpus=lambda wildcards: json.dumps(asdict(CONFIG.corpora[wildcards.corpus])),
        code=CODE,
    shell:
        "python -m mup_moe tokenize --corpus -"
        " --out results/data/{wildcards.corpus} --threads {threads} 2> {log} <<< {params.corpus:q}"
