# What goes on inside models, against width: one job per width, slopes from them.
from mup_moe.figures.shown import category_of


def probe_cells(wildcards):
    """The models of one width of a probe."""
    return [
        cell
        for cell in CONFIG.probes[wildcards.probe].cells()
        if str(cell.width) == wildcards.width
    ]


def probe_corpus(wildcards):
    """The corpus whose tokens a probe's models see."""
    return CONFIG.setups[CONFIG.probes[wildcards.probe].setup].corpus


def probe_values(wildcards):
    """What a probe measured, one file per width."""
    return list(SWEEP.probe_values(wildcards.probe).values())


rule probe:
    input:
        manifest=lambda wildcards: SWEEP.tokens(probe_corpus(wildcards))
        / "manifest.json",
        tokens=lambda wildcards: ancient(SWEEP.token_files(probe_corpus(wildcards))),
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
        code=CODE,
        steps=lambda wildcards: CONFIG.probes[wildcards.probe].steps,
        measure=lambda wildcards: CONFIG.probes[wildcards.probe].measure,
        requests=lambda wildcards: digest(
            [SWEEP.request(cell).digest for cell in probe_cells(wildcards)]
        ),
    shell:
        "python -m mup_moe probe {wildcards.probe} --width {wildcards.width} --threads {threads} 2> {log}"


rule slopes:
    input:
        values=probe_values,
        # They vouch that all widths were measured alike.
        made_by=lambda wildcards: [
            path.with_suffix(".json") for path in probe_values(wildcards)
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
