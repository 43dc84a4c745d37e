"""Speaks Infer message by message and files what comes back by lane; starts servers to speak to.

Knows the protocol only; every wait has an end.
"""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from sluice_protos.sequences_pb2 import (
    Closed,
    CloseSequenceRequest,
    Fault,
    GetStateRequest,
    InferRequest,
    InferResponse,
    Limits,
    ListSequencesRequest,
    Opened,
    OpenSequence,
    SequenceInfo,
    SequenceState,
    Tensor,
)
from sluice_protos.sequences_pb2_grpc import ModelsStub, SequencesStub
from sluice_service.server import Server
from sluice_service.settings import Settings
from sluice_service.store import Store

SECONDS = 60
# Lanes that no test takes: `Wire.settle` opens and closes sequences there.
_SETTLE_LANE = 900


class Served:
    """A server in this process, on free ports, with a channel to it."""

    def __init__(
        self, models: dict[str, Path], *, own_store: Store | None = None, **settings: Any
    ) -> None:
        fields = {"listen": "127.0.0.1:0", "http": "127.0.0.1:0", **settings}
        self.server = Server(Settings(model=models, **fields), store=own_store)
        self._wires: list[Wire] = []

    async def start(self) -> "Served":
        await self.server.start()
        self.address = f"127.0.0.1:{self.server.grpc_port}"
        self.http = f"http://127.0.0.1:{self.server.http_port}"
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(self.address, options=unlimited)
        self.sequences = SequencesStub(self.channel)
        self.models = ModelsStub(self.channel)
        self.is_stopped = False
        return self

    async def stop(self) -> None:
        for wire in self._wires:
            wire.cut()
        if not self.is_stopped:
            await self.server.stop()
        await self.channel.close()

    def wire(self, model: str, **fields: Any) -> "Wire":
        """A new stream; its first message carries `fields` and the model's name."""
        wire = Wire(self.channel, model=model, **fields)
        self._wires.append(wire)
        return wire

    async def state(self, model: str, sequence_id: str) -> SequenceState:
        return await self.sequences.GetState(
            GetStateRequest(model=model, sequence_id=sequence_id), timeout=SECONDS
        )

    async def close(self, model: str, sequence_id: str) -> int:
        request = CloseSequenceRequest(model=model, sequence_id=sequence_id)
        return (await self.sequences.CloseSequence(request, timeout=SECONDS)).step

    async def list(self, model: str = "") -> dict[str, SequenceInfo]:
        call = self.sequences.ListSequences(ListSequencesRequest(model=model), timeout=SECONDS)
        return {info.sequence_id: info async for info in call}

    def find(self, model: str, sequence_id: str) -> SequenceInfo | None:
        """What the server would list of a live sequence, without a call."""
        infos = self.server.hosts[model].sequences()
        return next((info for info in infos if info.sequence_id == sequence_id), None)

    async def parked(self, model: str, *sequence_ids: str) -> None:
        """Wait until those sequences are on no stream."""

        def is_parked(sequence_id: str) -> bool:
            info = self.find(model, sequence_id)
            return info is not None and info.is_parked

        await eventually(lambda: all(map(is_parked, sequence_ids)))

    def metric(self, name: str, **labels: str) -> float:
        """A sample as it stands now; 0 where there is none yet."""
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


class Wire:
    """One Infer stream."""

    def __init__(self, channel: grpc.aio.Channel, **first: Any) -> None:
        self.call = channel.stream_stream(
            "/sluice.v1.Sequences/Infer",
            request_serializer=_as_bytes,
            response_deserializer=InferResponse.FromString,
        )()
        self._first = first
        self.responses: list[InferResponse] = []
        self.limits = Limits()
        self.opened: dict[int, list[Opened]] = defaultdict(list)
        self.faults: dict[int, list[Fault]] = defaultdict(list)
        self.ended: dict[int, list[Closed]] = defaultdict(list)
        # Of each lane: (first step, steps, the bytes of each output).
        self.pieces: dict[int, list[tuple[int, int, list[bytes]]]] = defaultdict(list)

    # Sending.

    async def send(self, **fields: Any) -> None:
        """One request."""
        first, self._first = self._first, {}
        async with asyncio.timeout(SECONDS):
            await self.call.write(InferRequest(**first, **fields))

    async def send_bytes(self, data: bytes) -> None:
        async with asyncio.timeout(SECONDS):
            await self.call.write(data)

    async def open(self, lane: int, sequence_id: str = "", **fields: Any) -> Opened:
        """Open a sequence that must open."""
        await self.send(open=[OpenSequence(lane=lane, sequence_id=sequence_id, **fields)])
        return await self.next_opened(lane)

    async def refused(self, lane: int, sequence_id: str = "", **fields: Any) -> Fault:
        """Open a sequence that must be refused."""
        await self.send(open=[OpenSequence(lane=lane, sequence_id=sequence_id, **fields)])
        return await self.next_fault(lane)

    async def push(self, lane: int, *inputs: Any, first: int | None = None) -> None:
        """One chunk: an array [steps, …] for each input."""
        await self.send(
            lane=[lane],
            steps=[len(inputs[0])],
            first_step=[] if first is None else [first],
            inputs=[Tensor(data=array.tobytes()) for array in inputs],
        )

    async def end(self) -> grpc.StatusCode:
        """Send no more, read what is left; the status that the stream ends with."""
        async with asyncio.timeout(SECONDS):
            await self.call.done_writing()
        return await self.status()

    def cut(self) -> None:
        """Drop the stream as a lost connection would."""
        self.call.cancel()

    # Reading.

    async def read(self) -> InferResponse | None:
        """The next response, filed; None at the end of the stream."""
        async with asyncio.timeout(SECONDS):
            response = await self.call.read()
        if not isinstance(response, InferResponse):
            return None
        self.responses.append(response)
        if response.HasField("limits"):
            self.limits = response.limits
        for opened in response.opened:
            self.opened[opened.lane].append(opened)
        rows = sum(response.steps)
        start = 0
        for lane, steps, first in zip(
            response.lane, response.steps, response.first_step, strict=True
        ):
            cells = [
                tensor.data[len(tensor.data) // rows * start : len(tensor.data) // rows * end]
                for tensor in response.outputs
                for end in [start + steps]
            ]
            self.pieces[lane].append((first, steps, cells))
            start += steps
        for fault in response.faults:
            self.faults[fault.lane].append(fault)
        for closed in response.closed:
            self.ended[closed.lane].append(closed)
        return response

    async def until(self, is_done: Callable[[], object]) -> None:
        """Read until `is_done()`; fails when the stream ends before."""
        async with asyncio.timeout(SECONDS):
            while not is_done():
                if await self.read() is None:
                    raise AssertionError(
                        f"the stream ended: {await self.call.code()} {await self.call.details()}"
                    )

    async def status(self) -> grpc.StatusCode:
        """Read to the end; the status."""
        async with asyncio.timeout(SECONDS):
            try:
                while await self.read() is not None:
                    pass
            except grpc.aio.AioRpcError as error:
                return error.code()
            return await self.call.code()

    async def next_opened(self, lane: int) -> Opened:
        await self.until(lambda: self.opened[lane] or self.faults[lane])
        assert not self.faults[lane], self.faults[lane]
        return self.opened[lane].pop(0)

    async def next_fault(self, lane: int) -> Fault:
        await self.until(lambda: self.faults[lane])
        return self.faults[lane].pop(0)

    async def next_closed(self, lane: int) -> "Closed.Reason.ValueType":
        await self.until(lambda: self.ended[lane])
        return self.ended[lane].pop(0).reason

    async def take(self, lane: int, steps: int) -> list[bytes]:
        """Wait for that many steps on a lane, without a gap; each output's bytes, taken."""
        await self.until(lambda: self.steps(lane) >= steps or self.faults[lane])
        assert not self.faults[lane], self.faults[lane]
        pieces = self.pieces.pop(lane)
        for (first, count, _), (following, _, _) in itertools.pairwise(pieces):
            assert following == first + count
        return [b"".join(parts) for parts in zip(*(cells for *_, cells in pieces), strict=True)]

    async def rows(self, lane: int, steps: int) -> np.ndarray:
        """The same for models with one float32 output: [steps, features]."""
        (data,) = await self.take(lane, steps)
        return np.frombuffer(data, "<f4").reshape(steps, -1)

    def steps(self, lane: int) -> int:
        """How many steps of outputs have come on a lane and were not taken."""
        return sum(steps for _, steps, _ in self.pieces[lane])

    async def settle(self) -> None:
        """Return once everything sent before has had its turn and its answer is here."""
        await self.send(open=[OpenSequence(lane=_SETTLE_LANE)], close=[_SETTLE_LANE])
        assert await self.next_closed(_SETTLE_LANE) == Closed.CLIENT


async def eventually(is_true: Callable[[], object]) -> None:
    """Return once the condition holds."""
    async with asyncio.timeout(SECONDS):
        while not is_true():  # noqa: ASYNC110 — what is waited for has no event to wait on
            await asyncio.sleep(0.001)


def _as_bytes(message: InferRequest | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def floats(values: Iterable[float]) -> np.ndarray:
    """Inputs of the accumulator: [steps, 1]."""
    return np.array(list(values), np.float32).reshape(-1, 1)
