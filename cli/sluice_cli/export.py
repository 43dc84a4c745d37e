"""`sluice export`: a PyTorch module and its checkpoint to one proven ONNX file."""

import ast
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from sluice_protos.contract_pb2 import ModelContract

HELP: Final = """Export a PyTorch module to one ONNX file that Sluice serves.

The module is made by calling FACTORY, its weights come from a checkpoint, and
nothing is written before the file is proven equal to the module: whole
sequences, step by step, in chunks and in ragged batches. It is exported in eval
mode: dropout, also between layers, is off.

Examples:

    sluice export train:CharacterModel --checkpoint weights.pt --output characters.onnx

    sluice export models.speech:make --arg hidden=256 --arg layers=2 \\
        --checkpoint weights.pt --input audio:float32:1,10,80 --output speech.onnx

The checkpoint is what `torch.save(module.state_dict(), path)` wrote. Inputs are
found out where forward takes one tensor; otherwise describe each with --input,
in the module's own layout.
"""


def export(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A class or function that returns the module, or the module itself; "
            "the current folder is searched first.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The ONNX file to write.", show_default=False
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The weights; left out: as the factory makes them.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The model's name; left out: the file's.", show_default=False
        ),
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option("--arg", metavar="NAME=VALUE", help="An argument of the factory; repeatable."),
    ] = None,
    described: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME:TYPE:SHAPE",
            help="An argument of forward, such as x:float32:1,10,8, with batch and time in the "
            "shape; repeatable.",
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:FIRST:LAST",
            help="The values that an integer input may have, where no embedding tells; repeatable.",
        ),
    ] = None,
    output_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The name of an output, in order; repeatable."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The largest difference to PyTorch, relative to the largest value; "
            "left out: 0.0001.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Export a PyTorch module to one ONNX file."""
    try:
        import sluice_export
        from sluice_export.factory import guess_inputs, load_checkpoint, make_input, make_module
    except ModuleNotFoundError as error:
        fail(f"export needs {error.name}: pip install 'sluice-serving[export]'")
    console = Console(file=sys.stderr, markup=False, highlight=False)
    try:
        examples: Any = dict(make_input(text) for text in described or [])
    except sluice_export.InputError as error:
        raise typer.BadParameter(str(error)) from error
    options: dict[str, Any] = {
        "name": name,
        "output_names": output_name,
        "valid": dict(_parse_valid(text) for text in valid or []),
    }
    if tolerance is not None:
        options["tolerance"] = tolerance
    with _progress(console) as bar, warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("default")
        task = bar.add_task("making the module", total=1.0)
        try:
            module = make_module(factory, dict(_parse_argument(text) for text in argument or []))
            if checkpoint is not None:
                load_checkpoint(module.eval(), checkpoint)
            contract = sluice_export.export(
                module.eval(),
                examples or guess_inputs(module),
                output,
                on_progress=lambda what, share: bar.update(task, description=what, completed=share),
                **options,
            )
        except sluice_export.ExportError as error:
            bar.stop()
            fail(str(error))
        except OSError as error:
            bar.stop()
            fail(f"{output}: cannot be written ({error.strerror or error})")
    if checkpoint is None:
        console.print("note: no --checkpoint was given; the weights are as the factory makes them")
    for notice in notices:
        if issubclass(notice.category, sluice_export.ExportNotice):
            console.print(f"note: {notice.message}")
    _show_summary(Console(markup=False, highlight=False), contract, output)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(help=HELP)(export)


def fail(message: str) -> NoReturn:
    """End the command with `message` on standard error and exit status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _show_summary(console: Console, contract: "ModelContract", output: Path) -> None:
    """What was proven, and what to do next."""
    table = Table(title=f"{contract.name}: proven, written to {output}", title_justify="left")
    table.add_column("proof")
    table.add_column("figure", justify="right")
    table.add_column("what was compared", overflow="fold")
    for proof in contract.proofs:
        mark = "" if proof.passed else " (does not hold)"
        table.add_row(proof.name, f"{proof.figure:.2g}{mark}", proof.detail)
    console.print(table)
    console.print(
        f"See it:   sluice inspect {output}\nServe it: sluice serve --model "
        f"{contract.name}={output}",
        soft_wrap=True,
    )


def _parse_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value as Python would read it, or else as text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, such as hidden=256")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parse_valid(text: str) -> tuple[str, tuple[int, int]]:
    """NAME:FIRST:LAST, such as tokens:0:31."""
    name, *limits = text.split(":")
    try:
        first, last = map(int, limits)
    except ValueError:
        first, last = 1, 0
    if not name or first > last:
        raise typer.BadParameter(f"{text!r} is not NAME:FIRST:LAST, such as tokens:0:31")
    return name, (first, last)
