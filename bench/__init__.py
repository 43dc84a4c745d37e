"""What Sluice costs, beside what it could cost: each module is a command that prints a table."""
