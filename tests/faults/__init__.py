"""Faults, injected into real processes with real files."""
