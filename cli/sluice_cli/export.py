"""`sluice export`: exports a PyTorch module, or an ONNX file made elsewhere, to a proven file."""

import warnings
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from sluice_cli.failure import fail, require_export_extra
from sluice_cli.options import (
    Checkpoint,
    FactoryArguments,
    module_loader,
    parse_axes,
    parse_fixed,
    parse_state,
    parse_valid,
)
from sluice_cli.proofs import progress_bar, show_proofs

HELP: Final = """Export a PyTorch module, or an ONNX file made elsewhere, to one that Sluice serves.

The factory makes the module, and the checkpoint has its weights. The file is written
only after it is proven equal to the module: on whole sequences, step by step, in
chunks and in ragged batches. The module is exported in eval mode: dropout, also
between layers, is off.

Examples:

    sluice export train:CharacterModel --checkpoint weights.pt --output characters.onnx

    sluice export models.speech:make --arg hidden=256 --arg layers=2 \\
        --checkpoint weights.pt --input audio:float32:1,10,80 --output speech.onnx

The checkpoint is what `torch.save(module.state_dict(), path)` wrote. If forward
takes one tensor, its shape is guessed from the layers; otherwise describe each
argument with --input, in the module's own layout.

With --onnx the source is an ONNX file. Its state is found and packed, and the result
is proven equal to the file.

    sluice export --onnx denoiser.onnx --output served.onnx

    sluice export --onnx silero_vad.onnx --set sr=16000 --input input:batch,576 \\
        --output voice.onnx

With --onnx, --input names the axes of an input: batch, time, or a size.
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
            help="An ONNX file made elsewhere, instead of a factory.",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=OUTPUT",
            help="With --onnx: a state input, and the output that it comes back as (or OUTPUT[0] "
            "of a stack). Name all states or none; repeatable.",
        ),
    ] = None,
    fixed: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="INPUT=VALUE",
            help="With --onnx: fix an input of a single value; repeatable.",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The model's name; by default the file's.", show_default=False
        ),
    ] = None,
    argument: FactoryArguments = None,
    described: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME:TYPE:SHAPE",
            help="An argument of forward, such as x:float32:1,10,8, with batch and time in the "
            "shape. With --onnx the axes of an input, such as x:batch,time,8. Repeatable.",
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:FIRST:LAST",
            help="The valid values of an integer input that indexes no embedding; repeatable.",
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
            help="The largest difference to the source, relative to the largest value; "
            "by default 0.0001.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Export a PyTorch module to one ONNX file."""
    _check_source(
        factory,
        onnx,
        checkpoint,
        has_module_options=bool(argument or output_name),
        has_file_options=bool(state or fixed),
    )
    options: dict[str, Any] = {"name": name, "valid": dict(map(parse_valid, valid or ()))}
    if tolerance is not None:
        options["tolerance"] = tolerance
    with require_export_extra("export"):
        import sluice_export

        if onnx is None:
            load = module_loader(factory, argument, checkpoint, described)
            options["output_names"] = output_name
        else:
            options["states"] = dict(map(parse_state, state or ()))
            options["fixed"] = dict(map(parse_fixed, fixed or ()))
            options["axes"] = dict(map(parse_axes, described or ()))
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("default")
        try:
            with progress_bar() as options["on_progress"]:
                if onnx is None:
                    contract = sluice_export.export(*load(), output, **options)
                else:
                    contract = sluice_export.export_onnx(onnx, output, **options)
        except OSError as error:
            fail(f"{output}: cannot be written ({error.strerror or error})")
    if onnx is None and checkpoint is None:
        _note("no --checkpoint was given; the weights are as the factory makes them")
    for notice in notices:
        if issubclass(notice.category, sluice_export.ExportNotice):
            _note(str(notice.message))
    show_proofs(f"{contract.name}: proven, written to {output}", contract.proofs)
    typer.echo(f"See it:   sluice inspect {output}")
    typer.echo(f"Serve it: sluice serve --model {contract.name}={output}")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(help=HELP)(export)


def _note(message: str) -> None:
    typer.echo(f"note: {message}", err=True)


def _check_source(
    factory: str | None,
    onnx: Path | None,
    checkpoint: Path | None,
    *,
    has_module_options: bool,
    has_file_options: bool,
) -> None:
    """Raise BadParameter unless there is one source and only options that belong to it."""
    if onnx is not None and factory is not None:
        raise typer.BadParameter("give either PACKAGE.MODULE:FACTORY or --onnx FILE")
    if onnx is None and factory is None and checkpoint is None:
        raise typer.BadParameter(
            "give PACKAGE.MODULE:FACTORY, --onnx FILE, or the --checkpoint of a single recurrent "
            "layer"
        )
    if onnx is None and has_file_options:
        raise typer.BadParameter("--state and --set need --onnx")
    if onnx is not None and (checkpoint is not None or has_module_options):
        raise typer.BadParameter("--checkpoint, --arg and --output-name need a factory")
