"""`sluice inspect`: shows the contract of an exported model."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sluice_cli.failure import fail, require_export_extra

if TYPE_CHECKING:
    from sluice_protos.contract_pb2 import ModelContract, TensorSpec

HELP: Final = """Show the contract of an exported model: inputs, outputs, state and proofs.

Examples:

    sluice inspect model.onnx

    sluice inspect model.onnx --json | jq .state_size
"""


def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.ONNX", help="A file that sluice export wrote.", show_default=False
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the contract as JSON, for programs.")
    ] = False,
) -> None:
    """Show the contract of an exported model."""
    with require_export_extra("inspect"):
        from sluice_model.contract import count_parameters, load_proto, parse_contract
        from sluice_model.errors import ModelError
    try:
        proto = load_proto(model)
        contract = parse_contract(proto, name=str(model))
    except ModelError as error:
        fail(str(error))
    if as_json:
        from google.protobuf import json_format

        typer.echo(
            json_format.MessageToJson(
                contract,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
        )
        return
    show(
        Console(markup=False, highlight=False),
        contract,
        parameters=count_parameters(proto),
        size=model.stat().st_size,
    )


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(help=HELP)(inspect)


def show(console: Console, contract: "ModelContract", *, parameters: int, size: int) -> None:
    """Print a contract for people; `size` in bytes."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("name", Text(contract.name, style="bold"))
    facts.add_row("digest", contract.digest)
    facts.add_row("size", f"{size / 1e6:,.2f} MB, {parameters:,} parameters")
    floats = contract.state_size
    facts.add_row("state", f"{floats:,} floats ({4 * floats:,} bytes) for each live sequence")
    facts.add_row(
        "exact from",
        f"batch {contract.batch_min}, length {contract.length_min}; smaller runs are padded",
    )
    facts.add_row("one run takes", _run(contract))
    facts.add_row("made with", ", ".join(f"{k} {v}" for k, v in sorted(contract.made_with.items())))
    console.print(facts)
    for table in (_tensors(contract), _cells(contract), _state(contract), _proofs(contract)):
        if table.row_count:
            console.print()
            console.print(table)


def _run(contract: "ModelContract") -> str:
    """What the graph does in one run."""
    rows = f"at most {contract.batch_max} rows at once" if contract.batch_max else "any rows"
    if contract.is_one_step:
        return f"one step of {rows}; a chunk is as many runs"
    is_ragged = contract.lengths_input or not contract.state_size
    return f"chunks of {'any lengths' if is_ragged else 'one length'} of {rows}"


def _table(title: str, *columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _tensors(contract: "ModelContract") -> Table:
    table = _table("Inputs and outputs", "", "name", "type", "one step", "valid")
    for spec in contract.inputs:
        table.add_row("input", spec.name, spec.datatype, _shape(spec), _valid(spec))
    for spec in contract.outputs:
        table.add_row("output", spec.name, spec.datatype, _shape(spec), "")
    return table


def _shape(spec: "TensorSpec") -> str:
    return " × ".join(map(str, spec.shape)) or "one value"


def _valid(spec: "TensorSpec") -> str:
    return f"{spec.valid.min} to {spec.valid.max}" if spec.HasField("valid") else "any"


def _cells(contract: "ModelContract") -> Table:
    numbers = ("layers", "input", "hidden")
    table = _table("Cells", "layer", "kind", *numbers, "gates, as ONNX has them", numbers=numbers)
    for cell in contract.cells:
        table.add_row(
            cell.name,
            cell.kind,
            str(cell.layers),
            str(cell.input_size),
            str(cell.hidden_size),
            " ".join(cell.gates),
        )
    return table


def _state(contract: "ModelContract") -> Table:
    table = _table("State row", "part", "floats", "starts at", numbers=("floats",))
    for part in contract.state:
        first, last = part.offset, part.offset + math.prod(part.shape) - 1
        start = "its own values" if any(part.initial) else "zero"
        table.add_row(part.name, f"{first}–{last}", start)
    return table


def _proofs(contract: "ModelContract") -> Table:
    numbers = ("figure", "at most", "ulps")
    table = _table("Proofs", "proof", "", *numbers, "what was compared", numbers=numbers)
    table.caption_justify = "left"
    table.caption = (
        "Figures: for parity and drift the largest difference relative to the largest value, "
        "and in units in the last place (ulps) among values that are not tiny; for leak and "
        "bits the number of values that differ at all."
    )
    for proof in contract.proofs:
        table.add_row(
            proof.name,
            Text("holds") if proof.passed else Text("does not hold", style="red"),
            f"{proof.figure:.2g}",
            f"{proof.tolerance:.2g}",
            f"{proof.ulps:.0f}",
            proof.detail,
        )
    return table
