# What goes on inside models, against width: one job per width, slopes from them.
from mup_moe.figures.shown import category_of


rule probe:
    input:
        manifest=lambda wildcards: SWEEP.tokens(SWEEP.probe_corpus(wildcards.probe))
        / "manifest.json",
        tokens=lambda wildcards: ancient(
            SWEEP.token_files(SWEEP.probe_corpus(wildcards.probe))
        ),
    output:
        csv="results/{probe}/w{width}.csv",
        json="results/{probe}/w{width}.json",
    log:
        "results/logs/probe/{probe}/w{width}.log",
    benchmark:
        "results/benchmarks/probe/{probe}/w{width}.tsv"
    conda:
        "../../environment.yml"
    threads: CONFIG.execution.threads
    resources:
        **GPU,
        mem_mb=lambda wildcards, attempt: growing(6000, attempt),
    params:
        version=VERSION,
        steps=lambda wildcards: CONFIG.probes[wildcards.probe].steps,
        measure=lambda wildcards: CONFIG.probes[wildcards.probe].measure,
        requests=lambda wildcards: digest(
            [
                SWEEP.request(cell).digest
                for cell in SWEEP.probe_cells(wildcards.probe, int(wildcards.width))
            ]
        ),
    shell:
        "python -m mup_moe probe {wildcards.probe} --width {wildcards.width} --threads {threads} 2> {log}"


rule slopes:
    input:
        values=lambda wildcards: SWEEP.probe_values(wildcards.probe).values(),
        # They vouch that all widths were measured alike.
        made_by=lambda wildcards: [
            path.with_suffix(".json")
            for path in SWEEP.probe_values(wildcards.probe).values()
        ],
    output:
        report(
            "results/{probe}.csv",
            caption="../report/slopes.rst",
            category=lambda wildcards: category_of(CONFIG, wildcards.probe),
            labels={"result": "{probe}", "format": "slopes, CSV"},
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
