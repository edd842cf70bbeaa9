# The whole paper as a graph of files: text -> tokens -> cells -> tables of runs -> figures.
# Start reading at workflow/rules/common.smk, which turns config.yaml into cells.
from snakemake.utils import min_version

min_version("9.20")


configfile: f"{workflow.basedir}/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/cells.smk"
include: "workflow/rules/results.smk"


localrules:
    all,
    aggregate,
    optima,
    collect,
    figure,
    table1,


rule all:
    default_target: True
    input:
        expand("results/{figure}.pdf", figure=CONFIG.figures),
        "results/table1.csv",
        "results/runs.csv",
        "results/optima.csv",
