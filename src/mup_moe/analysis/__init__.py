"""From finished cells to runs.csv, optima with their uncertainty, figures and tables."""
