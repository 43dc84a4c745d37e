"""Server CPU a request of the Open Inference Protocol: `python -m bench.open_inference`.

Beside it: a plain echo of messages as long, and the native stream with one message a step.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
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
PATH = "/inference.GRPCInferenceService/"
Load = Callable[[grpc.aio.Channel, int, float], Coroutine[Any, Any, int]]


def make_request(sequence: int, features: int, *, is_start: bool = False) -> bytes:
    """One step of one sequence."""
    message = ModelInferRequest(
        model_name="model",
        inputs=[{"name": "x", "datatype": "FP32", "shape": [1, features]}],
        raw_input_contents=[np.zeros(features, np.float32).tobytes()],
    )
    message.parameters["sequence_id"].int64_param = sequence
    if is_start:
        message.parameters["sequence_start"].bool_param = True
    return message.SerializeToString()


async def load_stream(channel: grpc.aio.Channel, sequences: int, seconds: float) -> int:
    """Every answer sends the next step of its sequence; the answers counted."""
    call = channel.stream_stream(f"{PATH}ModelStreamInfer")()
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
    """One request of each sequence at a time; the answers counted."""
    infer = channel.unary_unary(f"{PATH}ModelInfer")
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
    """The native stream with one message a step, as many as answers came; steps counted."""
    call = channel.stream_stream("/sluice.v1.Sequences/Infer")()
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
        response = InferResponse.FromString(await call.read())
        for lane in response.lane:
            await call.write(steps[lane])
        count += len(response.lane)
    call.cancel()
    return count


def measure(server: Server, load: Load, sequences: int, seconds: float) -> float:
    """Microseconds of the server's CPU a request."""

    async def run() -> float:
        async with grpc.aio.insecure_channel(server.address) as channel:
            await load(channel, sequences, 0.3)
            before = server.usage().cpu_seconds
            count = await load(channel, sequences, seconds)
            return (server.usage().cpu_seconds - before) / count * 1e6

    return asyncio.run(run())


def main() -> None:
    """Measure and print."""
    effort = read_effort(__doc__ or "", rounds=3)
    figures = Figures()
    reply_bytes = 4 * HIDDEN + 60
    with ExitStack() as stack:
        ours = stack.enter_context(sluice({"model": export_model(HIDDEN)}))
        echo = stack.enter_context(rival("bench.open_inference_echo", reply_bytes))
        progress = stack.enter_context(bar())
        cases: list[tuple[str, Server, Load]] = [
            ("echo, stream", echo, load_stream),
            ("Sluice, stream", ours, load_stream),
            ("Sluice, native stream", ours, load_native),
            ("echo, unary", echo, load_unary),
            ("Sluice, unary", ours, load_unary),
        ]
        for _ in progress.track(range(effort.rounds), description="open inference"):
            for sequences in SEQUENCES:
                for name, server, load in cases:
                    spent = measure(server, load, sequences, effort.seconds)
                    figures.add(f"{name} {sequences}", spent)
    rows = [
        [name, *(f"{figures.least(f'{name} {sequences}'):.0f}" for sequences in SEQUENCES)]
        for name, _, _ in cases
    ]
    heads = ["1 sequence" if n == 1 else f"{n} sequences" for n in SEQUENCES]
    print_table(f"µs of server CPU a request of one step, H={HIDDEN}", ["", *heads], rows)


if __name__ == "__main__":
    main()
