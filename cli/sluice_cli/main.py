"""Assembles `sluice` from its commands."""

import gc
import sys
from collections.abc import Sequence
from importlib import import_module

import typer

COMMANDS = ("bench", "demo", "export", "inspect", "sequences", "serve", "stream", "verify")


def make_app(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """The command line with these commands; each is a module with `add_to`."""
    app = typer.Typer(
        name="sluice",
        help="Serve recurrent models: export LSTM, GRU and RNN models from PyTorch to ONNX, and "
        "stream any number of stateful sequences through them over gRPC.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    # Without a callback, typer drops the name of a single command.
    app.callback()(_do_nothing)
    for command in commands:
        import_module(f"sluice_cli.{command}").add_to(app)
    return app


def _do_nothing() -> None:
    """There are no options before the command."""


def main() -> None:
    """Run the command line. This is the `sluice` script."""
    # Import only the command that is called, so that it starts faster.
    named = [word for word in sys.argv[1:2] if word in COMMANDS]
    gc.disable()  # imports create no garbage to collect
    app = make_app(named or COMMANDS)
    gc.enable()
    app()
