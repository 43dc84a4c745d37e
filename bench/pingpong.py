"""Runs a client of bytes: each stream has one message in flight and sends the next when answered.

`python -m bench.pingpong` answers one Question per line. It is the same for every server, so
all differences come from the servers.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from bench.processes import Server
from sluice_cli.bench.watched import watch_process
from sluice_protos.sequences_pb2 import InferRequest, InferResponse, OpenSequence, Tensor

ECHO = "/echo.Echo/Infer"
SLUICE = "/sluice.v1.Sequences/Infer"
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
_WARMUP_SECONDS = 0.5

Stream = grpc.aio.StreamStreamCall[bytes, bytes]
Exchange = Callable[[bytes], Awaitable[bytes]]
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """What to send, and where."""

    address: str
    pid: int
    method: str
    message: str  # in hex
    opening: str = ""  # the first message of a stream, in hex; empty: no such message
    is_unary: bool = False  # one call per message instead of a stream
    sequences: int = 0  # put the number of a sequence in front of each message; 0: none
    streams: int = 1
    connections: int = 1
    seconds: float = 1.0


@dataclass(frozen=True)
class Answer:
    """The results, in microseconds."""

    messages: int
    p50: float
    p99: float
    max: float
    server_cpu: float  # per message


def make_step(features: int) -> bytes:
    """One step of random inputs."""
    return np.random.default_rng(0).standard_normal(features).astype(np.float32).tobytes()


def ask_sluice(server: Server, model: str, step: bytes) -> Question:
    """A question to a Sluice server: one sequence per stream, one step per message."""
    message = InferRequest(lane=[0], inputs=[Tensor(data=step)])
    opening = InferRequest(model=model, open=[OpenSequence(lane=0)])
    return Question(
        server.address,
        server.pid,
        SLUICE,
        message.SerializeToString().hex(),
        opening.SerializeToString().hex(),
    )


def ask_echo(server: Server, step: bytes) -> Question:
    """A question with the same bytes to an echo."""
    message = InferRequest(lane=[0], inputs=[Tensor(data=step)])
    return Question(server.address, server.pid, ECHO, message.SerializeToString().hex())


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
        exchanges = [
            await _start(channels[number % len(channels)], question)
            for number in range(question.streams)
        ]
        usage = watch_process(question.pid)
        begin = time.perf_counter() + _WARMUP_SECONDS
        end = begin + question.seconds
        pings = asyncio.gather(
            *(
                _ping(exchange, _messages(question, number), begin, end)
                for number, exchange in enumerate(exchanges)
            )
        )
        await asyncio.sleep(begin - time.perf_counter())
        before = usage()
        await asyncio.sleep(end - time.perf_counter())
        after = usage()
        latencies = 1e6 * np.concatenate(await pings)
    finally:
        for channel in channels:
            await channel.close(None)
    spent = 1e6 * (after.cpu_seconds - before.cpu_seconds)
    p50, p99 = np.percentile(latencies, [50, 99])
    return Answer(
        len(latencies), float(p50), float(p99), float(latencies.max()), spent / len(latencies)
    )


async def _start(channel: grpc.aio.Channel, question: Question) -> Exchange:
    """A function that exchanges a message for its answer, over its own stream or by calls."""
    if question.is_unary:
        return channel.unary_unary(question.method, None, None)
    call = channel.stream_stream(question.method, None, None)(None)
    if question.opening:
        answer = await _exchange(call, bytes.fromhex(question.opening))
        while not InferResponse.FromString(answer).opened:
            answer = await _exchange(call)
    return partial(_exchange, call)


async def _exchange(call: Stream, message: bytes | None = None) -> bytes:
    """Send a message, if there is one, and take the next answer."""
    if message is not None:
        await call.write(message)
    answer = await call.read()
    assert isinstance(answer, bytes), "the server has ended the stream"
    return answer


def _messages(question: Question, stream: int) -> Iterator[bytes]:
    """The messages of one stream, without end."""
    message = bytes.fromhex(question.message)
    if not question.sequences:
        return itertools.repeat(message)
    numbers = range(stream, question.sequences, question.streams)
    return itertools.cycle([number.to_bytes(8, "little") + message for number in numbers])


async def _ping(exchange: Exchange, messages: Iterator[bytes], begin: float, end: float) -> Seconds:
    """The latencies in seconds of messages answered between two instants; at least one."""
    latencies = list[float]()
    while (sent := time.perf_counter()) < end or not latencies:
        await exchange(next(messages))
        now = time.perf_counter()
        if begin <= now < end or (now >= end and not latencies):
            latencies.append(now - sent)
    return np.array(latencies)


async def main() -> None:
    """Answer questions until there are no more."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(asdict(await _ask(Question(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
