"""Reads the options of `sluice export` and `sluice verify` that have a special form."""

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file with the module's weights; by default they are as the factory makes them.",
        show_default=False,
    ),
]
FactoryArguments = Annotated[
    list[str] | None,
    typer.Option("--arg", metavar="NAME=VALUE", help="An argument of the factory; repeatable."),
]


def module_loader(
    factory: str | None,
    arguments: Sequence[str] | None,
    checkpoint: Path | None,
    inputs: Sequence[str] | None,
) -> Callable[[], tuple[Any, Any]]:
    """A function that makes (module, example inputs) from the options.

    Raises BadParameter at once if an option has a wrong form.
    """
    from sluice_export import InputError
    from sluice_export.torch.example_inputs import guess_inputs, parse_input
    from sluice_export.torch.factory import load_module

    named = dict(map(parse_argument, arguments or ()))
    try:
        examples = dict(map(parse_input, inputs or ()))
    except InputError as error:
        raise typer.BadParameter(str(error)) from error

    def load() -> tuple[Any, Any]:
        module = load_module(factory, named, checkpoint)
        return module, examples or guess_inputs(module)

    return load


def parse_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE. A value that is not a Python literal is text."""
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


def parse_state(text: str) -> tuple[str, str]:
    """INPUT=OUTPUT, such as h=h_out."""
    name, _, output = text.partition("=")
    if not name or not output:
        raise typer.BadParameter(f"--state {text!r} is not INPUT=OUTPUT, such as h=h_out")
    return name, output


def parse_fixed(text: str) -> tuple[str, float]:
    """INPUT=NUMBER, such as sr=16000."""
    name, _, value = text.partition("=")
    try:
        if not name:
            raise ValueError
        return name, ast.literal_eval(value) * 1
    except (ValueError, SyntaxError, TypeError) as error:
        raise typer.BadParameter(f"--set {text!r} is not INPUT=NUMBER, such as sr=16000") from error


def parse_axes(text: str) -> tuple[str, tuple[str | int, ...]]:
    """NAME:AXIS,AXIS…, each axis being batch, time or a size."""
    name, _, listed = text.rpartition(":")
    words = {"batch": "batch", "time": "steps", "steps": "steps"}
    axes = [int(axis) if axis.isdecimal() else words.get(axis) for axis in listed.split(",")]
    known = tuple(axis for axis in axes if axis)
    if not name or len(known) < len(axes):
        raise typer.BadParameter(
            f"--input {text!r} is not NAME:AXES, such as x:batch,time,80 or x:batch,512"
        )
    return name, known
