# Turns cells into the tables of each figure's runs and optima.
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.config.kinds import KINDS
from mup_moe.figures.shown import category_of, inputs_of_table
from mup_moe.figures.shown import settings_of as figure_settings


rule aggregate:
    input:
        lambda wildcards: expand(
            "results/cells/{cell}/summary.json",
            cell=[cell.id for cell in SWEEP.figures[wildcards.figure]],
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
        # The request that each cell must have been trained with; cells of another config are foreign.
        cells=lambda wildcards: digest(
            [
                (cell.id, SWEEP.request(cell).digest)
                for cell in SWEEP.figures[wildcards.figure]
            ]
        ),
        # A param and not an input, because cells imported without their tokens are just as good.
        corpus=lambda wildcards: SWEEP.corpus(SWEEP.figures[wildcards.figure][0]),
        foreign=CONFIG.analysis.foreign_cells,
    shell:
        "python -m mup_moe aggregate {wildcards.figure} 2> {log}"


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
        settings=lambda wildcards: digest(
            FigureSpec.of(CONFIG, wildcards.figure).settings
        ),
    shell:
        "python -m mup_moe optima {wildcards.figure} 2> {log}"


rule table_of_kind:
    input:
        lambda wildcards: [
            f"results/{path}" for path in inputs_of_table(CONFIG, wildcards.name)
        ],
    output:
        csv="results/{name}/{kind}.csv",
        md="results/{name}/{kind}.md",
        html=report(
            "results/{name}/{kind}.html",
            caption="../report/table_of_kind.rst",
            category=lambda wildcards: category_of(CONFIG, wildcards.name),
            labels={"result": "{name}", "format": "table"},
        ),
    log:
        "results/logs/{kind}/{name}.log",
    benchmark:
        "results/benchmarks/{kind}/{name}.tsv"
    wildcard_constraints:
        name="|".join([*CONFIG.figures, *CONFIG.comparisons]),
        kind="|".join(kind for kind in KINDS if KINDS[kind].table),
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        settings=lambda wildcards: figure_settings(CONFIG, wildcards.name),
    shell:
        "python -m mup_moe {wildcards.kind} {wildcards.name} 2> {log}"


rule collect:
    input:
        expand("results/{figure}/runs.csv", figure=CONFIG.figures),
    output:
        "results/runs.csv",
    log:
        "results/logs/collect/runs.log",
    benchmark:
        "results/benchmarks/collect/runs.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
    shell:
        "python -m mup_moe collect runs 2> {log}"


rule collect_optima:
    input:
        expand("results/{figure}/optima.csv", figure=CONFIG.figures),
    output:
        csv="results/optima.csv",
        html=report(
            "results/optima.html",
            caption="../report/optima.rst",
            category="1 Claims",
            labels={"result": "optima", "format": "table"},
        ),
    log:
        "results/logs/collect/optima.log",
    benchmark:
        "results/benchmarks/collect/optima.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
    shell:
        "python -m mup_moe collect optima 2> {log}"
