# Measures quantities inside models against width or another axis, with one job per probe, and fits their slopes.
from mup_moe.figures.shown import category_of


rule probe:
    input:
        manifest=lambda wildcards: SWEEP.tokens(SWEEP.probe_corpus(wildcards.probe))
        / "manifest.json",
        tokens=lambda wildcards: ancient(
            SWEEP.token_files(SWEEP.probe_corpus(wildcards.probe))
        ),
    output:
        csv="results/{probe}/values.csv",
        json="results/{probe}/values.json",
    log:
        "results/logs/probe/{probe}.log",
    benchmark:
        "results/benchmarks/probe/{probe}.tsv"
    conda:
        "../../environment.yml"
    threads: CONFIG.execution.threads
    resources:
        **GPU,
        mem_mb=lambda wildcards, attempt: memory_for_attempt(
            SWEEP.probe_memory_mb(wildcards.probe), attempt
        ),
    params:
        version=VERSION,
        steps=lambda wildcards: CONFIG.probes[wildcards.probe].steps,
        measure=lambda wildcards: CONFIG.probes[wildcards.probe].measure,
        requests=lambda wildcards: digest(
            [
                SWEEP.request(cell).digest
                for cell in CONFIG.probes[wildcards.probe].cells()
            ]
        ),
    shell:
        "python -m mup_moe probe {wildcards.probe} --threads {threads} 2> {log}"


rule slopes:
    input:
        "results/{probe}/values.csv",
    output:
        csv="results/{probe}.csv",
        html=report(
            "results/{probe}/slopes.html",
            caption="../report/slopes.rst",
            category=lambda wildcards: category_of(CONFIG, wildcards.probe),
            labels={"result": "{probe}", "format": "table of slopes"},
        ),
    log:
        "results/logs/slopes/{probe}.log",
    benchmark:
        "results/benchmarks/slopes/{probe}.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        confidence=CONFIG.analysis.confidence,
    shell:
        "python -m mup_moe slopes {wildcards.probe} 2> {log}"
