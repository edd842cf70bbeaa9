# Text to tokens, once per corpus.


# A corpus's own files; what a source installs or streams by itself is no file of ours.
text_of = in_a_sentence(lambda corpus: literal(SWEEP.text(corpus)))

# Text or a vocabulary that is not there is told before anything runs.
for corpus in SWEEP.corpora:
    text_of(corpus)
    in_a_sentence(SWEEP.vocabulary)(corpus)


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
        settings=lambda wildcards: digest(CONFIG.corpora[wildcards.corpus]),
        version=VERSION,
    shell:
        "python -m mup_moe tokenize {wildcards.corpus} --threads {threads} 2> {log}"
