"""The service sluice.v1.Sequences: the Infer stream, and single questions about sequences."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeAlias

import grpc
import numpy as np
import structlog

from sluice_protos.sequences_pb2 import (
    CloseSequenceRequest,
    CloseSequenceResponse,
    ForkRequest,
    ForkResponse,
    GetStateRequest,
    InferRequest,
    InferResponse,
    ListSequencesRequest,
    SequenceInfo,
    SequenceState,
)
from sluice_service.errors import ModelNotFoundError, RequestError
from sluice_service.host import Host
from sluice_service.queues import Kind
from sluice_service.rpc.frames import Chunks, Encoder, parse
from sluice_service.rpc.status import as_status
from sluice_service.streams import Delivery

log = structlog.get_logger()

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# A write that takes longer waits for a client that does not read.
_WRITE_SECONDS = 0.005


def find_host(hosts: Mapping[str, Host], name: str) -> Host:
    """The host of that model. Raises ModelNotFoundError, which names those there are."""
    host = hosts.get(name)
    if host is None:
        raise ModelNotFoundError(
            f"no model {name!r} is served here; there are: {', '.join(sorted(hosts)) or 'none'}"
        )
    return host


class SequencesService:
    """Answers the calls of sluice.v1.Sequences."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = hosts

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """What a server registers. Infer is handed bytes, so that bad ones get a clear answer."""
        return grpc.method_handlers_generic_handler(
            "sluice.v1.Sequences",
            {
                "Infer": grpc.stream_stream_rpc_method_handler(
                    self.infer, None, InferResponse.SerializeToString
                ),
                "GetState": grpc.unary_unary_rpc_method_handler(
                    self.get_state,
                    GetStateRequest.FromString,
                    SequenceState.SerializeToString,
                ),
                "Fork": grpc.unary_unary_rpc_method_handler(
                    self.fork,
                    ForkRequest.FromString,
                    ForkResponse.SerializeToString,
                ),
                "CloseSequence": grpc.unary_unary_rpc_method_handler(
                    self.close_sequence,
                    CloseSequenceRequest.FromString,
                    CloseSequenceResponse.SerializeToString,
                ),
                "ListSequences": grpc.unary_stream_rpc_method_handler(
                    self.list_sequences,
                    ListSequencesRequest.FromString,
                    SequenceInfo.SerializeToString,
                ),
            },
        )

    async def infer(self, messages: AsyncIterator[bytes], context: Context) -> None:
        """Serve one stream until either side ends it."""
        async with as_status(context):
            async for data in messages:
                first = parse(data)
                if not first.model:
                    raise RequestError("the first message of a stream names its model")
                host = find_host(self._hosts, first.model)
                await _Session(host, context, first).serve(first, messages)
                return

    async def get_state(self, request: GetStateRequest, context: Context) -> SequenceState:
        """The state of a live sequence."""
        async with as_status(context):
            return await find_host(self._hosts, request.model).listing.state(request.sequence_id)
        raise AssertionError

    async def fork(self, request: ForkRequest, context: Context) -> ForkResponse:
        """Copy a live sequence to a new id."""
        async with as_status(context):
            return await find_host(self._hosts, request.model).fork(request)
        raise AssertionError

    async def close_sequence(
        self, request: CloseSequenceRequest, context: Context
    ) -> CloseSequenceResponse:
        """Drop a live sequence."""
        async with as_status(context):
            host = find_host(self._hosts, request.model)
            return CloseSequenceResponse(step=await host.close_sequence(request.sequence_id))
        raise AssertionError

    async def list_sequences(
        self, request: ListSequencesRequest, context: Context
    ) -> AsyncIterator[SequenceInfo]:
        """Every live sequence of one model, or of all."""
        async with as_status(context):
            names = [request.model] if request.model else sorted(self._hosts)
            for name in names:
                async for info in find_host(self._hosts, name).listing.all():
                    yield info


class _Session:
    """One Infer stream: a reader that feeds the host, a writer that empties the outbox."""

    def __init__(self, host: Host, context: Context, first: InferRequest) -> None:
        self._host = host
        self._context = context
        self._changed = asyncio.Event()
        self._stream = host.attach(self._changed.set)
        self._encoder = Encoder(host.inputs, response_bytes_max=first.response_bytes_max)
        self._may_read = asyncio.Event()
        self._responses = 0
        self._is_writing = False
        # Done once the client sends no more, or with what went wrong.
        self._is_read: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers: list[asyncio.Task[None]] = []

    async def serve(self, first: InferRequest, messages: AsyncIterator[bytes]) -> None:
        """Until the client sends no more and has all its outputs, or the server drains."""
        self._start_reader(messages, first)
        writer = asyncio.ensure_future(self._write())
        try:
            await asyncio.wait((self._is_read, writer), return_when=asyncio.FIRST_COMPLETED)
            if self._is_read.done():
                self._is_read.result()
                await writer
            writer.result()
        finally:
            for task in (*self._readers, writer):
                task.cancel()
            self._host.detach(self._stream)

    def _start_reader(
        self, messages: AsyncIterator[bytes], first: InferRequest | None = None
    ) -> None:
        self._readers.append(asyncio.ensure_future(self._read(messages, first)))

    async def _read(self, messages: AsyncIterator[bytes], first: InferRequest | None) -> None:
        """Take what the client sends, until it ends or another reader goes on."""
        try:
            if first is not None:
                await self._take(first)
            async for data in messages:
                await self._take(parse(data))
                if self._stream.outbox and not self._is_writing and await self._answer(messages):
                    return
                if self._stream.is_ahead:
                    self._may_read.clear()
                    await self._may_read.wait()
        except Exception as error:
            if not self._is_read.done():
                self._is_read.set_exception(error)
            return
        self._stream.is_half_closed = True
        self._changed.set()
        if not self._is_read.done():
            self._is_read.set_result(None)

    async def _answer(self, messages: AsyncIterator[bytes]) -> bool:
        """Send what came of a message at once, without a task switch; True if another reads on.

        A client that sends all before it reads would hold this up for good, and its
        acknowledgements with it; so another reader takes over.
        """
        readers = len(self._readers)
        timer = asyncio.get_running_loop().call_later(_WRITE_SECONDS, self._start_reader, messages)
        try:
            await self._empty_outbox()
        finally:
            timer.cancel()
        is_replaced = len(self._readers) > readers
        if is_replaced:
            self._readers.pop(readers - 1)
        if is_replaced or self._stream.is_drained:
            self._changed.set()
        return is_replaced

    async def _take(self, request: InferRequest) -> None:
        """Apply one request: acknowledgements, opens, chunks, then close and park."""
        host, stream = self._host, self._stream
        if request.model and request.model != host.name:
            raise RequestError(
                f"this stream serves model {host.name!r}; open another for {request.model!r}"
            )
        if request.received_responses:
            host.acknowledge_responses(stream, request.received_responses)
        if request.received:
            lanes = np.array([entry.lane for entry in request.received], np.int64)
            steps = np.array([entry.step for entry in request.received], np.uint64)
            host.acknowledge(stream, lanes, steps.astype(np.int64))
        if request.open:
            await host.open(stream, request.open)
        if request.lane:
            chunks = Chunks(request, host.inputs)
            host.submit(stream, chunks.lanes, chunks.steps, chunks.first, chunks.inputs)
        elif request.inputs or request.steps or request.first_step:
            raise RequestError(
                "a message has chunks that belong to no lane; `lane` names one for each chunk"
            )
        if request.close:
            host.end_after(stream, request.close, Kind.CLOSE)
        if request.park:
            host.end_after(stream, request.park, Kind.PARK)

    async def _write(self) -> None:
        host, stream = self._host, self._stream
        while True:
            await self._empty_outbox()
            if not stream.is_ahead:
                self._may_read.set()
            # Whatever the reader is sending must be out before the stream ends.
            if not self._is_writing and (
                stream.is_drained or (stream.is_half_closed and host.is_finished(stream))
            ):
                return
            self._changed.clear()
            await self._changed.wait()

    async def _empty_outbox(self) -> None:
        """Send what waits; whoever comes meanwhile leaves it to the one who is at it."""
        if self._is_writing:
            return
        self._is_writing = True
        try:
            while self._stream.outbox:
                await self._write_next()
        finally:
            self._is_writing = False

    async def _write_next(self) -> None:
        """Send the oldest of the outbox: one delivery, or the notices before the next one."""
        outbox, lanes = self._stream.outbox, self._host.lanes
        if not isinstance(outbox[0], Delivery):
            self._responses += 1
            await self._context.write(self._encoder.notices(outbox))
            return
        item = self._stream.take_delivery()
        frames = list(self._encoder.frames(item))
        lanes.sending(self._stream, item, self._responses + len(frames))
        for frame in frames:
            self._responses += 1
            await self._context.write(frame)
