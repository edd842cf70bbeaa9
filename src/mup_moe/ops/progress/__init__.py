"""Reports the progress of a Snakemake run and the time left, in an occasional line."""
