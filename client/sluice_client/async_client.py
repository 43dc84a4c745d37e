"""The client for coroutines."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing, suppress
from typing import Self

import grpc.aio

from sluice_client.arguments import check_count
from sluice_client.errors import SequenceNotFound
from sluice_client.faces import BaseClient
from sluice_client.handles import (
    REWOUND_ATTEMPTS_MAX,
    REWOUND_PAUSE_SECONDS,
    BaseGroup,
    BaseHandle,
    BaseSequence,
    GroupResult,
)
from sluice_client.protocol.calls import Call, LaneRequest
from sluice_client.protocol.openings import Opening, SequenceState, ticket_opening
from sluice_client.protocol.signature import Input, Output
from sluice_client.protocol.tickets import Durability
from sluice_client.transport import questions
from sluice_client.transport.async_stream import AsyncRoute, AsyncStream
from sluice_client.transport.channel import CHANNEL_OPTIONS
from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import ModelInfo, SequenceInfo


class AsyncClient(BaseClient[grpc.aio.Channel, AsyncStream, "AsyncSequence", "AsyncGroup"]):
    """Streams sequences through the models of a Sluice server, from one event loop.

    All sequences of one model share one stream, and the steps that are pending at
    the same time leave as one message. A lost stream is replaced without its users
    noticing, as long as the server still has the sequences.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all streams: open sequences are parked, waiting steps get ClientClosed."""
        error = self._mark_closed()
        await asyncio.gather(*(stream.close(error) for stream in self._streams.values()))
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    async def models(self) -> list[ModelInfo]:
        """The models of the server."""
        return await self._route().ask(questions.models())

    async def model(self, name: str) -> ModelContract:
        """The inputs and outputs of a model. Raises ModelNotFound."""
        return await self._route().ask(questions.contract(name))

    async def sequences(self, model: str | None = None) -> list[SequenceInfo]:
        """The live sequences of one model, or of all. Raises ModelNotFound."""
        return await self._route().ask(questions.sequences(model))

    async def state(self, model: str, sequence_id: str) -> SequenceState:
        """The state of a live sequence, whoever has it. Raises SequenceNotFound."""
        return await self._route().ask(questions.state(model, sequence_id))

    async def close_sequence(self, model: str, sequence_id: str) -> int:
        """Drop a live sequence, whoever has it; how many steps it had. Raises SequenceNotFound."""
        return await self._route().ask(questions.close_sequence(model, sequence_id))

    async def fork(
        self,
        model: str,
        sequence_id: str,
        fork_id: str | None = None,
        *,
        durability: Durability | None = None,
    ) -> "AsyncSequence":
        """A copy of a live sequence, whoever has it, that continues from the same state.

        The copy exists when this returns, and is opened by `async with`. Raises
        SequenceNotFound, or SequenceExists if `fork_id` is in use.
        """
        ticket = await self._route().ask(questions.fork(model, sequence_id, fork_id, durability))
        return self._make_sequence(model, ticket_opening(ticket))

    def _route(self) -> AsyncRoute:
        return AsyncRoute(self._open_channels())

    def _make_channel(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)

    def _make_stream(self, model: str) -> AsyncStream:
        return AsyncStream(model, self._route(), self._reconnect_seconds_max, self._bounds)

    def _make_sequence(self, model: str, opening: Opening) -> "AsyncSequence":
        return AsyncSequence(self, self._stream(model), model, opening)

    def _make_group(self, model: str, openings: list[Opening]) -> "AsyncGroup":
        return AsyncGroup(self._stream(model), openings)


class _AsyncHandle(BaseHandle):
    """What a Sequence and a Group share."""

    _stream: AsyncStream

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await self.close()
        else:
            # Do not wait: a server that does not answer must not delay the error.
            self._request_end(is_parking=True)

    async def open(self) -> None:
        """Open it now; `async with` does."""
        await self._stream.start()
        request = self._request_open()
        try:
            await self._stream.wait(request)
        except asyncio.CancelledError:
            self._request_undo_open()
            raise
        if request.errors:
            # Undo the rest of a group before the caller tries again.
            await self._finish(self._request_undo_open())
            request.check()
        self._note_opened(request)

    async def close(self) -> None:
        """Drop the state at the server, once all outputs have arrived. May be called again."""
        await self._finish(self._request_end(is_parking=False))

    async def park(self) -> None:
        """Leave the state at the server, for Mode.TAKEOVER, once all outputs have arrived."""
        await self._finish(self._request_end(is_parking=True))

    async def _finish(self, request: LaneRequest | None) -> None:
        if request is not None:
            await self._stream.wait(request)
            request.check()

    async def _step(self, x: Input, timeout: float | None) -> Call:  # noqa: ASYNC109
        call = self._submit(x)
        assert call is not None  # it follows no other
        try:
            await self._stream.wait(call, timeout)
        except TimeoutError:
            raise self._timed_out(call, timeout) from None
        except asyncio.CancelledError:
            self._unsettled.append(call)
            raise
        return call

    async def _settle(self, timeout: float | None) -> list[Call]:  # noqa: ASYNC109
        """The unsettled steps: those before the first that failed, or else that one alone."""
        settled: list[Call] = []
        while self._unsettled:
            call = self._unsettled[0]
            await self._stream.wait(call, timeout)
            if settled and call.errors:
                break
            settled.append(self._unsettled.pop(0))
        return settled


class AsyncSequence(_AsyncHandle, BaseSequence):
    """One sequence: its steps are applied in the order in which they are given, each once."""

    def __init__(
        self, client: AsyncClient, stream: AsyncStream, model: str, opening: Opening
    ) -> None:
        super().__init__(stream, model, opening)
        self._client = client

    async def step(self, x: Input, *, timeout: float | None = None) -> Output:  # noqa: ASYNC109
        """Apply one step, or a chunk of steps, and return its output.

        x  [features] to [outputs], or [steps, features] to [steps, outputs]: the
           shapes of one step are the contract's; a dict by name for several inputs

        Raises InvalidInput, RunFailed or NonFinite with the state as before the step
        that failed; SequenceError when the sequence has gone. When it is cancelled,
        or after `timeout` seconds (StepTimedOut), the step may have been applied: the
        next step raises StepUnsettled until `settle` was called.
        """
        return self._result(await self._step(x, timeout))

    async def settle(self, *, timeout: float | None = None) -> list[Output]:  # noqa: ASYNC109
        """Wait for the steps that were cancelled or timed out; return their outputs in order.

        If a step failed, the outputs before it are returned first, and the next call
        raises its error.
        """
        return [self._result(call) for call in await self._settle(timeout)]

    async def stream(
        self, inputs: Iterable[Input] | AsyncIterable[Input], *, ahead: int = 256
    ) -> AsyncIterator[Output]:
        """The output of each input, in order, with up to `ahead` inputs under way at once.

        Each output is returned as soon as it arrives, also while `inputs` has to wait.
        The first failed step raises, and later inputs were not applied. After leaving
        early, `settle` returns the outputs of what was under way.
        """
        check_count("ahead", ahead, least=1)
        calls: asyncio.Queue[Call | None] = asyncio.Queue()
        room = asyncio.Semaphore(ahead)
        feeder = asyncio.create_task(self._feed(inputs, calls, room))
        try:
            while (call := await calls.get()) is not None:
                try:
                    await self._stream.wait(call)
                except asyncio.CancelledError:
                    self._unsettled.append(call)
                    raise
                room.release()
                yield self._result(call)
            await feeder
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            while not calls.empty():
                if (call := calls.get_nowait()) is not None and not call.errors:
                    self._unsettled.append(call)

    async def _feed(
        self,
        inputs: Iterable[Input] | AsyncIterable[Input],
        calls: "asyncio.Queue[Call | None]",
        room: asyncio.Semaphore,
    ) -> None:
        call: Call | None = None
        try:
            async with aclosing(_each(inputs)) as source:
                async for x in source:
                    await room.acquire()
                    call = self._submit(x, call)
                    if call is None:
                        return
                    calls.put_nowait(call)
        finally:
            calls.put_nowait(None)

    async def state(self) -> SequenceState:
        """The state after all steps given so far, as a value that can start another sequence."""
        for _ in range(REWOUND_ATTEMPTS_MAX):
            await self._finish(self._request_idle())
            with suppress(SequenceNotFound):
                state = await self._client.state(self._model, self.sequence_id)
                if state.step >= self.step_count:
                    return state
            await asyncio.sleep(REWOUND_PAUSE_SECONDS)
        raise self._rewound_error()

    async def fork(
        self, fork_id: str | None = None, *, durability: Durability | None = None
    ) -> "AsyncSequence":
        """A copy that continues from the state after all steps given so far.

        fork_id  None: a random id

        The copy exists when this returns, and is opened by `async with`. Raises
        SequenceExists if the id is in use.
        """
        for _ in range(REWOUND_ATTEMPTS_MAX):
            await self._finish(self._request_idle())
            with suppress(SequenceNotFound):
                fork = await self._client.fork(
                    self._model, self.sequence_id, fork_id, durability=durability
                )
                if fork._started_at >= self.step_count:
                    return fork
                await self._client.close_sequence(self._model, fork.sequence_id)
            await asyncio.sleep(REWOUND_PAUSE_SECONDS)
        raise self._rewound_error()


class AsyncGroup(_AsyncHandle, BaseGroup):
    """Sequences whose steps are the rows of one array, sent as one message."""

    async def step(
        self,
        x: Input,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> GroupResult:
        """Apply one step, or a chunk of as many steps, of every sequence.

        x  [sequences, features], or [sequences, steps, features]

        A row that fails is not ok in the result and does not affect the others; the
        next step of each row follows its last applied one. Raises InvalidInput for
        what is wrong with the whole array. Cancelling is as for one sequence.
        """
        return self._result(await self._step(x, timeout))

    async def settle(self, *, timeout: float | None = None) -> list[GroupResult]:  # noqa: ASYNC109
        """Wait for the steps that were cancelled or timed out; return their results in order."""
        return [self._result(call) for call in await self._settle(timeout)]


async def _each(inputs: Iterable[Input] | AsyncIterable[Input]) -> AsyncGenerator[Input, None]:
    if isinstance(inputs, AsyncIterable):
        async for x in inputs:
            yield x
    else:
        for x in inputs:
            yield x
