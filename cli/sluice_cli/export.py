"""`sluice export`: a PyTorch module, or another's ONNX file, to one proven ONNX file."""

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
    from collections.abc import Callable, Iterable

    from sluice_protos.contract_pb2 import ModelContract, Proof

    Tell = Callable[[str, float], None]

HELP: Final = """Export a PyTorch module, or an ONNX file made by others, to one that Sluice serves.

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

An ONNX file made elsewhere is taken as it is: its state is found, packed, and the
result proven equal to the file.

    sluice export --onnx denoiser.onnx --output served.onnx

    sluice export --onnx silero_vad.onnx --set sr=16000 --input input:batch,576 \\
        --output voice.onnx

There --input tells what the axes of an input are: batch, time, or a size.
"""


def export(
    factory: Annotated[
        str | None,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A class or function that returns the module, or the module itself; "
            "the current folder is searched first.",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The ONNX file to write.", show_default=False
        ),
    ],
    onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An ONNX file made by others, in the place of a factory.",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=OUTPUT",
            help="With --onnx: an input that is the state, and the output it comes out of (or "
            "OUTPUT[0] of a stack); where told, tell all; repeatable.",
        ),
    ] = None,
    fixed: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="INPUT=VALUE", help="With --onnx: fix an input of one value."
        ),
    ] = None,
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
            "shape; with --onnx the axes of an input, such as x:batch,time,8; repeatable.",
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
        from sluice_export.torch.factory import (
            guess_inputs,
            load_checkpoint,
            make_input,
            make_module,
            read_weights,
        )
        from sluice_export.torch.layer_from_weights import make_layer
    except ModuleNotFoundError as error:
        fail(f"export needs {error.name}: pip install 'sluice-serving[export]'")
    _check_source(
        factory,
        onnx,
        checkpoint,
        of_modules=bool(argument or output_name),
        of_files=bool(state or fixed),
    )
    console = Console(file=sys.stderr, markup=False, highlight=False)
    options: dict[str, Any] = {
        "name": name,
        "valid": dict(parse_valid(text) for text in valid or []),
    }
    if tolerance is not None:
        options["tolerance"] = tolerance
    examples: Any = None
    try:
        if onnx is None:
            options["output_names"] = output_name
            examples = dict(make_input(text) for text in described or [])
        else:
            options["states"] = dict(_parse_pair(text, "--state") for text in state or [])
            options["fixed"] = dict(_parse_number(text) for text in fixed or [])
            options["axes"] = dict(_parse_axes(text) for text in described or [])
    except sluice_export.InputError as error:
        raise typer.BadParameter(str(error)) from error

    def make(tell: "Tell") -> "ModelContract":
        if onnx is not None:
            return sluice_export.export_onnx(onnx, output, on_progress=tell, **options)
        arguments = dict(parse_argument(text) for text in argument or [])
        if factory is None and checkpoint is not None:
            module: Any = make_layer(read_weights(checkpoint), checkpoint, arguments)
        else:
            module = make_module(factory or "", arguments)
            if checkpoint is not None:
                load_checkpoint(module.eval(), checkpoint)
        inputs = examples or guess_inputs(module)
        return sluice_export.export(module.eval(), inputs, output, on_progress=tell, **options)

    with progress(console) as bar, warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("default")
        task = bar.add_task("reading", total=1.0)
        try:
            contract = make(lambda what, share: bar.update(task, description=what, completed=share))
        except sluice_export.ExportError as error:
            bar.stop()
            fail(str(error))
        except OSError as error:
            bar.stop()
            fail(f"{output}: cannot be written ({error.strerror or error})")
    if onnx is None and checkpoint is None:
        console.print("note: no --checkpoint was given; the weights are as the factory makes them")
    for notice in notices:
        if issubclass(notice.category, sluice_export.ExportNotice):
            console.print(f"note: {notice.message}")
    _show_summary(Console(markup=False, highlight=False), contract, output)


def _check_source(
    factory: str | None,
    onnx: Path | None,
    checkpoint: Path | None,
    *,
    of_modules: bool,
    of_files: bool,
) -> None:
    """Raise BadParameter unless there is one source, and no option of the other kind."""
    if onnx is not None and factory is not None:
        raise typer.BadParameter("give PACKAGE.MODULE:FACTORY or --onnx FILE, one of the two")
    if onnx is None and factory is None and checkpoint is None:
        raise typer.BadParameter(
            "give PACKAGE.MODULE:FACTORY or --onnx FILE, one of the two, or the --checkpoint of "
            "a recurrent layer alone"
        )
    if onnx is None and of_files:
        raise typer.BadParameter("--state and --set need --onnx")
    if onnx is not None and (checkpoint is not None or of_modules):
        raise typer.BadParameter("--checkpoint, --arg and --output-name need a factory")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(help=HELP)(export)


def fail(message: str) -> NoReturn:
    """End the command with `message` on standard error and exit status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def progress(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _show_summary(console: Console, contract: "ModelContract", output: Path) -> None:
    """What was proven, and what to do next."""
    show_proofs(console, f"{contract.name}: proven, written to {output}", contract.proofs)
    console.print(
        f"See it:   sluice inspect {output}\nServe it: sluice serve --model "
        f"{contract.name}={output}",
        soft_wrap=True,
    )


def show_proofs(console: Console, title: str, proofs: "Iterable[Proof]") -> None:
    """A table of proofs and their figures."""
    table = Table(title=title, title_justify="left")
    table.add_column("proof")
    table.add_column("figure", justify="right")
    table.add_column("ulps", justify="right")
    table.add_column("what was compared", overflow="fold")
    for proof in proofs:
        mark = "" if proof.passed else " (does not hold)"
        table.add_row(proof.name, f"{proof.figure:.2g}{mark}", f"{proof.ulps:.0f}", proof.detail)
    console.print(table)


def parse_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value as Python would read it, or else as text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, such as hidden=256")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_valid(text: str) -> tuple[str, tuple[int, int]]:
    """NAME:FIRST:LAST, such as tokens:0:31."""
    name, *limits = text.split(":")
    try:
        first, last = map(int, limits)
    except ValueError:
        first, last = 1, 0
    if not name or first > last:
        raise typer.BadParameter(f"{text!r} is not NAME:FIRST:LAST, such as tokens:0:31")
    return name, (first, last)


def _parse_pair(text: str, option: str) -> tuple[str, str]:
    """INPUT=OUTPUT."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise typer.BadParameter(f"{option} {text!r} is not NAME=VALUE, such as h=h_out")
    return name, value


def _parse_number(text: str) -> tuple[str, float]:
    """INPUT=VALUE, such as sr=16000."""
    name, value = _parse_pair(text, "--set")
    try:
        return name, ast.literal_eval(value) * 1
    except (ValueError, SyntaxError, TypeError) as error:
        raise typer.BadParameter(f"--set {text!r} is not NAME=NUMBER, such as sr=16000") from error


def _parse_axes(text: str) -> tuple[str, tuple[str | int, ...]]:
    """NAME:AXIS,AXIS…, each batch, time or a size."""
    name, _, listed = text.rpartition(":")
    words = {"batch": "batch", "time": "steps", "steps": "steps"}
    axes = [int(axis) if axis.isdecimal() else words.get(axis) for axis in listed.split(",")]
    known = tuple(axis for axis in axes if axis)
    if not name or len(known) < len(axes):
        raise typer.BadParameter(
            f"--input {text!r} is not NAME:AXES, such as x:batch,time,80 or x:batch,512"
        )
    return name, known
