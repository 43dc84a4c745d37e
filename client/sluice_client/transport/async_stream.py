"""Keeps the Infer stream of one model alive in an event loop, and asks its server questions."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from sluice_client.errors import (
    ModelNotFound,
    ProtocolViolation,
    SluiceError,
    from_status,
)
from sluice_client.protocol.calls import Pending
from sluice_client.protocol.connection import Connection
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Signature
from sluice_client.transport.retry import QUESTION_SECONDS_MAX, RESPONSE_BYTES_MAX, Loss, Patience
from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import GetModelRequest, InferRequest, InferResponse
from sluice_protos.sequences_pb2_grpc import ModelsStub, SequencesStub

log = logging.getLogger(__name__)

T = TypeVar("T")
Infer = grpc.aio.StreamStreamCall[InferRequest, InferResponse]


class AsyncRoute:
    """The channels to a client's servers; the present one is kept while it answers."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self._channels = channels
        self._present = 0

    @property
    def servers(self) -> int:
        """How many there are to turn to."""
        return len(self._channels)

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel to the present server."""
        return self._channels[self._present]

    def turn(self) -> None:
        """Go on with the next server."""
        self._present = (self._present + 1) % len(self._channels)

    async def ask(
        self,
        question: Callable[[grpc.aio.Channel], Awaitable[T]],
        *,
        not_found: type[SluiceError] = ModelNotFound,
        sequence_id: str | None = None,
    ) -> T:
        """The answer of the first server that gives one. Raises its status as SluiceError.

        Each is asked twice: a question changes nothing, and a connection may have broken.
        """
        for attempts_left in reversed(range(2 * len(self._channels))):
            try:
                return await question(self.channel)
            except grpc.aio.AioRpcError as error:
                if not attempts_left or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise from_status(
                        error.code().name,
                        error.details() or "",
                        sequence_id=sequence_id,
                        not_found=not_found,
                    ) from None
                self.turn()
        raise AssertionError  # the last attempt has returned or raised

    async def contract(self, model: str) -> ModelContract:
        """What a model takes and gives. Raises ModelNotFound."""
        request = GetModelRequest(name=model)
        return await self.ask(
            lambda channel: ModelsStub(channel).GetModel(request, timeout=QUESTION_SECONDS_MAX)
        )


class AsyncStream:
    """All sequences of one model that one AsyncClient has share this."""

    def __init__(
        self,
        model: str,
        route: AsyncRoute,
        reconnect_seconds_max: float,
        bounds: Bounds | None = None,
    ) -> None:
        self.lock = contextlib.nullcontext()
        self.route = route
        self._model = model
        self._bounds = bounds
        self._patience = Patience(reconnect_seconds_max, route.servers)
        # With a server whose store does not answer, while it serves others.
        self._store_patience = Patience(reconnect_seconds_max)
        self._retry: asyncio.TimerHandle | None = None
        self._connection: Connection | None = None
        self._meeting: asyncio.Task[None] | None = None
        self._has_work = asyncio.Event()
        self._is_needed = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        # Why nobody is met any more.
        self._failure: SluiceError | None = None

    @property
    def connection(self) -> Connection:
        """The stream's logic, after `meet`."""
        assert self._connection is not None
        return self._connection

    async def meet(self) -> Connection:
        """Learn the model's contract, once. Raises ModelNotFound, Unavailable, ClientClosed."""
        if self._connection is None and self._failure is None:
            if self._meeting is None or self._meeting.done():
                self._meeting = asyncio.create_task(self._meet())
            # All who wait go on in the same turn of the loop, so that their opens leave together.
            await asyncio.wait({self._meeting})
            if self._failure is None:
                self._meeting.result()
        if self._connection is None:
            assert self._failure is not None
            raise self._failure.at(None, None)
        return self._connection

    async def _meet(self) -> None:
        signature = Signature(await self.route.contract(self._model))
        self._connection = Connection(
            self._model,
            signature,
            bounds=self._bounds,
            response_bytes_max=RESPONSE_BYTES_MAX,
        )
        self._runner = asyncio.create_task(self._run(), name=f"sluice {self._model}")

    def flush(self) -> None:
        """Have what was asked sent, together with what else is asked in this turn of the loop."""
        self._has_work.set()
        self._is_needed.set()

    async def wait(self, pending: Pending, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Wait until something asked is done. Raises TimeoutError."""
        if pending.is_done:
            return
        future = asyncio.get_running_loop().create_future()
        pending.wake = partial(_resolve, future)
        if timeout is None:
            await future
        else:
            async with asyncio.timeout(timeout):
                await future

    async def close(self, error: SluiceError) -> None:
        """End the stream; sequences on it are parked by that. Who still waits gets `error`."""
        self._failure = error
        if self._meeting is not None:
            self._meeting.cancel()
            await asyncio.gather(self._meeting, return_exceptions=True)
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
            self.connection.shut(error)

    async def _run(self) -> None:
        """One stream after another, for as long as somebody needs one."""
        loop = asyncio.get_running_loop()
        while True:
            await self._is_needed.wait()
            self._is_needed.clear()
            while self.connection.wants_stream:
                try:
                    loss = await self._serve()
                except ProtocolViolation as violation:
                    self.connection.fail(violation)
                    continue
                except Exception as error:
                    # A defect in here must not leave its callers waiting for ever.
                    log.exception("the client has failed")
                    self.connection.fail(SluiceError(f"the client has failed: {error!r}"))
                    continue
                if not self.connection.wants_stream:
                    break
                if loss.asks_for_another:
                    self.route.turn()
                verdict = self._patience.after(loss, loop.time())
                if isinstance(verdict, SluiceError):
                    self.connection.fail(verdict)
                else:
                    await asyncio.sleep(verdict)

    async def _serve(self) -> Loss:
        """One stream from its begin to its end. Raises ProtocolViolation."""
        channel, connection = self.route.channel, self.connection
        rows = connection.ledger.rows_received
        was_answered = False
        call: Infer | None = None
        writer: asyncio.Task[None] | None = None
        try:
            contract = await ModelsStub(channel).GetModel(
                GetModelRequest(name=self._model), timeout=QUESTION_SECONDS_MAX
            )
            call = SequencesStub(channel).Infer(None)
            connection.begin(Signature(contract))
            self._has_work.set()
            writer = asyncio.create_task(self._write(call))
            async for response in call:
                was_answered = True
                connection.receive(response)
                if connection.is_spent:
                    return Loss(
                        grpc.StatusCode.UNAVAILABLE,
                        connection.refusal,
                        was_answered=connection.has_opened,
                        is_refused=True,
                    )
                if connection.has_postponed:
                    self._wait_for_store()
                if connection.has_something_to_send:
                    self._has_work.set()
            code, details = grpc.StatusCode.OK, "the server has ended the stream"
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if writer is not None and writer.done() and task is not None and not task.cancelling():
                writer.result()
            raise
        finally:
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            connection.lose()
            if call is not None:
                call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        return Loss(code, details, was_answered, connection.ledger.rows_received > rows)

    def _wait_for_store(self) -> None:
        """Ask again after a pause for what waits for the store; the stream serves others."""
        if self._retry is not None:
            return
        if self.connection.has_recovered:
            self.connection.has_recovered = False
            self._store_patience.rest()
        loop = asyncio.get_running_loop()
        loss = Loss(grpc.StatusCode.UNAVAILABLE, self.connection.refusal)
        verdict = self._store_patience.after(loss, loop.time())
        if isinstance(verdict, SluiceError):
            self.connection.give_up(verdict)
        else:
            self._retry = loop.call_later(verdict, self._ask_again)

    def _ask_again(self) -> None:
        self._retry = None
        self.connection.retry()
        self._has_work.set()

    async def _write(self, call: "Infer") -> None:
        """Send what there is; while one message is being taken, the next one gathers."""
        try:
            while True:
                await self._has_work.wait()
                self._has_work.clear()
                while (request := self.connection.next_request()) is not None:
                    await call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call has ended, and whoever reads is told why
        except Exception:
            # Whoever reads must not wait for answers to what will never be sent.
            call.cancel()
            raise


def _resolve(future: "asyncio.Future[Any]") -> None:
    if not future.done():
        future.set_result(None)
