"""How far a run of Snakemake is, and how long the rest will take: a line now and then while it runs."""
