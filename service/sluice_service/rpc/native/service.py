"""Serves sluice.v1.Sequences: the Infer stream, and single calls about sequences."""

from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeAlias

import grpc
import structlog

from sluice_protos.sequences_pb2 import (
    CloseSequenceRequest,
    CloseSequenceResponse,
    ForkRequest,
    ForkResponse,
    GetStateRequest,
    ListSequencesRequest,
    SequenceInfo,
    SequenceState,
)
from sluice_service.errors import RequestError
from sluice_service.models.host import Host
from sluice_service.models.registry import find_host
from sluice_service.rpc.native.frames import (
    parse,
)
from sluice_service.rpc.native.session import Session
from sluice_service.rpc.native.values import read_fork, write_info, write_state
from sluice_service.rpc.status import as_status

log = structlog.get_logger()

# The lanes or chunks of one message above which they are taken in turns.
_ENTRIES_AT_ONCE = 4096

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class SequencesService:
    """Answers the calls of sluice.v1.Sequences."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = hosts

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """The handler for a server. Infer gets bytes, so that bad ones get a clear error."""
        return grpc.method_handlers_generic_handler(
            "sluice.v1.Sequences",
            {
                "Infer": grpc.stream_stream_rpc_method_handler(self.infer, None, None),
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

    async def infer(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve one stream until either side ends it."""
        async with as_status(context):
            session = await self._begin(context)
            if session is not None:
                await session.serve()

    async def _begin(self, context: Context) -> "Session | None":
        """The session of a stream, after its first message; None if no message comes."""
        # Read from the context, which costs less than the iterator.
        if not isinstance(data := await context.read(), bytes):
            return None
        first = parse(data)
        if not first.model:
            raise RequestError("the first message of a stream names its model")
        host = find_host(self._hosts, first.model)
        return Session(host, context, data, response_bytes_max=first.response_bytes_max)

    async def get_state(self, request: GetStateRequest, context: Context) -> SequenceState:
        """The state of a live sequence."""
        async with as_status(context):
            host = find_host(self._hosts, request.model)
            return write_state(await host.state(request.sequence_id))
        raise AssertionError

    async def fork(self, request: ForkRequest, context: Context) -> ForkResponse:
        """Copy a live sequence to a new id."""
        async with as_status(context):
            host = find_host(self._hosts, request.model)
            forked = await host.fork(request.sequence_id, read_fork(request))
            return ForkResponse(fork_id=forked.sequence_id, step=forked.step, epoch=forked.epoch)
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
                async for info in find_host(self._hosts, name).all_sequences():
                    yield write_info(info)
