"""Serves one Infer stream: a reader that feeds the host, a writer that empties the outbox."""

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc
import numpy as np

from sluice_protos.sequences_pb2 import InferRequest, Received
from sluice_service.batching.queues import Kind
from sluice_service.errors import RequestError
from sluice_service.models.host import Host
from sluice_service.rpc.native.frames import Chunks, Encoder, parse, read_chunks, read_single
from sluice_service.rpc.native.values import read_open
from sluice_service.rpc.native.wire import decode_single
from sluice_service.runtime.cooperative import rest
from sluice_service.sequences.events import Outputs
from sluice_service.sequences.stream import LANES_MAX

# The lanes or chunks of one message above which they are taken in turns.
_ENTRIES_AT_ONCE = 4096

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Session:
    """One Infer stream: a reader that feeds the host, a writer that empties the outbox."""

    def __init__(
        self, host: Host, context: Context, first: bytes, *, response_bytes_max: int
    ) -> None:
        self._host = host
        self._context = context
        self._first = first
        self._changed = asyncio.Event()
        self._may_read = asyncio.Event()
        self._stream = host.attach(self._notice)
        self._encoder = Encoder(host.inputs, response_bytes_max=response_bytes_max)
        self._responses = 0
        self._is_broken = False  # by a message that cannot be read

    async def serve(self) -> None:
        """Serve until the client sends no more and has all its outputs, or the server drains."""
        reader = asyncio.ensure_future(self._read())
        writer = asyncio.ensure_future(self._write())
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                if reader.exception() is not None:
                    self._break_off()
                # gRPC sends a status only after the messages that it was given.
                await writer
                reader.result()
            writer.result()
        finally:
            for task in (reader, writer):
                task.cancel()
            self._host.detach(self._stream)

    def _break_off(self) -> None:
        """Send nothing more. Waiting outputs are held for another stream."""
        self._is_broken = True
        self._host.detach(self._stream)
        self._changed.set()

    def _notice(self) -> None:
        """Wake reader and writer: the host has changed something of this stream."""
        self._changed.set()
        self._may_read.set()

    async def _read(self) -> None:
        """Take messages until the client ends its side."""
        stream, context = self._stream, self._context
        data, self._first = self._first, b""
        while True:
            await self._take(data)
            del data  # frees the message while the client is silent
            if stream.outbox:
                await asyncio.sleep(0)  # send outputs before reading more
            await self._until_not_ahead()
            if not isinstance(data := await context.read(), bytes):
                break
        stream.is_half_closed = True
        self._changed.set()

    async def _until_not_ahead(self) -> None:
        while self._stream.is_ahead:
            self._may_read.clear()
            await self._may_read.wait()

    async def _take(self, data: bytes) -> None:
        """Apply one message."""
        if not self._take_single(data):
            await self._take_request(parse(data))

    def _take_single(self, data: bytes) -> bool:
        """Apply a message that is one chunk of rows and nothing else; False if it is another."""
        decoded = decode_single(data, self._host.inputs.count)
        if decoded is None:
            return False
        received, single = decoded
        _, steps, _, rows = single
        if not self._host.inputs.fit(rows, steps):
            return False
        if received:
            self._host.acknowledge_responses(self._stream, received)
        self._host.submit_singles(self._stream, [single])
        return True

    async def _take_request(self, request: InferRequest) -> None:
        host, stream = self._host, self._stream
        if request.model and request.model != host.name:
            raise RequestError(
                f"this stream serves model {host.name!r}; open another for {request.model!r}"
            )
        if request.received_responses:
            host.acknowledge_responses(stream, request.received_responses)
        if request.received:
            await self._acknowledge(request.received)
        if request.open:
            await host.open(stream, map(read_open, request.open))
        if request.lane:
            single = read_single(request, host.inputs)
            if single is None:
                self._check_count(len(request.lane))
                await self._submit(read_chunks(request, host.inputs))
            else:
                host.submit_singles(stream, [single])
        elif request.inputs or request.steps or request.first_step:
            raise RequestError(
                "a message has chunks that belong to no lane; `lane` names one for each chunk"
            )
        if request.close:
            await self._end_after(request.close, Kind.CLOSE)
        if request.park:
            await self._end_after(request.park, Kind.PARK)

    def _check_count(self, chunks: int) -> None:
        """Refuse more chunks than any credit allows, before they are read."""
        chunks_max = max(self._host.limits.credit_steps, LANES_MAX)
        if chunks > chunks_max:
            raise RequestError(f"a message of {chunks} chunks; send at most {chunks_max} in one")

    # Long lists are taken in parts. Other work has the event loop between two parts, and the next
    # part waits while the client is beyond its credit. So one large message delays others no more
    # than many small ones.

    async def _acknowledge(self, received: Sequence[Received]) -> None:
        for start in range(0, len(received), _ENTRIES_AT_ONCE):
            await self._until_turn(start)
            part = received[start : start + _ENTRIES_AT_ONCE]
            lanes = np.array([entry.lane for entry in part], np.int64)
            steps = np.array([entry.step for entry in part], np.uint64)
            self._host.acknowledge(self._stream, lanes, steps.astype(np.int64))

    async def _submit(self, chunks: Chunks) -> None:
        for number, part in enumerate(chunks.parts(_ENTRIES_AT_ONCE)):
            await self._until_turn(number)
            self._host.submit(self._stream, part.lanes, part.steps, part.first, part.inputs)

    async def _end_after(self, lanes: Sequence[int], kind: Kind) -> None:
        for start in range(0, len(lanes), _ENTRIES_AT_ONCE):
            await self._until_turn(start)
            part = np.array(lanes[start : start + _ENTRIES_AT_ONCE], np.int64)
            self._host.end_after(self._stream, part, kind)

    async def _until_turn(self, number: int) -> None:
        """Return when part `number` may be taken. Part 0 may be taken at once."""
        if number:
            await rest()
            await self._until_not_ahead()

    async def _write(self) -> None:
        """Send the outbox until the stream has ended."""
        host, stream = self._host, self._stream
        while True:
            while stream.outbox and not self._is_broken:
                await self._write_next()
                self._may_read.set()
            if (
                self._is_broken
                or stream.is_drained
                or (stream.is_half_closed and host.is_finished(stream))
            ):
                return
            self._changed.clear()
            await self._changed.wait()

    async def _write_next(self) -> None:
        """Send the front of the outbox: the outputs of one run, or the events before the next."""
        outbox = self._stream.outbox
        if not isinstance(outbox[0], Outputs):
            self._responses += 1
            await self._context.write(self._encoder.notices(outbox))
            return
        item = self._stream.take_outputs()
        frames = self._encoder.frames(item)
        self._host.note_sent(self._stream, item, self._responses + len(frames))
        for frame in frames:
            self._responses += 1
            await self._context.write(frame)
