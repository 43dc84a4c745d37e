"""`sluice verify`: repeats the proofs of a file on the machine that will serve it."""

from pathlib import Path
from typing import Annotated, Final

import typer

from sluice_cli.failure import fail, require_export_extra
from sluice_cli.options import Checkpoint, FactoryArguments, module_loader
from sluice_cli.proofs import progress_bar, show_proofs

HELP: Final = """Repeat the proofs of an exported model on this machine.

With --against, the file is compared with the PyTorch module that it was made from. Without
it, the file is compared with itself: rows alone, in batches, in chunks, ragged, padded and
over 10,000 steps. The exit status is 1 if a proof fails that held when the file was
written.

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
            help="The factory of the module that the file was exported from.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    argument: FactoryArguments = None,
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
    if against is None and (checkpoint or argument or described):
        raise typer.BadParameter("--checkpoint, --arg and --input need --against")
    with require_export_extra("verify"):
        import sluice_export
        from sluice_model import read_contract

        load = module_loader(against, argument, checkpoint, described) if against else tuple
    with progress_bar() as tell:
        proofs = sluice_export.verify(model, *load(), on_progress=tell)
    contract = read_contract(model)
    show_proofs(f"{contract.name}: proven again", proofs)
    held_before = {proof.name: proof.passed for proof in contract.proofs}
    lost = [p.name for p in proofs if not p.passed and held_before.get(p.name, True)]
    if lost:
        fail(
            f"{', '.join(lost)} held when the file was written and does not here; export it again "
            "on this machine"
        )


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(help=HELP)(verify)
