"""Turns finished cells into runs.csv, optima with their uncertainty, tables and verdicts."""
