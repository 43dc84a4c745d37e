"""Runs a client of frames: all sequences that were answered send their next chunk in one message.

`python -m bench.frames ADDRESS PID MODEL FEATURES` keeps one stream to a Sluice server and
answers one Order per line with its own figures and the server's usage. It costs as little as
Python allows, so that the server is the limit.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from uuid import uuid4

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from bench.pingpong import SLUICE
from sluice_cli.bench.plan import Sizes
from sluice_cli.bench.traffic import Rotation
from sluice_cli.bench.watched import watch_process
from sluice_protos.sequences_pb2 import InferRequest, InferResponse, OpenSequence, Tensor

Integers = NDArray[np.int64]

_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_OPENED_AT_ONCE = 1000
_WARMUP_SECONDS = 0.3
_UNACKNOWLEDGED_STEPS_MAX = 1024


@dataclass(frozen=True)
class Order:
    """What to do: open `opens` more sequences, then stream, or wait for `expiries` to expire."""

    opens: int = 0
    in_flight: int = 0
    sizes: str = "1"
    seconds: float = 0.0
    expiries: int = 0


@dataclass(frozen=True)
class Figures:
    """The results: `cpu_us` is the server's CPU per step, `seconds` the time for opening."""

    seconds: float
    steps_per_second: float
    cpu_us: float
    resident_bytes: int


class Client:
    """One stream and its sequences."""

    def __init__(self, address: str, pid: int, model: str, features: int) -> None:
        self._usage = watch_process(pid)
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._call = self._channel.stream_stream(SLUICE, None, None)(None)
        self._model = model
        self._features = features
        self._generator = np.random.default_rng(0)
        self._pool = self._generator.standard_normal(2**21).astype(np.float32).tobytes()
        self._count = 0
        self._outstanding = np.zeros(0, np.int64)
        self._in_flight = 0
        self._responses = 0
        self._unacknowledged = 0

    async def obey(self, order: Order) -> Figures:
        """Carry out an order."""
        seconds, rate, cpu = 0.0, 0.0, 0.0
        if order.opens:
            begun = time.perf_counter()
            await self._open(order.opens)
            seconds = time.perf_counter() - begun
        if order.in_flight:
            sizes = Sizes.parse(order.sizes)
            rate, cpu = await self._stream(order.in_flight, sizes, order.seconds)
        ended = 0
        while ended < order.expiries:
            ended += len((await self._read()).closed)
        return Figures(seconds, rate, cpu, self._usage().resident_bytes)

    async def _open(self, count: int) -> None:
        """Open as a client that replays: with ids and writers, and with acknowledgements later."""
        begin, self._count = self._count, self._count + count
        sending = asyncio.ensure_future(self._send_opens(begin))
        opened = 0
        while opened < count:
            response = await self._read()
            opened += len(response.opened)
            if response.faults:
                raise RuntimeError(response.faults[0].message)
        await sending
        self._outstanding = np.zeros(self._count, np.int64)

    async def _send_opens(self, begin: int) -> None:
        writer = uuid4()
        for start in range(begin, self._count, _OPENED_AT_ONCE):
            stop = min(start + _OPENED_AT_ONCE, self._count)
            message = InferRequest(
                model=self._model,
                open=[
                    OpenSequence(
                        lane=lane,
                        sequence_id=f"{writer.hex}-{lane}",
                        writer=writer.bytes,
                        attempt=1,
                    )
                    for lane in range(start, stop)
                ],
            )
            await self._call.write(message.SerializeToString())

    async def _stream(self, in_flight: int, sizes: Sizes, seconds: float) -> tuple[float, float]:
        """Steps per second, and µs of server CPU per step, with that many chunks in flight."""
        rotation = Rotation(self._generator, self._count)
        begin = time.perf_counter() + _WARMUP_SECONDS
        end = begin + seconds
        await self._send(rotation.take(in_flight), sizes)
        await self._exchange(rotation, sizes, begin)
        before, begun = self._usage(), time.perf_counter()
        steps = await self._exchange(rotation, sizes, end)
        spent, passed = self._usage().cpu_seconds - before.cpu_seconds, time.perf_counter() - begun
        while self._in_flight:
            await self._take()
        return steps / passed, 1e6 * spent / max(1, steps)

    async def _exchange(self, rotation: Rotation, sizes: Sizes, until: float) -> int:
        """Take answers and send the next chunks. Returns how many steps were answered."""
        steps = 0
        while time.perf_counter() < until:
            idle, answered = await self._take()
            steps += answered
            if len(idle):
                rotation.give(idle)
                await self._send(rotation.take(len(idle)), sizes)
        return steps

    async def _take(self) -> tuple[Integers, int]:
        """Read one response: the lanes whose chunks are complete, and the steps in it."""
        response = await self._read()
        if response.faults:
            raise RuntimeError(response.faults[0].message)
        lanes, counts = np.array(response.lane, np.int64), np.array(response.steps, np.int64)
        self._outstanding[lanes] -= counts
        self._unacknowledged += int(counts.max(initial=0))
        if self._unacknowledged >= _UNACKNOWLEDGED_STEPS_MAX:
            # Without an acknowledgement, the server stops in the middle of long chunks.
            self._unacknowledged = 0
            acknowledgement = InferRequest(received_responses=self._responses)
            await self._call.write(acknowledgement.SerializeToString())
        idle = lanes[self._outstanding[lanes] == 0]
        self._in_flight -= len(idle)
        return idle, int(counts.sum())

    async def _send(self, lanes: Integers, sizes: Sizes) -> None:
        """Send the next chunk of each of `lanes` in one message."""
        steps = sizes.draw(self._generator, len(lanes))
        self._outstanding[lanes] = steps
        self._in_flight += len(lanes)
        size = 4 * self._features * int(steps.sum())
        start = 4 * int(self._generator.integers(0, max(1, (len(self._pool) - size) // 4)))
        data = self._pool[start : start + size]
        data += bytes(size - len(data))
        message = InferRequest(
            lane=lanes.tolist(),
            steps=[] if (steps == 1).all() else steps.tolist(),
            inputs=[Tensor(data=data)],
            received_responses=self._responses,
        )
        self._unacknowledged = 0
        await self._call.write(message.SerializeToString())

    async def _read(self) -> InferResponse:
        data = await self._call.read()
        if not isinstance(data, bytes):
            raise RuntimeError(await self._call.details())
        self._responses += 1
        return InferResponse.FromString(data)


async def main(address: str, pid: str, model: str, features: str) -> None:
    """Answer orders until there are no more."""
    client = Client(address, int(pid), model, int(features))
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(asdict(await client.obey(Order(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
