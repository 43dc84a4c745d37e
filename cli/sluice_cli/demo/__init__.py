"""`sluice demo`: runs the whole path on real text, from training to streaming."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    train_seconds: Annotated[
        float, typer.Option(min=1, help="How long to train the two models, in parallel.")
    ] = 60,
    sequences: Annotated[
        int, typer.Option(min=1, help="Sequences to stream at the same time.")
    ] = 64,
    characters: Annotated[int, typer.Option(min=16, help="Steps of each sequence.")] = 400,
    output: Annotated[Path, typer.Option(help="A folder for the models.")] = Path("demo-output"),
) -> None:
    """Train two models, serve them, stream 64 sequences, compare every bit (two minutes)."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        import sluice_cli.demo.training
        import sluice_service.settings
    except ModuleNotFoundError:
        console.print("The demo needs all of Sluice: pip install 'sluice-serving[service,export]'")
        raise typer.Exit(2) from None
    from sluice_cli.demo.run import DemoError, run_demo

    try:
        run_demo(
            console,
            output,
            train_seconds=train_seconds,
            sequences=sequences,
            characters=characters,
        )
    except DemoError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(demo)
