"""The figures, drawn from tables of results."""
