# What the results say of the paper's claims, and the whole paper as one target.
from mup_moe.figures.shown import drawn_in_paper

CLAIMS = CONFIG.claims.table.values()


rule claims:
    input:
        runs=sorted(
            {f"results/{d.figure}/runs.csv" for claim in CLAIMS for d in claim.drifts}
        ),
        optima=sorted(
            {
                f"results/{d.figure}/optima.csv"
                for claim in CLAIMS
                for d in claim.drifts
            }
        ),
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
            labels={"result": "claims", "format": "HTML"},
        ),
        tests="results/claims/tests.csv",
    log:
        "results/logs/claims.log",
    benchmark:
        "results/benchmarks/claims.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        # A function's text is not searched for wildcards.
        claims=lambda wildcards: json.dumps(asdict(CONFIG.claims)),
        confidence=CONFIG.analysis.confidence,
        preset=CONFIG.preset,
    shell:
        "python -m mup_moe claims --claims - --results results"
        " --confidence {params.confidence} --preset {params.preset:q}"
        " --out results/claims --tests {output.tests} 2> {log} <<< {params.claims:q}"


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
    shell:
        "printf 'config: %s\n' \"$MUP_MOE_CONFIG\" > {log}; printf '%s\n' {input} > {output} 2>> {log}"
