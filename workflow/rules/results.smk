# From cells to what people read.


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
        # What each cell must have been trained on: one of another config is refused.
        cells=lambda wildcards: "\n".join(
            f"{cell} {request_of(cell).digest}" for cell in cells_of(wildcards.figure)
        ),
    shell:
        "printf '%s' {params.cells:q} | python -m mup_moe aggregate"
        " --cells - --results results/cells --out {output} 2> {log}"


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
        "python -m mup_moe optima --runs {input} --figures {params.requests:q}"
        " --out {output} 2> {log}"


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


rule figure:
    input:
        runs="results/{figure}/runs.csv",
        optima="results/{figure}/optima.csv",
        # What the panels' names mean: made along with every figure.
        table="results/table1.csv",
    output:
        pdf=report(
            "results/{figure}.pdf",
            caption="../report/figure.rst",
            category="Figures",
            labels={"result": "{figure}", "format": "PDF"},
        ),
        png=report(
            "results/{figure}.png",
            caption="../report/figure.rst",
            category="Figures",
            labels={"result": "{figure}", "format": "PNG"},
        ),
    log:
        "results/logs/figure/{figure}.log",
    benchmark:
        "results/benchmarks/figure/{figure}.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        request=lambda wildcards: json.dumps(figure_request(CONFIG, wildcards.figure)),
    shell:
        "python -m mup_moe figure --runs {input.runs} --optima {input.optima}"
        " --name {wildcards.figure} --figure {params.request:q} --out {output.pdf} --png {output.png} 2> {log}"


rule table1:
    output:
        csv=report(
            "results/table1.csv",
            caption="../report/table1.rst",
            category="Tables",
            labels={"result": "table1", "format": "CSV"},
        ),
        md="results/table1.md",
        tex="results/table1.tex",
    log:
        "results/logs/table1.log",
    benchmark:
        "results/benchmarks/table1.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        table=json.dumps({name: row.as_row() for name, row in PARAMETRIZATIONS.items()}),
    shell:
        "python -m mup_moe table1 --parametrizations {params.table:q}"
        " --out results/table1 2> {log}"
