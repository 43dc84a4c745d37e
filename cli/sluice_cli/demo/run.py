"""Runs the demo: train, export, serve, stream, compare with an offline run."""

import asyncio
import json
import os
import shlex
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sluice_cli.demo import page
from sluice_cli.demo.page import Result
from sluice_cli.reference import OfflineError, run_offline

MODELS = ("lstm", "gru")
READY_SECONDS_MAX = 60

Codes = NDArray[np.int64]
Logits = NDArray[np.float32]


class DemoError(Exception):
    """The demo failed; the message names the log to read."""


@dataclass(frozen=True)
class Server:
    """Where the demo's server listens."""

    grpc: str
    http: str


def run_demo(
    console: Console, output: Path, *, train_seconds: float, sequences: int, characters: int
) -> None:
    """Run the whole demo and write models and logs to `output`. Raises DemoError."""
    from sluice_cli.demo.training import encode, read_corpus

    output.mkdir(parents=True, exist_ok=True)
    _, held_out = read_corpus()
    codes = cut(encode(held_out), sequences, characters)
    asyncio.run(_demo(console, output, codes, train_seconds))


def cut(codes: Codes, sequences: int, characters: int) -> Codes:
    """Evenly spaced passages of a text: [sequences, characters + 1]; the last is only predicted."""
    last = len(codes) - characters - 1
    starts = np.linspace(0, last, sequences).astype(int)
    return np.stack([codes[start : start + characters + 1] for start in starts])


async def _demo(console: Console, output: Path, codes: Codes, train_seconds: float) -> None:
    start = time.monotonic()
    console.print(page.opening(len(codes), codes.shape[1] - 1))
    with _bars(console) as bars:
        await asyncio.gather(*(_train(kind, output, train_seconds, bars) for kind in MODELS))
    results = []
    async with _server(console, output) as server:
        with _bars(console) as bars:
            streams = [await _stream(server, kind, codes, bars) for kind in MODELS]
        console.print(
            "\nRunning the same texts offline: plain ONNX Runtime, each whole sequence alone …"
        )
        for kind, (logits, seconds, latencies, metrics) in zip(MODELS, streams, strict=True):
            offline = await _run_offline(kind, output, codes[:, :-1])
            results.append(
                Result(
                    name=kind,
                    codes=codes,
                    logits=logits,
                    stateless=(await _stream_stateless(server, kind))[codes[:, :-1]],
                    equal_floats=int((logits.view(np.uint32) == offline.view(np.uint32)).sum()),
                    seconds=seconds,
                    latencies=latencies,
                    metrics=metrics,
                )
            )
    np.savetxt(output / "text.csv", codes[0, :-1], fmt="%d")
    for part in page.findings(results):
        console.print(part)
    if not all(result.is_bit_exact for result in results):
        raise DemoError("the streamed outputs differ from those of the offline run")
    ending = page.ending(_own_command(), output, time.monotonic() - start)
    console.print(ending, soft_wrap=True)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.fields[name]:<5}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    )


async def _train(kind: str, output: Path, seconds: float, bars: Progress) -> None:
    """Train and export one model in its own process."""
    task = bars.add_task("starting", total=1.0, name=kind)
    model, log = output / f"{kind}.onnx", output / f"train-{kind}.log"
    command = [sys.executable, "-m", "sluice_cli.demo.training", kind, "--json"]
    command += ["--output", str(model), "--seconds", str(seconds)]
    with log.open("wb") as errors:
        async with _process(command, stdout=asyncio.subprocess.PIPE, stderr=errors) as process:
            assert process.stdout
            async for line in process.stdout:
                at = json.loads(line)
                # The export is the last tenth of the bar.
                share = at["share"] * 0.9 if at["phase"] == "train" else 0.9 + at["share"] * 0.1
                bars.update(task, completed=share, description=f"{at['phase']}: {at['text']}")
            if await process.wait():
                raise DemoError(f"training the {kind} failed; {log} says why")


@asynccontextmanager
async def _process(command: list[str], **pipes: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that is terminated at the end of the block."""
    process = await asyncio.create_subprocess_exec(*command, **pipes)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


@asynccontextmanager
async def _server(console: Console, output: Path) -> AsyncIterator[Server]:
    """`sluice serve` with both models, in its own process, stopped at the end of the block."""
    server = Server(grpc=f"127.0.0.1:{_free_port()}", http=f"127.0.0.1:{_free_port()}")
    command = [sys.executable, "-m", "sluice_cli", "serve"]
    command += ["--listen", server.grpc, "--http", server.http]
    for kind in MODELS:
        command += ["--model", f"{kind}={output / f'{kind}.onnx'}"]
    log = output / "server.log"
    with log.open("wb") as lines:
        async with _process(command, stdout=lines, stderr=lines) as process:
            deadline = time.monotonic() + READY_SECONDS_MAX
            while not await asyncio.to_thread(_is_ready, server):
                if process.returncode is not None or time.monotonic() > deadline:
                    raise DemoError(f"the server did not become ready; {log} says why")
                await asyncio.sleep(0.1)
            console.print(
                f"\n[bold]sluice serve[/bold] is process {process.pid}: gRPC on {server.grpc}, "
                f"metrics on http://{server.http}/metrics\n"
            )
            yield server
            process.terminate()
            if await process.wait():
                raise DemoError(f"the server did not stop cleanly; {log} says why")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_ready(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"http://{server.http}/readyz", timeout=1):
            return True
    except OSError:
        return False


async def _stream(
    server: Server, model: str, codes: Codes, bars: Progress
) -> tuple[Logits, float, NDArray[np.float64], str]:
    """Stream all sequences at the same time, one character at a time.

    Returns logits [sequences, steps, characters], the total seconds, each step's
    seconds [sequences, steps], and the page /metrics while all sequences are live.
    """
    from sluice_client import AsyncClient

    sequences, steps = len(codes), codes.shape[1] - 1
    task = bars.add_task("", total=sequences * steps, name=model)
    latencies = np.zeros((sequences, steps))
    async with AsyncClient(server.grpc) as client, AsyncExitStack() as stack:
        (output,) = (await client.model(model)).outputs
        logits = np.zeros((sequences, steps, *output.shape), np.float32)
        handles = [
            await stack.enter_async_context(client.sequence(model, f"text-{row}"))
            for row in range(sequences)
        ]

        async def read(row: int) -> None:
            for step in range(steps):
                before = time.perf_counter()
                logits[row, step] = await handles[row].step(codes[row, step])
                latencies[row, step] = time.perf_counter() - before
                bars.advance(task)

        start = time.perf_counter()
        await asyncio.gather(*map(read, range(sequences)))
        seconds = time.perf_counter() - start
        rate = sequences * steps / seconds
        bars.update(task, description=f"{sequences} sequences, {rate:,.0f} steps a second")
        metrics = await asyncio.to_thread(_read_metrics, server)
    return logits, seconds, latencies, metrics


async def _stream_stateless(server: Server, model: str) -> Logits:
    """The model's logits after each single character: [characters, characters].

    If the state is dropped at each step, the output depends on one character only. So one
    sequence of one step for each character is enough for all texts.
    """
    from sluice_client import AsyncClient

    async with AsyncClient(server.grpc) as client:
        (output,) = (await client.model(model)).outputs
        codes = np.arange(output.shape[0])
        async with client.group(model, [f"alone-{code}" for code in codes]) as group:
            outputs = (await group.step(codes)).check()
    assert isinstance(outputs, np.ndarray)
    return outputs


def _read_metrics(server: Server) -> str:
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=10) as response:
        text: str = response.read().decode()
    return text


async def _run_offline(kind: str, output: Path, codes: Codes) -> Logits:
    """Run the reference in a process that imports nothing of Sluice."""
    sequences = [{"x": row} for row in codes]
    try:
        found = await asyncio.to_thread(run_offline, output / f"{kind}.onnx", sequences)
    except OfflineError as error:
        raise DemoError(f"the offline run of the {kind} failed: {error}") from error
    return np.stack([array for outputs in found for array in outputs.values()])


def _own_command() -> str:
    """The command that started this program, for commands that can be copied."""
    called = Path(sys.argv[0])
    if called.name != "sluice":
        return shlex.join([sys.executable, "-m", "sluice_cli"])
    if called == Path("sluice") or str(called.parent) in os.environ["PATH"].split(os.pathsep):
        return "sluice"
    return os.path.relpath(called)
