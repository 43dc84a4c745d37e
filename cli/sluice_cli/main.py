"""Assembles `sluice` from its commands."""

import typer

from sluice_cli import bench, demo, export, inspect, sequences, serve, stream, verify

app = typer.Typer(
    name="sluice",
    help="Serve recurrent models: export LSTM, GRU and RNN models from PyTorch to ONNX, "
    "stream any number of stateful sequences through them over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def _name_the_group() -> None:
    """Keep `serve` a word of its own, however few commands there are."""


bench.add_to(app)
demo.add_to(app)
export.add_to(app)
inspect.add_to(app)
sequences.add_to(app)
serve.add_to(app)
stream.add_to(app)
verify.add_to(app)


def main() -> None:
    """Run the command line; the `sluice` script."""
    app()
