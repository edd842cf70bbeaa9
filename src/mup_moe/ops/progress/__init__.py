"""Reports the progress of a Snakemake run and the time left, as a line from time to time."""
