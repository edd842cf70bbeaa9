# The whole paper as a graph of files: text -> tokens -> cells -> tables of runs -> figures.
# To read the code, start at src/mup_moe/sweep.py, which turns config.yaml into cells, jobs and paths.
from snakemake.utils import min_version

min_version("9.20")


report: "workflow/report/workflow.rst"


include: "workflow/rules/environment.smk"
include: "workflow/rules/config.smk"
include: "workflow/rules/common.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/cells.smk"
include: "workflow/rules/results.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/probes.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/claims.smk"
include: "workflow/rules/hooks.smk"


localrules:
    all,
    aggregate,
    optima,
    collect,
    collect_optima,
    figure,
    reference,
    slopes,
    table1,
    table2,
    plan,
    claims,
    paper,


rule all:
    default_target: True
    input:
        "results/paper",
