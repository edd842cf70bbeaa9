# What is drawn from the tables of runs and optima: figures, and compositions of several.


include: "drawing.smk"


rule figure:
    input:
        runs="results/{figure}/runs.csv",
        optima="results/{figure}/optima.csv",
        reference=lambda wildcards: references_of(wildcards.figure),
        # What the panels' names mean: made along with every figure.
        table="results/table1.csv",
    output:
        pdf=report(
            "results/{figure}.pdf",
            caption="../report/figure.rst",
            category=lambda wildcards: FIGURE_CATEGORIES[kind_of(wildcards.figure)],
            labels={"result": "{figure}", "format": "print (PDF)"},
        ),
        png=report(
            "results/{figure}.png",
            caption="../report/figure.rst",
            category=lambda wildcards: FIGURE_CATEGORIES[kind_of(wildcards.figure)],
            labels={"result": "{figure}", "format": "image"},
        ),
    log:
        "results/logs/figure/{figure}.log",
    benchmark:
        "results/benchmarks/figure/{figure}.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        kind=lambda wildcards: kind_of(wildcards.figure),
        request=lambda wildcards: json.dumps(drawing_request(wildcards.figure)),
    shell:
        "python -m mup_moe figure --runs {input.runs} --optima {input.optima}"
        " --name {wildcards.figure} --figure - --out {output.pdf} --png {output.png} 2> {log} <<< {params.request:q}"


rule composition:
    input:
        runs=lambda wildcards: expand(
            "results/{figure}/runs.csv", figure=parts_of(wildcards)
        ),
        optima=lambda wildcards: expand(
            "results/{figure}/optima.csv", figure=parts_of(wildcards)
        ),
        reference=lambda wildcards: references_of(*parts_of(wildcards)),
        table="results/table1.csv",
    output:
        pdf=report(
            "results/{composition}.pdf",
            caption="../report/figure.rst",
            category=lambda wildcards: FIGURE_CATEGORIES[
                kind_of(wildcards.composition)
            ],
            labels={"result": "{composition}", "format": "print (PDF)"},
        ),
        png=report(
            "results/{composition}.png",
            caption="../report/figure.rst",
            category=lambda wildcards: FIGURE_CATEGORIES[
                kind_of(wildcards.composition)
            ],
            labels={"result": "{composition}", "format": "image"},
        ),
    log:
        "results/logs/composition/{composition}.log",
    benchmark:
        "results/benchmarks/composition/{composition}.tsv"
    wildcard_constraints:
        composition="|".join(CONFIG.compositions) or NOTHING,
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        kind=lambda wildcards: kind_of(wildcards.composition),
        requests=lambda wildcards: json.dumps(
            {figure: drawing_request(figure) for figure in parts_of(wildcards)}
        ),
    shell:
        "python -m mup_moe composition --runs {input.runs} --optima {input.optima}"
        " --figures - --out {output.pdf} --png {output.png} 2> {log} <<< {params.requests:q}"


rule reference:
    input:
        runs="results/{figure}/runs.csv",
        published=lambda wildcards: REFERENCES[wildcards.figure],
    output:
        "results/{figure}/reference.csv",
    log:
        "results/logs/reference/{figure}.log",
    benchmark:
        "results/benchmarks/reference/{figure}.tsv"
    wildcard_constraints:
        figure="|".join(REFERENCES) or NOTHING,
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        request=lambda wildcards: json.dumps(drawing_request(wildcards.figure)),
    shell:
        "python -m mup_moe reference --runs {input.runs} --figure -"
        " --out {output} 2> {log} <<< {params.request:q}"
