"""Cells on a machine without Snakemake: export the jobs, run them there, import the cells (docs/offsite.md)."""
