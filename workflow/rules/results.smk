# From cells to the tables of a figure's runs and optima.


rule aggregate:
    input:
        lambda wildcards: expand(
            "results/cells/{cell}/summary.json", cell=cells_of(wildcards.figure)
        ),
    output:
        "results/{figure}/runs.csv",
    log:
        "results/logs/aggregate/{figure}.log",
    benchmark:
        "results/benchmarks/aggregate/{figure}.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        # What each cell must have been trained by: one of another config is foreign.
        cells=lambda wildcards: "\n".join(
            f"{cell} {request_of(cell).digest}" for cell in cells_of(wildcards.figure)
        ),
        # No input: cells that were brought home without their tokens are none the worse.
        tokens=lambda wildcards: corpus_of(cells_of(wildcards.figure)[0]),
        foreign=CONFIG.analysis.foreign_cells,
    shell:
        "printf '%s' {params.cells:q} | python -m mup_moe aggregate --cells - --results results/cells"
        " --tokens {params.tokens:q} --foreign-cells {params.foreign} --out {output} 2> {log}"


rule optima:
    input:
        "results/{figure}/runs.csv",
    output:
        "results/{figure}/optima.csv",
    log:
        "results/logs/optima/{figure}.log",
    benchmark:
        "results/benchmarks/optima/{figure}.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        requests=lambda wildcards: json.dumps(
            {wildcards.figure: figure_request(CONFIG, wildcards.figure)}
        ),
    shell:
        "python -m mup_moe optima --runs {input} --figures -"
        " --out {output} 2> {log} <<< {params.requests:q}"


rule collect:
    input:
        expand("results/{figure}/{{table}}.csv", figure=CONFIG.figures),
    output:
        "results/{table,runs|optima}.csv",
    log:
        "results/logs/collect/{table}.log",
    benchmark:
        "results/benchmarks/collect/{table}.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
    shell:
        "python -m mup_moe collect {input} --out {output} 2> {log}"
