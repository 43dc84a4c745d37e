"""`sluice stream`: streams rows of text through a model."""

import asyncio
import os
import sys
from enum import StrEnum
from typing import Annotated, Final, NoReturn

import typer

HELP: Final = """Stream rows of text through a model: each row is answered with one row at once.

A row is one step. A CSV row has the values of all inputs side by side. If the first
line is not numbers, it names the columns, in any order. A JSON row is the
input itself, or an object with a value for each input. In JSON, outputs that are NaN or
infinite are null. Text is UTF-8.

    tail -f sensor.csv | sluice stream lstm

    sluice stream lstm --input measured.csv > predicted.csv

    sluice stream lstm --input all.csv --key device        # a sequence for each device

    sluice stream tokens --format jsonl --id chat-7        # continues the sequence chat-7

Without --id, the sequence is closed at the end. With --id, it stays at the server for
the next command. A refused row ends the command, with the row's number on stderr.
"""

_BROKEN_PIPE: Final = 141  # the status that a shell shows for a command that SIGPIPE has ended


class Format(StrEnum):
    """The format of the rows."""

    CSV = "csv"
    JSONL = "jsonl"


def stream(
    model: Annotated[str, typer.Argument(help="The model's name at the server.")],
    address: Annotated[
        list[str],
        typer.Option(
            metavar="HOST:PORT", help="The server. Repeat the option to name others to try in turn."
        ),
    ] = ["127.0.0.1:8001"],  # noqa: B006 - typer only reads the default
    text_format: Annotated[
        Format | None,
        typer.Option("--format", help="By default from the name of the input file, else CSV."),
    ] = None,
    source: Annotated[
        str, typer.Option("--input", "-i", metavar="FILE", help="The file to read; - is stdin.")
    ] = "-",
    sequence_id: Annotated[
        str | None,
        typer.Option(
            "--id", help="The sequence to continue or start. It is not closed at the end."
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Stream each value of this column as its own sequence."
        ),
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
        # The reader of our output has gone. Python would report an error when it flushes at exit.
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
