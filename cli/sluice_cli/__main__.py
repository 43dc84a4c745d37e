"""Runs `sluice` as `python -m sluice_cli`."""

from sluice_cli.main import main

main()
