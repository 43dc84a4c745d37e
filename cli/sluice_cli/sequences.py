"""`sluice sequences`: lists, shows, copies and drops the live sequences of a server."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from sluice_cli.failure import fail

if TYPE_CHECKING:
    from sluice_client import Client
    from sluice_protos.sequences_pb2 import SequenceInfo

HELP: Final = """List, show, copy and drop the live sequences of a server.

    sluice sequences list

    sluice sequences show lstm sensor-7

    sluice sequences fork lstm sensor-7 --to sensor-7-what-if

    sluice sequences close lstm sensor-7
"""

# A server that runs answers well within this time.
_RECONNECT_SECONDS_MAX: Final = 5.0

Address = Annotated[
    list[str],
    typer.Option(
        metavar="HOST:PORT", help="The server. Repeat the option to name others to try in turn."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Model = Annotated[str, typer.Argument(help="The model's name at the server.")]
SequenceId = Annotated[str, typer.Argument(metavar="ID", help="The id of the sequence.")]
HERE: Final = ["127.0.0.1:8001"]


def list_sequences(
    model: Annotated[
        str | None, typer.Argument(help="Only sequences of this model. All models by default.")
    ] = None,
    address: Address = HERE,
    as_json: AsJson = False,
) -> None:
    """List the live sequences, one per row."""
    with _reach(address) as client:
        found = sorted(client.sequences(model), key=lambda info: (info.model, info.sequence_id))
    if as_json:
        typer.echo(json.dumps([_facts(info) for info in found], indent=2))
        return
    table = Table()
    for column in ("model", "sequence"):
        table.add_column(column, overflow="fold")
    table.add_column("steps", justify="right")
    table.add_column("epoch", justify="right")
    table.add_column("is")
    table.add_column("idle", justify="right")
    table.add_column("outputs held", justify="right")
    for info in found:
        table.add_row(
            info.model,
            info.sequence_id,
            f"{info.step:,}",
            str(info.epoch),
            _place(info),
            f"{info.idle_seconds:,.0f} s",
            f"{info.held_steps:,}",
        )
    _console().print(table if found else "there are no live sequences")


def show(
    model: Model, sequence_id: SequenceId, address: Address = HERE, as_json: AsJson = False
) -> None:
    """Show one sequence with its state."""
    with _reach(address) as client:
        state = client.state(model, sequence_id)
        infos = [info for info in client.sequences(model) if info.sequence_id == sequence_id]
    facts: dict[str, Any] = _facts(infos[0]) if infos else {"model": model}
    row = state.row
    if as_json:
        facts |= {"model_digest": state.model_digest, "step": state.step, "state": row.tolist()}
        typer.echo(json.dumps(facts, indent=2))
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_row("sequence", sequence_id)
    grid.add_row("of model", f"{model}, digest {state.model_digest}")
    grid.add_row("steps", f"{state.step:,}")
    if infos:
        grid.add_row("is", _place(infos[0]))
        grid.add_row("epoch", str(infos[0].epoch))
        grid.add_row("idle", f"{infos[0].idle_seconds:,.0f} s")
        grid.add_row("outputs held", f"{infos[0].held_steps:,}")
    span = f" from {row.min():.4g} to {row.max():.4g}" if row.size else ""
    grid.add_row("state", f"{row.size:,} floats{span}")
    _console().print(grid)


def fork(
    model: Model,
    sequence_id: SequenceId,
    to: Annotated[
        str | None, typer.Option(metavar="ID", help="The id of the copy. Random by default.")
    ] = None,
    address: Address = HERE,
) -> None:
    """Copy a sequence and print the id of the copy. The copy is parked."""
    with _reach(address) as client:
        typer.echo(client.fork(model, sequence_id, to).sequence_id)


def close(model: Model, sequence_id: SequenceId, address: Address = HERE) -> None:
    """Drop a sequence, also one that another client has open."""
    with _reach(address) as client:
        step = client.close_sequence(model, sequence_id)
    typer.echo(f"closed after {step:,} steps")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    group = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="markdown")
    group.command("list")(list_sequences)
    group.command()(show)
    group.command()(fork)
    group.command()(close)
    app.add_typer(group, name="sequences")


@contextmanager
def _reach(address: list[str]) -> "Iterator[Client]":
    """A client. Its errors end the command with one line."""
    from sluice_client import Client, SluiceError

    try:
        with Client(address, reconnect_seconds_max=_RECONNECT_SECONDS_MAX) as client:
            yield client
    except SluiceError as error:
        fail(str(error))


def _facts(info: "SequenceInfo") -> dict[str, Any]:
    from google.protobuf import json_format

    facts: dict[str, Any] = json_format.MessageToDict(
        info, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    # Protobuf's JSON writes 64-bit numbers as text.
    return {
        name: int(value) if name in ("step", "epoch", "held_steps") else value
        for name, value in facts.items()
    }


def _place(info: "SequenceInfo") -> str:
    return "elsewhere" if info.is_elsewhere else "parked" if info.is_parked else "attached"


def _console() -> Console:
    return Console(markup=False, highlight=False)
