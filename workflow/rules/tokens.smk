# Turns text into tokens, once per corpus.


# The user's files in a corpus, if any: text that a source finds or streams by itself is not an input.
text_of = as_workflow_error(lambda corpus: literal(SWEEP.text(corpus)))

# Report missing text or a missing vocabulary before anything runs.
for corpus in SWEEP.corpora:
    text_of(corpus)
    as_workflow_error(SWEEP.vocabulary)(corpus)


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
        mem_mb=lambda wildcards, attempt: memory_for_attempt(2000, attempt),
    params:
        settings=lambda wildcards: digest(CONFIG.corpora[wildcards.corpus]),
        version=VERSION,
    shell:
        "python -m mup_moe tokenize {wildcards.corpus} --threads {threads} 2> {log}"
