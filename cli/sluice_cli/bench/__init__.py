"""`sluice bench`: sends a load to a server and measures it."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

if TYPE_CHECKING:
    from sluice_cli.bench.plan import Plan
    from sluice_cli.bench.run import Result
    from sluice_cli.bench.watched import Watch

HELP: Final = """Measure a running server: steps a second, latency, CPU time and memory.

There are two kinds of load. CLOSED LOOP (without --rate): every sequence sends its next chunk
when the previous one is answered. This measures the highest rate of the server. OPEN LOOP
(--rate): chunks are due at random times at that rate, whether or not earlier ones are answered,
and latency counts from the time at which a chunk is due. This measures what users see. Choose a
rate well below the highest.

    sluice bench lstm                                    # 64 sequences, one step each in flight

    sluice bench lstm --sequences 1000 --rate 5000       # open loop, 5000 steps a second

    sluice bench lstm --steps 1:90,64:10                 # 90 single steps to 10 chunks of 64

    sluice bench lstm --streams 64                       # every sequence on a stream of its own

    sluice bench lstm --verify lstm.onnx --json          # compare every bit; print JSON

Sequences that share a stream share messages. To measure the traffic of separate clients, use
as many streams as sequences. The server's CPU time and memory are read from its metrics page
(--http), or from its process (--pid) if the server runs on this machine.

With --json the result is one object: steps_per_second; latency_ms (of a step, which waits for
its whole chunk) and chunk_latency_ms with p50, p90, p99, p999; server_cpu_us_per_step and
server_rss_bytes (null if neither --http nor --pid is known); verified_steps; and more.
"""

DEFAULT_ADDRESS: Final = "127.0.0.1:8001"
DEFAULT_PAGE: Final = "127.0.0.1:8002"
# How many steps --verify compares, over all sequences.
_KEPT_STEPS: Final = 32_768


def bench(
    model: Annotated[str, typer.Argument(help="The model's name at the server.")],
    address: Annotated[
        list[str],
        typer.Option(
            metavar="HOST:PORT",
            help="The server. Repeat the option to divide the processes among several servers.",
        ),
    ] = [DEFAULT_ADDRESS],  # noqa: B006 - typer only reads the default
    sequences: Annotated[int, typer.Option(min=1, help="Live sequences.")] = 64,
    in_flight: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Closed loop: sequences that have a chunk in flight at the same time. "
            "All by default.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        str, typer.Option(help="Steps of a chunk, or several sizes with weights: 1:90,64:10.")
    ] = "1",
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Open loop: steps a second of all sequences. Without it: closed loop.",
            show_default=False,
        ),
    ] = None,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds to measure.")] = 10,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds to send before measuring.")] = 1,
    streams: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Streams, each with its own connection, among which the sequences are divided. "
            "One per process by default.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Client processes.")] = 1,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL.ONNX",
            help="Compare outputs bit for bit with offline runs of this file.",
            show_default=False,
        ),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the server's metrics page is. "
            f"{DEFAULT_PAGE} by default, if the server has the default address.",
            show_default=False,
        ),
    ] = None,
    pid: Annotated[
        int | None,
        typer.Option(help="The server's process, instead of --http.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a running server."""
    from rich.console import Console

    from sluice_cli.bench import report
    from sluice_cli.bench.plan import Plan, Sizes
    from sluice_cli.bench.run import LoadError

    try:
        sizes = Sizes.parse(steps)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--steps") from None
    streams = max(processes, streams or processes)
    if streams > sequences:
        raise typer.BadParameter(
            f"{sequences} sequences cannot share {streams} streams; raise --sequences"
        )
    plan = Plan(
        model=model,
        addresses=tuple(address),
        sequences=sequences,
        in_flight=max(streams, min(in_flight or sequences, sequences)),
        streams=streams,
        processes=processes,
        sizes=sizes,
        rate=rate,
        warmup=warmup,
        duration=duration,
        kept_steps=_KEPT_STEPS if verify else 0,
    )
    watch = _find_server(plan, http, pid)
    try:
        result = _send(plan, watch)
    except LoadError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    verified = _verify(verify, result) if verify else 0
    if as_json:
        typer.echo(json.dumps(report.as_object(result, verified)))
        return
    console = Console(highlight=False)
    console.print(report.headline(result), style="bold")
    console.print(report.as_table(result))
    for note in report.notes(result):
        console.print(note)
    if watch is None:
        console.print("Give the server's --http or --pid to measure its CPU time and memory.")
    if verified:
        console.print(f"{verified:,} steps equal those of an offline run, bit for bit.")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(help=HELP)(bench)


def _find_server(plan: "Plan", http: str | None, pid: int | None) -> "Watch | None":
    """A function that reads the server's usage; None if there is no way to read it."""
    from sluice_cli.bench.watched import watch_page, watch_process

    try:
        if pid is not None:
            return watch_process(pid)
        if http is not None:
            return watch_page(http)
    except OSError as error:
        _fail(f"the server's CPU time and memory cannot be read: {error}")
    if plan.addresses == (DEFAULT_ADDRESS,):
        with contextlib.suppress(OSError):
            return watch_page(DEFAULT_PAGE)
    return None


def _send(plan: "Plan", watch: "Watch | None") -> "Result":
    """Send the load and show a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from sluice_cli.bench.run import run_load

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[steps]:,} steps"),
        console=Console(file=sys.stderr, highlight=False),
        transient=True,
    ) as bars:
        task = bars.add_task("connecting", total=1.0, steps=0)

        def tell(what: str, share: float, steps: int) -> None:
            bars.update(task, description=what, completed=share, steps=steps)

        return run_load(plan, watch, tell)


def _verify(model: Path, result: "Result") -> int:
    """Compare steps and return how many. Ends the command if one differs."""
    from sluice_cli.bench.verification import DifferenceError, verify

    try:
        return verify(model, result)
    except DifferenceError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
