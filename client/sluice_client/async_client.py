"""The client for coroutines."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Self
from uuid import uuid4

import grpc
import grpc.aio
import numpy as np

from sluice_client.async_stream import AsyncRoute, AsyncStream
from sluice_client.calls import Mode, Opening, Request, SequenceState, group_openings
from sluice_client.errors import ClientClosed, SequenceNotFound
from sluice_client.handles import GroupHandle, GroupResult, Handle, SequenceHandle, Step
from sluice_client.reach import CHANNEL_OPTIONS, QUESTION_SECONDS_MAX, read_addresses
from sluice_client.signature import Input, Output
from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import GetStateRequest, ListModelsRequest, ModelInfo
from sluice_protos.sequences_pb2_grpc import ModelsStub, SequencesStub


class AsyncClient:
    """Streams sequences through the models of a Sluice server, from one event loop.

    All sequences of one model share one stream, and the steps that are pending at
    the same time leave as one message. A lost stream is mended without its users
    noticing, for as long as the server still has the sequences.
    """

    def __init__(
        self,
        address: str | Iterable[str] = "127.0.0.1:8001",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        reconnect_seconds_max: float = 60.0,
    ) -> None:
        """Make a client; nothing is sent yet.

        address                `host:port`, any gRPC target such as `dns:///name:port`, or
                               several of them, tried in turn when one does not answer
        credentials            for TLS; None: plain text
        reconnect_seconds_max  how long steps wait for a server to answer again
        """
        self._addresses = read_addresses(address)
        self._credentials = credentials
        self._reconnect_seconds_max = reconnect_seconds_max
        self._channels: list[grpc.aio.Channel] = []
        self._streams: dict[str, AsyncStream] = {}
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let everything go: open sequences are parked, waiting steps get ClientClosed."""
        self._is_closed = True
        error = ClientClosed("the client was closed")
        await asyncio.gather(*(stream.close(error) for stream in self._streams.values()))
        await asyncio.gather(*(channel.close(None) for channel in self._channels))

    async def models(self) -> list[ModelInfo]:
        """The models the server has."""
        answer = await self._route().ask(
            lambda channel: ModelsStub(channel).ListModels(
                ListModelsRequest(), timeout=QUESTION_SECONDS_MAX
            )
        )
        return list(answer.models)

    async def model(self, name: str) -> ModelContract:
        """What a model takes and gives. Raises ModelNotFound."""
        return await self._route().contract(name)

    def sequence(
        self,
        model: str,
        sequence_id: str | None = None,
        *,
        mode: Mode = Mode.START,
        state: SequenceState | None = None,
    ) -> "AsyncSequence":
        """A sequence, opened by `async with`; None: with an id of its own, from `state` if given.

        Opening raises SequenceExists, SequenceNotFound, ModelNotFound, LimitReached,
        WrongModel or Unavailable.
        """
        opening = Opening(sequence_id or uuid4().hex, mode, state)
        return AsyncSequence(self._stream(model), model, opening)

    def group(
        self, model: str, sequence_ids: Iterable[str], *, mode: Mode = Mode.START
    ) -> "AsyncGroup":
        """Sequences that step together, opened by `async with`: all of them or none."""
        openings = group_openings(sequence_ids, mode)
        return AsyncGroup(self._stream(model), openings)

    def _stream(self, model: str) -> AsyncStream:
        stream = self._streams.get(model)
        if stream is None:
            stream = AsyncStream(model, self._route(), self._reconnect_seconds_max)
            self._streams[model] = stream
        return stream

    def _route(self) -> AsyncRoute:
        if self._is_closed:
            raise ClientClosed("the client was closed; make another one")
        if not self._channels:
            self._channels = [self._dial(address) for address in self._addresses]
        return AsyncRoute(self._channels)

    def _dial(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)


class _AsyncHandle(Handle):
    """What an AsyncSequence and an AsyncGroup do alike."""

    _link: AsyncStream

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.close()
        else:
            # Not waited for: the error must not be held up by a server that does not answer.
            self._ask_end(is_parking=True)

    async def open(self) -> None:
        """Open it now; `async with` does."""
        await self._link.meet()
        request = self._ask_open()
        try:
            await self._link.wait(request)
        except asyncio.CancelledError:
            self._let_go()
            raise
        if request.errors:
            # What was opened beside it must be gone before the caller tries again.
            await self._end(self._let_go())
            raise request.errors[min(request.errors)]

    async def close(self) -> None:
        """Drop the state at the server, once all outputs have arrived. May be called again."""
        await self._end(self._ask_end(is_parking=False))

    async def park(self) -> None:
        """Leave the state at the server, once all outputs have arrived: Mode.TAKEOVER goes on."""
        await self._end(self._ask_end(is_parking=True))

    async def _end(self, request: Request | None) -> None:
        if request is not None:
            await self._link.wait(request)
            for error in request.errors.values():
                raise error

    async def _take(self, x: Input, timeout: float | None) -> Step:  # noqa: ASYNC109
        step = self._give(x)
        assert step is not None  # it follows nothing
        try:
            await self._link.wait(step.call, timeout)
        except TimeoutError:
            raise self._timed_out(step, timeout) from None
        except asyncio.CancelledError:
            self._leave(step)
            raise
        return step

    async def _settle(self, timeout: float | None) -> list[Step]:  # noqa: ASYNC109
        """The steps nobody has taken: up to the first that failed, or that one alone."""
        settled: list[Step] = []
        while self._unsettled:
            step = self._unsettled[0]
            await self._link.wait(step.call, timeout)
            if settled and step.call.errors:
                break
            settled.append(self._unsettled.pop(0))
        return settled


class AsyncSequence(_AsyncHandle, SequenceHandle):
    """One sequence: its steps are applied in the order in which they are given, each once."""

    def __init__(self, link: AsyncStream, model: str, opening: Opening) -> None:
        super().__init__(link, opening)
        self._model = model

    async def step(self, x: Input, *, timeout: float | None = None) -> Output:  # noqa: ASYNC109
        """Apply one step, or a chunk of steps, and return its output.

        x  [features] to [outputs], or [steps, features] to [steps, outputs]: the
           shapes of one step are the contract's; a dict by name where the model has
           several inputs

        Raises InvalidInput, RunFailed or NonFinite with the state as before the step
        that failed; SequenceError when the sequence has gone. When it is cancelled, or
        after `timeout` seconds (StepTimedOut), the step may have been applied: the
        next step raises StepUnsettled until `settle` was called.
        """
        return self._result(await self._take(x, timeout))

    async def settle(self, *, timeout: float | None = None) -> list[Output]:  # noqa: ASYNC109
        """Wait for the steps that were cancelled or timed out; return their outputs in order.

        A step that failed raises its error here, after the outputs before it were
        returned by a call of their own.
        """
        return [self._result(step) for step in await self._settle(timeout)]

    async def stream(
        self, inputs: Iterable[Input] | AsyncIterable[Input], *, ahead: int = 256
    ) -> AsyncIterator[Output]:
        """The output of each input, in order, with up to `ahead` inputs under way at once.

        An output comes as soon as it is there, also while `inputs` has nothing new.
        The first failed step raises; what was given behind it was not applied. Leaving
        early leaves what was under way to `settle`.
        """
        steps: asyncio.Queue[Step | None] = asyncio.Queue()
        room = asyncio.Semaphore(ahead)
        feeder = asyncio.create_task(self._feed(inputs, steps, room))
        try:
            while (step := await steps.get()) is not None:
                try:
                    await self._link.wait(step.call)
                except asyncio.CancelledError:
                    self._leave(step)
                    raise
                room.release()
                yield self._result(step)
            await feeder
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            rest: deque[Step] = deque()
            while not steps.empty():
                if (step := steps.get_nowait()) is not None and not step.call.errors:
                    rest.append(step)
            self._unsettled += rest

    async def _feed(
        self,
        inputs: Iterable[Input] | AsyncIterable[Input],
        steps: "asyncio.Queue[Step | None]",
        room: asyncio.Semaphore,
    ) -> None:
        step: Step | None = None
        try:
            async with aclosing(_each(inputs)) as source:
                async for x in source:
                    await room.acquire()
                    step = self._give(x, step.call if step else None)
                    if step is None:
                        return
                    steps.put_nowait(step)
        finally:
            steps.put_nowait(None)

    async def state(self) -> SequenceState:
        """The state after the last applied step, as a value that can start another sequence."""
        request = GetStateRequest(model=self._model, sequence_id=self.sequence_id)
        answer = await self._link.route.ask(
            lambda channel: SequencesStub(channel).GetState(request, timeout=QUESTION_SECONDS_MAX),
            not_found=SequenceNotFound,
            sequence_id=self.sequence_id,
        )
        row = np.frombuffer(answer.row, "<f4").astype(np.float32)
        return SequenceState(answer.model_digest, answer.step, row)


class AsyncGroup(_AsyncHandle, GroupHandle):
    """Sequences whose steps come as the rows of one array and leave as one message."""

    async def step(
        self,
        x: Input,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> GroupResult:
        """Apply one step, or a chunk of as many steps, of every sequence.

        x  [sequences, features], or [sequences, steps, features]

        A row that fails is not ok in the result, the others are as if it were not
        there; the next call goes on from where each row stands. Raises InvalidInput
        for what is wrong with the whole array. Cancelling is as for one sequence.
        """
        return self._result(await self._take(x, timeout))

    async def settle(self, *, timeout: float | None = None) -> list[GroupResult]:  # noqa: ASYNC109
        """Wait for the steps that were cancelled or timed out; return their results in order."""
        return [self._result(step) for step in await self._settle(timeout)]


async def _each(inputs: Iterable[Input] | AsyncIterable[Input]) -> AsyncGenerator[Input, None]:
    if isinstance(inputs, AsyncIterable):
        async for x in inputs:
            yield x
    else:
        for x in inputs:
            yield x
