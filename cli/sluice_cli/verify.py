"""`sluice verify`: the proofs of a file, made again where it will be served."""

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from sluice_cli.export import fail, parse_argument, progress, show_proofs

HELP: Final = """Repeat the proofs of an exported model, on this machine.

Compared with the PyTorch module it was made from (--against), or, without it, with
itself: rows alone, in batches, in chunks, ragged, padded and over 10,000 steps. The
exit status is 1 where a proof does not hold that held when the file was written.

Examples:

    sluice verify model.onnx

    sluice verify model.onnx --against train:CharacterModel --checkpoint weights.pt
"""


def verify(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.ONNX", help="A file that sluice export wrote.", show_default=False
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="What makes the module that the file came from.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The module's weights.", show_default=False),
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
            help="An argument of forward, such as x:float32:1,10,8; repeatable.",
        ),
    ] = None,
) -> None:
    """Repeat the proofs of an exported model."""
    try:
        import sluice_export
        from sluice_export.torch.factory import (
            guess_inputs,
            load_checkpoint,
            make_input,
            make_module,
        )
        from sluice_model import read_contract
    except ModuleNotFoundError as error:
        fail(f"verify needs {error.name}: pip install 'sluice-serving[export]'")
    if against is None and (checkpoint or argument or described):
        raise typer.BadParameter("--checkpoint, --arg and --input need --against")
    module: Any = None
    examples: Any = None
    with progress(Console(file=sys.stderr, markup=False, highlight=False)) as bar:
        task = bar.add_task("reading", total=1.0)
        try:
            if against is not None:
                module = make_module(against, dict(parse_argument(t) for t in argument or []))
                if checkpoint is not None:
                    load_checkpoint(module.eval(), checkpoint)
                module = module.eval()
                examples = dict(make_input(t) for t in described or []) or guess_inputs(module)
            proofs = sluice_export.verify(
                model,
                module,
                examples,
                on_progress=lambda what, share: bar.update(task, description=what, completed=share),
            )
        except sluice_export.ExportError as error:
            bar.stop()
            fail(str(error))
    contract = read_contract(model)
    show_proofs(Console(markup=False, highlight=False), f"{contract.name}: proven again", proofs)
    held_before = {proof.name: proof.passed for proof in contract.proofs}
    lost = [p.name for p in proofs if not p.passed and held_before.get(p.name, True)]
    if lost:
        fail(f"{', '.join(lost)} held when the file was written and does not here; export it here")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(help=HELP)(verify)
