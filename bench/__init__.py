"""Measures what Sluice costs: each module is a command that prints a table."""
