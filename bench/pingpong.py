"""A client of bytes: on each stream one message is under way, and its answer brings the next one.

`python -m bench.pingpong` answers one Question a line. It is the same for every server, so
that what differs is the server.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import grpc.aio
import numpy as np

from sluice_cli.bench.watched import watch_process
from sluice_protos.sequences_pb2 import InferRequest, InferResponse, OpenSequence, Tensor

ECHO = "/echo.Echo/Infer"
SLUICE = "/sluice.v1.Sequences/Infer"
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
_WARMUP_SECONDS = 0.5


@dataclass(frozen=True)
class Question:
    """What to send where."""

    address: str
    pid: int
    method: str
    message: str  # in hex
    opening: str  # the first message of a stream, in hex; empty: none
    streams: int
    connections: int
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What came of it, in microseconds."""

    messages: int
    p50: float
    p99: float
    server_cpu: float  # a message


def ask_sluice(
    server: Any, model: str, features: int, *, streams: int, connections: int, seconds: float
) -> dict[str, Any]:
    """A question to a Sluice server: one sequence a stream, one step a message."""
    step = np.random.default_rng(0).standard_normal(features).astype(np.float32)
    message = InferRequest(lane=[0], inputs=[Tensor(data=step.tobytes())])
    opening = InferRequest(model=model, open=[OpenSequence(lane=0)])
    return asdict(
        Question(
            server.address,
            server.pid,
            SLUICE,
            message.SerializeToString().hex(),
            opening.SerializeToString().hex(),
            streams,
            connections,
            seconds,
        )
    )


def ask_echo(
    server: Any, message: str, *, streams: int, connections: int, seconds: float
) -> dict[str, Any]:
    """The same question to an echo."""
    return asdict(
        Question(server.address, server.pid, ECHO, message, "", streams, connections, seconds)
    )


def reply_bytes(outputs: int) -> int:
    """The size of a Sluice server's answer to one step."""
    data = bytes(4 * outputs)
    answer = InferResponse(lane=[0], steps=[1], first_step=[1000], outputs=[Tensor(data=data)])
    return answer.ByteSize()


async def _ask(question: Question) -> Answer:
    channels = [
        grpc.aio.insecure_channel(question.address, options=_OPTIONS)
        for _ in range(question.connections)
    ]
    try:
        calls = [
            channels[number % len(channels)].stream_stream(question.method, None, None)(None)
            for number in range(question.streams)
        ]
        if question.opening:
            await asyncio.gather(*(_open(call, question.opening) for call in calls))
        usage = watch_process(question.pid)
        begin = time.perf_counter() + _WARMUP_SECONDS
        end = begin + question.seconds
        message = bytes.fromhex(question.message)
        pings = asyncio.gather(*(_ping(call, message, begin, end) for call in calls))
        await asyncio.sleep(begin - time.perf_counter())
        before = usage()
        await asyncio.sleep(end - time.perf_counter())
        after = usage()
        latencies = 1e6 * np.concatenate(await pings)
        for call in calls:
            call.cancel()
    finally:
        for channel in channels:
            await channel.close(None)
    spent = 1e6 * (after.cpu_seconds - before.cpu_seconds)
    p50, p99 = np.percentile(latencies, [50, 99])
    return Answer(len(latencies), float(p50), float(p99), spent / len(latencies))


async def _open(call: Any, opening: str) -> None:
    await call.write(bytes.fromhex(opening))
    while not InferResponse.FromString(await call.read()).opened:
        pass


async def _ping(call: Any, message: bytes, begin: float, end: float) -> np.ndarray[Any, Any]:
    """The seconds of each message that was answered between two instants."""
    latencies = []
    while (sent := time.perf_counter()) < end:
        await call.write(message)
        await call.read()
        if begin <= (now := time.perf_counter()) < end:
            latencies.append(now - sent)
    return np.array(latencies)


async def main() -> None:
    """Answer questions until there are no more."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(asdict(await _ask(Question(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
