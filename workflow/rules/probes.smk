# What goes on inside models, against width: one job per width, slopes from them.
from mup_moe.figures.shown import category_of


rule probe:
    input:
        manifest=lambda wildcards: f"{probe_tokens(wildcards)}/manifest.json",
        tokens=lambda wildcards: ancient(
            [f"{probe_tokens(wildcards)}/{split}.bin" for split in ("train", "valid")]
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
        device=CONFIG.execution.device,
    params:
        code=CODE,
        steps=lambda wildcards: ",".join(map(str, CONFIG.probes[wildcards.probe].steps)),
        measure=lambda wildcards: CONFIG.probes[wildcards.probe].measure,
        requests=lambda wildcards: "\n".join(
            request_of(cell.id).to_json() for cell in probe_cells(wildcards)
        ),
    shell:
        "printf '%s' {params.requests:q} | python -m mup_moe probe"
        " --measure {params.measure} --steps {params.steps}"
        " --tokens $(dirname {input.manifest}) --out {output.csv}"
        " --device {resources.device} --threads {threads} 2> {log}"


rule slopes:
    input:
        values=probe_values,
        # They vouch that all widths were measured alike.
        made_by=lambda wildcards: [
            path.replace(".csv", ".json") for path in probe_values(wildcards)
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
        "python -m mup_moe slopes {input.values} --confidence {params.confidence}"
        " --out {output} 2> {log}"
