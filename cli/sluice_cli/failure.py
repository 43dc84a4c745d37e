"""Ends a command that cannot continue, with a message that names the fix."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """End the command with `message` on standard error and exit status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


@contextmanager
def require_export_extra(command: str) -> Iterator[None]:
    """End `command` if an import in the block fails: it needs sluice-serving[export]."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{command} needs {error.name}: pip install 'sluice-serving[export]'")
