# Text to tokens, once per corpus.
import json
from dataclasses import asdict
from glob import glob


def text_of(wildcards):
    """The user's own files; what a source installs or streams by itself is no file of ours."""
    patterns = map(os.path.expanduser, CONFIG.corpora[wildcards.corpus].files)
    found = (glob(pattern, recursive=True) for pattern in patterns)
    return sorted({file for files in found for file in files if os.path.isfile(file)})


rule tokenize:
    input:
        text_of,
    output:
        multiext(
            "results/data/{corpus}/",
            tokenizer="tokenizer.json",
            train="train.bin",
            valid="valid.bin",
            manifest="manifest.json",
        ),
    params:
        corpus=lambda wildcards: json.dumps(asdict(CONFIG.corpora[wildcards.corpus])),
        code=DATA_CODE,
    log:
        "results/logs/tokenize/{corpus}.log",
    benchmark:
        "results/benchmarks/tokenize/{corpus}.tsv"
    threads: workflow.cores or 1
    resources:
        mem_mb=2000,
        runtime=240,
    conda:
        "../../environment.yml"
    shell:
        "{PYTHON} -m mup_moe tokenize --corpus {params.corpus:q}"
        " --out results/data/{wildcards.corpus} --threads {threads} 2> {log}"
