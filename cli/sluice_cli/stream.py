"""`sluice stream`: rows of text through a model, one row in, one row out, as they come."""

import asyncio
import os
import sys
from enum import StrEnum
from typing import Annotated, Final, NoReturn

import typer

HELP: Final = """Stream rows of text through a model: one row in, one row out, as they come.

A row is one step. Rows of CSV hold the values of all inputs side by side; a first
line that is not numbers names the columns, in any order. Rows of JSON are the
input itself, or an object with a value for each input; outputs that are no finite
numbers are null there. Text is UTF-8.

    tail -f sensor.csv | sluice stream lstm

    sluice stream lstm --input measured.csv > predicted.csv

    sluice stream lstm --input all.csv --key device        # a sequence for each device

    sluice stream tokens --format jsonl --id chat-7        # goes on where chat-7 stood

Without --id the sequence is closed at the end; with it, it stays at the server for
the next command. A row that is refused ends the command with its number on stderr.
"""

_BROKEN_PIPE: Final = 141  # what a shell shows of a command that SIGPIPE has ended


class Format(StrEnum):
    """How rows are written as text."""

    CSV = "csv"
    JSONL = "jsonl"


def stream(
    model: Annotated[str, typer.Argument(help="The model's name at the server.")],
    address: Annotated[
        list[str],
        typer.Option(help="HOST:PORT of the server; given again: the next is tried.", metavar="A"),
    ] = ["127.0.0.1:8001"],  # noqa: B006 - typer reads the default, nobody changes it
    text_format: Annotated[
        Format | None,
        typer.Option("--format", help="Left out: by the name of the input, else CSV."),
    ] = None,
    source: Annotated[
        str, typer.Option("--input", "-i", metavar="FILE", help="The rows; - is stdin.")
    ] = "-",
    sequence_id: Annotated[
        str | None,
        typer.Option("--id", help="The sequence to go on with, or to begin and leave there."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="A sequence of its own for each value of this."),
    ] = None,
) -> None:
    """Stream rows of text through a model."""
    from sluice_cli.pipe import Pipe, RowFailedError
    from sluice_client import SluiceError

    if text_format is None:
        is_json = source.endswith((".jsonl", ".ndjson", ".json"))
        text_format = Format.JSONL if is_json else Format.CSV
    try:
        pipe = Pipe(model, source, sequence_id, key)
        asyncio.run(pipe.run(address, is_json=text_format is Format.JSONL))
    except BrokenPipeError:
        # Whoever reads has had enough; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_BROKEN_PIPE) from None
    except (SluiceError, RowFailedError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(help=HELP)(stream)


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(1)
