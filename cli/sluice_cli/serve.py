"""`sluice serve`: runs the server, with a flag for each setting."""

import gc
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast, get_args, get_origin

import typer

if TYPE_CHECKING:
    from types import ModuleType

    from pydantic import ValidationError

    from sluice_service.settings import Settings

HELP = """Serve models over gRPC until SIGTERM.

Settings come from flags, from the environment (SLUICE_…) and from a YAML file. Flags override the
environment, and the environment overrides the file.

    sluice serve --model lstm=models/lstm.onnx

    sluice serve --model lstm=lstm.onnx --model gru=gru.onnx --listen 0.0.0.0:8001

    SLUICE_SEQUENCES_MAX=5000 sluice serve --config sluice.yaml
"""


_ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(**flags: Any) -> None:
    """Serve models over gRPC until SIGTERM."""
    settings = _read_settings(flags)
    # Imports create no garbage, and collecting would take a tenth of their time.
    gc.disable()
    with _hidden("rich"):
        # structlog would import rich for coloured tracebacks, which no log line has.
        import_module("structlog")
    import uvloop

    from sluice_model import ModelError
    from sluice_service.logs import set_up_logs
    from sluice_service.runtime import memory
    from sluice_service.store import StoreError, StoreSetupError
    from sluice_service.workers import serve as serve_until_stopped

    memory.keep_imports()
    set_up_logs(settings)
    try:
        uvloop.run(serve_until_stopped(settings))
    except (ModelError, OSError, StoreError, StoreSetupError) as error:
        _fail(str(error))


def _read_settings(flags: dict[str, Any]) -> "Settings":
    """The settings from flags, environment and file. Ends the command if they are wrong."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from sluice_service.settings import Settings

    given = {name: value for name, value in flags.items() if value not in (None, [])}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        _fail(_explain(error))
    except SettingsError as error:
        _fail(f"--config: {error}")
    if not settings.model and settings.model_repository is None:
        _fail(
            "there is no model to serve; name one with --model NAME=PATH, or a folder of them "
            "with --model-repository DIR"
        )
    return settings


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Hide a module from imports in the block, unless it has been imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = cast("ModuleType", None)  # makes `import` fail
    yield
    del sys.modules[module]


def add_to(app: typer.Typer) -> None:
    """Register the command, with one flag for each setting."""
    try:
        parameters = _parameters()
    except ModuleNotFoundError:
        app.command(help=HELP, context_settings=_ANY_ARGUMENTS)(say_what_is_missing)
        return
    vars(serve)["__signature__"] = inspect.Signature(parameters)
    app.command(help=HELP)(serve)


def say_what_is_missing() -> None:
    """Name the extra that installs the server."""
    _fail("the server is not installed; install it with: pip install 'sluice-serving[service]'")


def _parameters() -> list[inspect.Parameter]:
    """A flag for each field of the settings, with its help, default and variable."""
    from sluice_service.settings import Settings

    parameters = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, {}) else f" [default: {field.default}]"
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=f"{field.description}{default} [env: SLUICE_{name.upper()}]",
            metavar=_metavar(name, field.annotation),
            rich_help_panel=field.title,
            show_default=False,
        )
        kind: Any = {"model": list[str], "config": Path}.get(name, str)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    return parameters


def _metavar(name: str, annotation: Any) -> str:
    """The placeholder for a setting's value."""
    named = {"model": "NAME=PATH", "config": "FILE", "listen": "HOST:PORT", "http": "HOST:PORT"}
    named["store"] = "URL"
    named["model_repository"] = "DIR"
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return named.get(name, "SECONDS" if annotation is float else "N")


def _explain(error: "ValidationError") -> str:
    """One line for each wrong setting, with the name of its flag."""
    lines = []
    for problem in error.errors():
        # The message of a problem that concerns several settings already names their flags.
        flag = "".join(f"--{name}: ".replace("_", "-") for name in problem["loc"][:1])
        lines.append(flag + problem["msg"].removeprefix("Value error, "))
    return "\n".join(lines)


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(2)
