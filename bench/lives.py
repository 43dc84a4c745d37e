"""Runs clients of many kinds: they close, park, resume, leave, break off, and send nonsense.

`python -m bench.lives ADDRESS MODEL FEATURES` answers one Order per line with how often each kind
of client has run.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc
import grpc.aio
import numpy as np

from bench.pingpong import SLUICE
from sluice_cli.bench.plan import Sizes
from sluice_protos.open_inference_pb2 import ModelInferRequest
from sluice_protos.sequences_pb2 import (
    RESUME,
    CloseSequenceRequest,
    ForkRequest,
    GetStateRequest,
    InferRequest,
    InferResponse,
    ListSequencesRequest,
    OpenSequence,
    Tensor,
)
from sluice_protos.sequences_pb2_grpc import SequencesStub

_OTHER = "/inference.GRPCInferenceService/"
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
_ACKNOWLEDGED_AT_ONCE = 8
_ONE = Sizes.parse("1")
_MIXED = Sizes.parse("1:6,7:2,64:2")
# Many runs.
_LONG = Sizes.parse("1000")
_STEPS_MAX = 8 * 1000
# How long a slow client waits before it reads at all, and before each response.
_SLEEP_SECONDS, _READ_SECONDS = 3.0, 0.002
# The pause between two clients of the same kind.
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class Order:
    """For how long to run the clients."""

    seconds: float


class World:
    """What all clients share."""

    def __init__(self, address: str, model: str, features: int) -> None:
        self.address = address
        self.model = model
        self.features = features
        self.generator = np.random.default_rng(0)
        self.channel = self.connect()
        self._rows = self.generator.standard_normal((_STEPS_MAX, features)).astype(np.float32)

    def connect(self) -> grpc.aio.Channel:
        """A new connection."""
        return grpc.aio.insecure_channel(self.address, options=_OPTIONS)

    def wire(self, channel: grpc.aio.Channel | None = None) -> "Wire":
        """A new stream."""
        return Wire(self, channel or self.channel)

    def inputs(self, steps: int) -> Tensor:
        """So many random rows."""
        return Tensor(data=self._rows[:steps].tobytes())


class Wire:
    """One Infer stream: it sends, reads, acknowledges, and counts what has arrived."""

    def __init__(self, world: World, channel: grpc.aio.Channel) -> None:
        self._world = world
        self._call = channel.stream_stream(
            SLUICE, InferRequest.SerializeToString, InferResponse.FromString
        )(None)
        self._first: dict[str, Any] = {"model": world.model}
        self._responses = 0
        self.opened = self.steps = self.due = self.faults = self.closed = 0

    async def send(self, **fields: Any) -> None:
        """One request."""
        first, self._first = self._first, {}
        await self._call.write(InferRequest(**first, **fields, received_responses=self._responses))

    async def open(self, names: list[str], **fields: Any) -> None:
        """Open sequences with these names, each with its own writer, on the lanes from 0 on."""
        opens = [
            OpenSequence(lane=lane, sequence_id=name, writer=name.encode(), **fields)
            for lane, name in enumerate(names)
        ]
        await self.send(open=opens)
        opened = self.opened + len(names)
        await self.until(lambda: self.opened == opened)

    async def push(self, lanes: int, sizes: Sizes) -> None:
        """Send a chunk on each of the first `lanes` lanes, in one frame."""
        steps = sizes.draw(self._world.generator, lanes)
        inputs = [self._world.inputs(int(steps.sum()))]
        await self.send(lane=range(lanes), steps=steps.tolist(), inputs=inputs)
        self.due += int(steps.sum())

    async def step(self, lanes: int, sizes: Sizes) -> None:
        """Push chunks and read their outputs."""
        await self.push(lanes, sizes)
        await self.until(lambda: self.steps == self.due)

    async def until(self, is_done: Callable[[], bool], *, pause: float = 0.0) -> None:
        """Read until `is_done`, with a pause before each response. Acknowledge at intervals."""
        while not is_done():
            await asyncio.sleep(pause)
            response = await self._call.read()
            if not isinstance(response, InferResponse):
                raise RuntimeError(f"the stream has ended: {await self._call.details()}")
            self._note(response)
            if self._responses % _ACKNOWLEDGED_AT_ONCE == 0:
                await self.send()

    async def close(self, lanes: int) -> None:
        """Close the first `lanes` lanes and end the stream."""
        await self.send(close=range(lanes))
        closed = self.closed + lanes
        await self.until(lambda: self.closed == closed)
        await self.end()

    async def end(self) -> None:
        """Send no more, and read the remaining responses."""
        await self._call.done_writing()
        while isinstance(response := await self._call.read(), InferResponse):
            self._note(response)

    async def fail(self, **fields: Any) -> None:
        """Send a request that ends the stream with an error."""
        await self._call.write(InferRequest(**fields))
        await _refused(self.end())

    def cut(self) -> None:
        """Cancel the stream."""
        self._call.cancel()

    def _note(self, response: InferResponse) -> None:
        self._responses += 1
        self.opened += len(response.opened)
        self.steps += sum(response.steps)
        self.faults += len(response.faults)
        self.closed += len(response.closed)


def _names(count: int) -> list[str]:
    return [uuid4().hex for _ in range(count)]


async def _refused(call: Awaitable[object]) -> None:
    try:
        await call
    except grpc.aio.AioRpcError:
        return
    raise RuntimeError("a wrong request was not refused")


# The kinds of clients.

Kind = Callable[[World], Awaitable[None]]


async def close_when_done(world: World) -> None:
    """Frames of mixed chunks, then a close of every sequence."""
    wire = world.wire()
    await wire.open(_names(64))
    for _ in range(10):
        await wire.step(64, _MIXED)
    await wire.close(64)


async def park_and_come_back(world: World) -> None:
    """Park, and resume over another connection."""
    names, wire = _names(8), world.wire()
    await wire.open(names, attempt=1)
    await wire.step(8, _MIXED)
    await wire.send(park=range(8))
    await wire.until(lambda: wire.closed == 8)
    await wire.end()
    async with world.connect() as channel:
        wire = world.wire(channel)
        await wire.open(names, attempt=2, mode=RESUME)
        await wire.step(8, _MIXED)
        await wire.close(8)


async def leave(world: World) -> None:
    """End the stream properly and let the parked sequences expire."""
    wire = world.wire()
    await wire.open(_names(8))
    await wire.push(8, _MIXED)
    await wire.end()


async def fall_asleep(world: World) -> None:
    """Stay on the stream and wait until the server says that the sequences have expired."""
    wire = world.wire()
    await wire.open(_names(8))
    await wire.step(8, _MIXED)
    await wire.until(lambda: wire.closed == 8)
    await wire.end()


async def break_off(world: World) -> None:
    """Cancel the stream in the middle of long chunks, with unread outputs."""
    async with world.connect() as channel:
        wire = world.wire(channel)
        await wire.open(_names(8))
        await wire.push(8, _LONG)
        await wire.until(lambda: wire.steps > 0)
        wire.cut()


async def step_singly(world: World) -> None:
    """A connection and a stream for one sequence, one step a message, without a writer."""
    async with world.connect() as channel:
        wire = world.wire(channel)
        await wire.send(open=[OpenSequence(lane=0)])
        for _ in range(50):
            await wire.step(1, _ONE)
        await wire.close(1)


async def read_slowly(world: World) -> None:
    """Ask for many outputs and read them slowly."""
    wire = world.wire()
    await wire.open(_names(4))
    await wire.push(4, _LONG)
    await asyncio.sleep(_SLEEP_SECONDS)
    await wire.until(lambda: wire.steps == wire.due, pause=_READ_SECONDS)
    await wire.close(4)


async def send_nonsense(world: World) -> None:
    """Send short inputs, NaN, unknown lanes and models, and bytes that are not protobuf."""
    wire = world.wire()
    await wire.open(_names(2))
    no_numbers = np.full(world.features, np.nan, np.float32).tobytes()
    await wire.send(lane=[0], first_step=[0], inputs=[Tensor(data=b"short")])
    await wire.until(lambda: wire.faults == 1)
    await wire.send(lane=[0], first_step=[0], inputs=[Tensor(data=no_numbers)])
    await wire.until(lambda: wire.faults == 2)
    await wire.send(lane=[7], inputs=[world.inputs(1)])
    await wire.until(lambda: wire.faults == 3)
    await wire.send(lane=[0], first_step=[0], inputs=[world.inputs(1)])
    await wire.until(lambda: wire.steps == 1)
    await wire.send(close=[0, 1])
    await wire.fail(model="another")
    await world.wire().fail(lane=[1])
    raw = world.channel.stream_stream(SLUICE, None, None)(None)
    await raw.write(b"\xff\xff\xff")
    await _refused(raw.read())


async def be_asked_about(world: World) -> None:
    """Read a state and begin from it, fork, list, and close from outside."""
    stub, wire, (name,) = SequencesStub(world.channel), world.wire(), _names(1)
    await wire.open([name])
    await wire.step(1, _MIXED)
    state = await stub.GetState(GetStateRequest(model=world.model, sequence_id=name))
    await stub.Fork(ForkRequest(model=world.model, sequence_id=name))
    other = world.wire()
    await other.open(_names(1), state=state)
    other.cut()
    async for _ in stub.ListSequences(ListSequencesRequest(model=world.model)):
        pass
    await stub.CloseSequence(CloseSequenceRequest(model=world.model, sequence_id=name))
    await wire.until(lambda: wire.closed == 1)
    await wire.end()


async def speak_the_other_protocol(world: World) -> None:
    """Use the Open Inference Protocol: calls of a sequence that ends, and a cancelled stream."""

    def ask(name: str, number: int) -> bytes:
        message = ModelInferRequest(model_name=world.model)
        message.inputs.add(name="x", datatype="FP32", shape=[1, world.features])
        message.raw_input_contents.append(world.inputs(1).data)
        message.parameters["sequence_id"].string_param = name
        message.parameters["sequence_start"].bool_param = number == 0
        message.parameters["sequence_end"].bool_param = number == 9
        return message.SerializeToString()

    called, streamed = _names(2)
    call = world.channel.unary_unary(f"{_OTHER}ModelInfer", None, None)
    for number in range(10):
        await call(ask(called, number))
    stream = world.channel.stream_stream(f"{_OTHER}ModelStreamInfer", None, None)(None)
    for number in range(9):
        await stream.write(ask(streamed, number))
        await stream.read()
    stream.cancel()


# How many clients of each kind run at the same time.
KINDS: dict[Kind, int] = {
    close_when_done: 1,
    park_and_come_back: 2,
    leave: 2,
    fall_asleep: 2,
    break_off: 2,
    step_singly: 8,
    read_slowly: 1,
    send_nonsense: 1,
    be_asked_about: 1,
    speak_the_other_protocol: 2,
}


async def live(world: World, seconds: float) -> dict[str, int]:
    """Run clients of all kinds repeatedly for that long. Returns how often each has run."""
    lived = dict.fromkeys(KINDS, 0)

    async def repeat(kind: Kind) -> None:
        while True:
            await kind(world)
            lived[kind] += 1
            await asyncio.sleep(_PAUSE_SECONDS)

    # Clients that still run when the time is over are cancelled.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
            for kind, count in KINDS.items():
                for _ in range(count):
                    tasks.create_task(repeat(kind))
    return {kind.__name__.replace("_", " "): count for kind, count in lived.items()}


async def main(address: str, model: str, features: str) -> None:
    """Answer orders until there are no more."""
    world = World(address, model, int(features))
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = Order(**json.loads(line))
        print(json.dumps(await live(world, order.seconds)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
