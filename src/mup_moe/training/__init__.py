"""Trains one cell, or several of one shape in lockstep, on the CPU or one GPU."""
