"""Reports the state of a sweep from its files, during or after the run: python -m mup_moe status."""
