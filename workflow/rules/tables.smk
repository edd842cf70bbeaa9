# Tables of what the config describes, made without training.
from mup_moe.files import file_digest


rule table1:
    output:
        csv="results/table1.csv",
        md="results/table1.md",
        html=report(
            "results/table1.html",
            caption="../report/table1.rst",
            category="7 Parametrizations and models",
            labels={"result": "table1", "format": "table"},
        ),
        tex="results/table1.tex",
    log:
        "results/logs/table1.log",
    benchmark:
        "results/benchmarks/table1.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        table=digest(
            {name: row.as_row() for name, row in SWEEP.parametrizations.items()}
        ),
    shell:
        "python -m mup_moe table1 2> {log}"


rule table2:
    input:
        # All counts depend on the vocabulary, which tokenizing determines.
        expand(
            "results/data/{corpus}/manifest.json",
            corpus=sorted(
                {CONFIG.setups[f.setup].corpus for f in CONFIG.figures.values()}
            ),
        ),
    output:
        csv="results/table2.csv",
        md="results/table2.md",
        html=report(
            "results/table2.html",
            caption="../report/table2.rst",
            category="7 Parametrizations and models",
            labels={"result": "table2", "format": "table"},
        ),
        tex="results/table2.tex",
    log:
        "results/logs/table2.log",
    benchmark:
        "results/benchmarks/table2.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        version=VERSION,
        config=digest(CONFIG),
    shell:
        "python -m mup_moe table2 2> {log}"


rule plan:
    input:
        # Measured by `make benchmark` on your machine, or else on ours.
        benchmark=BENCHMARK,
    output:
        csv="results/plan.csv",
        md="results/plan.md",
        html=report(
            "results/plan.html",
            caption="../report/plan.rst",
            category="9 The bill",
            labels={"result": "plan", "format": "table"},
        ),
    log:
        "results/logs/plan.log",
    benchmark:
        "results/benchmarks/plan.tsv"
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        version=VERSION,
        config=digest(CONFIG),
        # Params and not inputs, because these tables are optional: the bill says more where they exist.
        sights=lambda wildcards: [file_digest(p) for p in SWEEP.sensitivities()],
        # A function, because Snakemake would look for wildcards in plain text.
        layers=lambda wildcards: str(LAYERS),
    shell:
        "python -m mup_moe plan --benchmark {input.benchmark:q} 2> {log}"
