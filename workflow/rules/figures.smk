# Draws everything in the config that has a kind of mup_moe/config/kinds.py: figures, compositions, probes and so on.
from mup_moe.analysis.published import find_reference
from mup_moe.figures.shown import all_names, category_of, files_of, caption_of

# Find and read published losses before anything runs, so that mistakes show at once.
REFERENCES = {}
for name, figure in CONFIG.figures.items():
    if figure.reference is not None:
        try:
            literal([figure.reference])
            (REFERENCES[name],) = literal([str(find_reference(CONFIG, name))])
        except UserError as error:
            raise WorkflowError(
                f"config ({LAYERS}): `figures.{name}.reference`: {error}"
            ) from None
# For report/figure.rst. In the config and not in params, because figures do not depend on captions.
config["captions"] = {name: caption_of(CONFIG, name) for name in all_names(CONFIG)}


rule figure:
    input:
        lambda wildcards: [
            f"results/{path}" for path in files_of(CONFIG, wildcards.name)
        ],
        # Not read for drawing: it explains the names of the panels and should accompany every figure.
        legend="results/table1.csv",
    output:
        pdf=report(
            "results/{name}.pdf",
            caption="../report/figure.rst",
            category=lambda wildcards: category_of(CONFIG, wildcards.name),
            labels={"result": "{name}", "format": "print (PDF)"},
        ),
        png="results/{name}.png",
        html=report(
            "results/{name}.html",
            caption="../report/figure.rst",
            category=lambda wildcards: category_of(CONFIG, wildcards.name),
            labels={"result": "{name}", "format": "figure"},
        ),
    log:
        "results/logs/figure/{name}.log",
    benchmark:
        "results/benchmarks/figure/{name}.tsv"
    wildcard_constraints:
        name="|".join(all_names(CONFIG)),
    conda:
        "../../environment.yml"
    params:
        code=ANALYSIS_CODE,
        settings=lambda wildcards: figure_settings(CONFIG, wildcards.name),
    shell:
        "python -m mup_moe figure {wildcards.name} 2> {log}"


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
        settings=lambda wildcards: figure_settings(CONFIG, wildcards.figure),
    shell:
        "python -m mup_moe reference {wildcards.figure} 2> {log}"
