"""Sequences without handles, for load generators: lanes by number, a callback for each call."""

from collections.abc import Callable, Iterable
from functools import partial

import grpc.aio
import numpy as np

from sluice_client.errors import ClientClosed
from sluice_client.protocol.calls import Call
from sluice_client.protocol.openings import Opening
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Array, Field, Signature
from sluice_client.protocol.tables import Numbers
from sluice_client.transport import questions
from sluice_client.transport.async_stream import AsyncRoute, AsyncStream
from sluice_client.transport.channel import CHANNEL_OPTIONS
from sluice_protos.contract_pb2 import ModelContract

__all__ = ["Call", "Field", "LoadStream", "Signature"]


class LoadStream:
    """One stream to one server, over a channel of its own, for any number of sequences.

    A coroutine for each sequence would cost more than the server that is measured.
    """

    def __init__(self, address: str, model: str, reconnect_seconds_max: float) -> None:
        self._model = model
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        route = AsyncRoute([self._channel])
        self._stream = AsyncStream(model, route, reconnect_seconds_max, Bounds())

    @property
    def signature(self) -> Signature:
        """The inputs and outputs of the model, after `start`."""
        return self._stream.connection.signature

    async def contract(self) -> ModelContract:
        """The contract of the model. Raises ModelNotFound."""
        return await self._stream.route.ask(questions.contract(self._model))

    async def start(self) -> None:
        """Start the stream. Raises ModelNotFound, Unavailable."""
        await self._stream.start()

    async def open(self, sequence_ids: Iterable[str]) -> Numbers:
        """Start new sequences; their lanes. Raises the first error."""
        request = self._stream.connection.open([Opening(name) for name in sequence_ids])
        self._stream.flush()
        await self._stream.wait(request)
        request.check()
        return request.lanes

    def submit(
        self, lanes: Numbers, steps: int, inputs: list[Array], on_done: Callable[[Call], None]
    ) -> Call:
        """Send each of `lanes` a chunk of `steps` steps: [lanes], [lanes × steps, …] each.

        `on_done` is called when all outputs have arrived, while a message is processed.
        """
        call = self._stream.connection.submit(lanes, np.full(len(lanes), steps), inputs)
        call.wake = partial(on_done, call)
        self._stream.flush()
        return call

    async def drop(self, lanes: Numbers, timeout: float) -> None:  # noqa: ASYNC109
        """Close sequences. Raises TimeoutError."""
        request = self._stream.connection.close(lanes)
        self._stream.flush()
        await self._stream.wait(request, timeout)

    async def close(self) -> None:
        """End the stream, which parks its sequences, and close the channel."""
        await self._stream.close(ClientClosed("the load has ended"))
        await self._channel.close(None)
