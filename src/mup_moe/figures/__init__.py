"""Draws the figures from tables of results."""
