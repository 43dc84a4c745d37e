"""Measures server CPU per request of the Open Inference Protocol: `python -m bench.open_inference`.

It is compared with a plain echo of messages of the same length, with the share of the runs
themselves, and with the native stream at one message per step.
"""

import asyncio
import re
import time
import urllib.request
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from bench.models import INPUTS, export_model
from bench.processes import Server, rival, sluice
from bench.table import Figures, bar, print_table, read_effort
from sluice_protos.open_inference_pb2 import ModelInferRequest
from sluice_protos.sequences_pb2 import InferRequest, InferResponse, OpenSequence, Tensor

HIDDEN = 128
SEQUENCES = (1, 64)
CALLS = {"stream": "ModelStreamInfer", "unary": "ModelInfer"}
PATH = "/inference.GRPCInferenceService/"
Stream = grpc.aio.StreamStreamCall[bytes, bytes]
Load = Callable[[grpc.aio.Channel, int, float], Coroutine[Any, Any, int]]


def make_request(sequence: int, features: int, *, is_start: bool = False) -> bytes:
    """One step of one sequence."""
    message = ModelInferRequest(
        model_name="model",
        inputs=[ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, features])],
        raw_input_contents=[np.zeros(features, np.float32).tobytes()],
    )
    message.parameters["sequence_id"].int64_param = sequence
    if is_start:
        message.parameters["sequence_start"].bool_param = True
    return message.SerializeToString()


async def load_stream(channel: grpc.aio.Channel, sequences: int, seconds: float) -> int:
    """Send the next step of a sequence after each answer. Returns the number of answers."""
    call: Stream = channel.stream_stream(f"{PATH}ModelStreamInfer", None, None)(None)
    for sequence in range(sequences):
        await call.write(make_request(sequence + 1, INPUTS, is_start=True))
    steps = [make_request(sequence + 1, INPUTS) for sequence in range(sequences)]
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        await call.read()
        await call.write(steps[count % sequences])
        count += 1
    call.cancel()
    return count


async def load_unary(channel: grpc.aio.Channel, sequences: int, seconds: float) -> int:
    """Send one request of each sequence at a time. Returns the number of answers."""
    infer = channel.unary_unary(f"{PATH}ModelInfer", None, None)
    end = time.monotonic() + seconds

    async def run(sequence: int) -> int:
        await infer(make_request(sequence, INPUTS, is_start=True))
        count, step = 1, make_request(sequence, INPUTS)
        while time.monotonic() < end:
            await infer(step)
            count += 1
        return count

    return sum(await asyncio.gather(*(run(sequence + 1) for sequence in range(sequences))))


async def load_native(channel: grpc.aio.Channel, sequences: int, seconds: float) -> int:
    """Send one message per step on the native stream, one per answer. Returns the steps."""
    call: Stream = channel.stream_stream("/sluice.v1.Sequences/Infer", None, None)(None)
    lanes = [OpenSequence(lane=lane) for lane in range(sequences)]
    await call.write(InferRequest(model="model", open=lanes).SerializeToString())
    row = Tensor(data=np.zeros(INPUTS, np.float32).tobytes())
    steps = [
        InferRequest(lane=[lane], inputs=[row]).SerializeToString() for lane in range(sequences)
    ]
    for step in steps:
        await call.write(step)
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        answer = await call.read()
        assert isinstance(answer, bytes)
        response = InferResponse.FromString(answer)
        for lane in response.lane:
            await call.write(steps[lane])
        count += len(response.lane)
    call.cancel()
    return count


@dataclass(frozen=True)
class Spent:
    """Microseconds a request."""

    cpu: float  # of the server
    runs: float  # in calls of ONNX Runtime


def read_run_seconds(server: Server) -> float:
    """The seconds that a server has spent in runs; 0 for a server without metrics."""
    if not server.http:
        return 0.0
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=30) as response:
        page = response.read().decode()
    return sum(map(float, re.findall(r"^sluice_run_seconds_sum\S* (\S+)$", page, re.MULTILINE)))


def measure(server: Server, load: Load, sequences: int, seconds: float) -> Spent:
    """What a request costs the server, in CPU and in runs."""

    async def run() -> Spent:
        async with grpc.aio.insecure_channel(server.address) as channel:
            await load(channel, sequences, 0.3)
            ran, before = read_run_seconds(server), server.usage().cpu_seconds
            count = await load(channel, sequences, seconds)
            spent = server.usage().cpu_seconds - before
            return Spent(spent / count * 1e6, (read_run_seconds(server) - ran) / count * 1e6)

    return asyncio.run(run())


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    counts = effort.pick(full=SEQUENCES, quick=SEQUENCES, smoke=SEQUENCES[:1])
    figures = Figures()
    reply_bytes = 4 * HIDDEN + 60
    with ExitStack() as stack:
        ours = stack.enter_context(sluice({"model": export_model(HIDDEN)}))
        echo = stack.enter_context(rival("bench.open_inference_echo", reply_bytes))
        progress = stack.enter_context(bar())
        cases: list[tuple[str, Server, Load]] = [
            ("echo stream", echo, load_stream),
            ("Sluice stream", ours, load_stream),
            ("native stream", ours, load_native),
            ("echo unary", echo, load_unary),
            ("Sluice unary", ours, load_unary),
        ]
        for _ in progress.track(range(effort.rounds), description="open inference"):
            for sequences in counts:
                for name, server, load in cases:
                    spent = measure(server, load, sequences, effort.seconds)
                    figures.add(f"{name} {sequences}", spent.cpu)
                    figures.add(f"{name} {sequences} runs", spent.runs)
                for kind in CALLS:
                    bound = figures.last(f"echo {kind} {sequences}")
                    bound += figures.last(f"Sluice {kind} {sequences} runs")
                    figures.add(f"bound {kind} {sequences}", bound)
    print_requests(figures, counts)


def print_requests(figures: Figures, counts: tuple[int, ...]) -> None:
    """Print what a request costs, by kind of call."""
    rows = []
    for kind, call in CALLS.items():
        for sequences in counts:
            case = f"{kind} {sequences}"
            native = f"{figures.least(f'native {case}'):.0f}" if kind == "stream" else ""
            rows.append(
                [
                    f"{call}, {sequences} sequences",
                    f"{figures.least(f'echo {case}'):.0f}",
                    f"{figures.least(f'Sluice {case} runs'):.0f}",
                    f"{figures.least(f'Sluice {case}'):.0f}",
                    f"{figures.ratio(f'Sluice {case}', f'bound {case}'):.2f}",
                    "≤ 1.3",
                    native,
                ]
            )
    print_table(
        f"A request of one step (H={HIDDEN}): µs of server CPU",
        ["", "echo", "in runs", "Sluice", "÷ (echo + runs)", "target", "native stream"],
        rows,
    )


if __name__ == "__main__":
    main()
