"""The program `sluice`: one file per command."""
