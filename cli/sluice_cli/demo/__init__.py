"""`sluice demo`: the whole path, from training to streaming, on real text, by itself."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    train_seconds: Annotated[
        float, typer.Option(min=1, help="How long the two models are trained, side by side.")
    ] = 60,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that stream at once.")] = 64,
    characters: Annotated[int, typer.Option(min=16, help="Steps of each sequence.")] = 400,
    output: Annotated[Path, typer.Option(help="Where the models are left.")] = Path("demo-output"),
) -> None:
    """Two minutes: train two models, serve them, stream 64 sequences, compare every bit."""
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
