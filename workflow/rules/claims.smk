# Verdicts on the paper's claims, and the whole paper as one target.
from mup_moe.figures.shown import drawn_in_paper

CLAIMS = CONFIG.claims.table.values()


rule claims:
    input:
        runs=expand("results/{figure}/runs.csv", figure=CONFIG.claims.figures),
        optima=expand("results/{figure}/optima.csv", figure=CONFIG.claims.figures),
        slopes=sorted(
            {f"results/{s.probe}.csv" for claim in CLAIMS for s in claim.slopes}
        ),
    output:
        csv="results/claims.csv",
        md="results/claims.md",
        html=report(
            "results/claims.html",
            caption="../report/claims.rst",
            category="1 Claims",
            labels={"result": "claims", "format": "table"},
        ),
        tests="results/claims/tests.csv",
        tests_html=report(
            "results/claims/tests.html",
            caption="../report/tests.rst",
            category="1 Claims",
            labels={"result": "claims, all tests", "format": "table"},
        ),
    log:
        "results/logs/claims.log",
    benchmark:
        "results/benchmarks/claims.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        claims=digest(CONFIG.claims),
        confidence=CONFIG.analysis.confidence,
        # A function, because Snakemake would look for wildcards in plain text.
        layers=lambda wildcards: str(LAYERS),
    shell:
        "python -m mup_moe claims 2> {log}"


rule paper:
    input:
        expand("results/{name}.pdf", name=drawn_in_paper(CONFIG)),
        expand(
            "results/{table}.csv",
            table=["table1", "table2", "plan", "runs", "optima", "claims"],
        ),
    output:
        "results/paper",
    log:
        "results/logs/paper.log",
    conda:
        "../../environment.yml"
    params:
        # A function of the outputs, because Snakemake does not compare those.
        layers=lambda wildcards, output: str(LAYERS),
    shell:
        "printf 'config: %s\n' {params.layers:q} > {log}; printf '%s\n' {input} > {output} 2>> {log}"
