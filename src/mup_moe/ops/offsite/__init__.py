"""Trains cells on a machine without Snakemake: export jobs, run them there, import the cells (docs/offsite.md)."""
