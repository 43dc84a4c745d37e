"""The Infer stream of one model, run in an event loop."""

import asyncio
import contextlib
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from sluice_client.errors import SluiceError
from sluice_client.protocol.calls import Pending
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Signature
from sluice_client.transport import questions
from sluice_client.transport.questions import Question
from sluice_client.transport.retry import Loss
from sluice_client.transport.route import BaseRoute
from sluice_client.transport.stream import BaseStream, Cancellable
from sluice_protos.sequences_pb2 import InferRequest, InferResponse
from sluice_protos.sequences_pb2_grpc import SequencesStub

Result = TypeVar("Result")
Infer = grpc.aio.StreamStreamCall[InferRequest, InferResponse]


class AsyncRoute(BaseRoute[grpc.aio.Channel]):
    """The servers of a client that uses asyncio."""

    async def ask(self, question: Question[Result]) -> Result:
        """The answer of the first server that gives one. Raises its status as SluiceError."""
        for attempts_left in self._attempts():
            try:
                call = question.call(self.channel)
                return question.read(
                    [answer async for answer in call] if question.is_stream else await call
                )
            except grpc.aio.AioRpcError as error:
                self._turn_or_raise(error, question, attempts_left)
        raise AssertionError  # the last attempt has returned or raised


class AsyncStream(BaseStream[AsyncRoute]):
    """All sequences of one model that one AsyncClient has share this."""

    def __init__(
        self, model: str, route: AsyncRoute, reconnect_seconds_max: float, bounds: Bounds
    ) -> None:
        super().__init__(model, route, reconnect_seconds_max, bounds)
        # One event loop uses the connection: there is nothing to lock.
        self.lock = contextlib.nullcontext()
        self._starting: asyncio.Task[None] | None = None
        self._has_work = asyncio.Event()
        self._is_needed = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Learn the contract and run, once. Raises ModelNotFound, Unavailable, ClientClosed."""
        if self._connection is None and self._failure is None:
            if self._starting is None or self._starting.done():
                self._starting = asyncio.create_task(self._start())
            # All waiters continue in the same turn of the loop, so that their opens leave together.
            await asyncio.wait({self._starting})
            if self._failure is None:
                self._starting.result()
        if self._connection is None:
            assert self._failure is not None
            raise self._failure.at(None, None)

    async def _start(self) -> None:
        self._make_connection(await self.route.ask(questions.contract(self._model)))
        self._runner = asyncio.create_task(self._run(), name=f"sluice {self._model}")

    def flush(self) -> None:
        """Send what the connection has to send, with what is added in this turn of the loop."""
        self._has_work.set()
        self._is_needed.set()

    async def wait(self, pending: Pending, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Wait until a request is done. Raises TimeoutError."""
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
        """End the stream, which parks its sequences; who still waits gets `error`."""
        self._failure = error
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
            self.connection.shut_down(error)

    async def _run(self) -> None:
        """Run one stream after another, as long as some sequence needs one."""
        while True:
            await self._is_needed.wait()
            self._is_needed.clear()
            while self.connection.wants_stream:
                try:
                    pause = self._pause_after(await self._serve())
                except Exception as error:
                    self._fail_with(error)
                else:
                    await asyncio.sleep(pause)

    async def _serve(self) -> Loss:
        """Run one stream until it ends. Raises ProtocolViolation."""
        channel, connection = self.route.channel, self.connection
        rows = connection.steps.rows_received
        was_answered = False
        call: Infer | None = None
        writer: asyncio.Task[None] | None = None
        try:
            contract = await questions.contract(self._model).call(channel)
            call = SequencesStub(channel).Infer(None)
            connection.begin(Signature(contract))
            self._has_work.set()
            writer = asyncio.create_task(self._write(call))
            async for response in call:
                was_answered = True
                if (loss := self._receive(response)) is not None:
                    return loss
            code, details = grpc.StatusCode.OK, "the server has ended the stream"
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if writer is not None and writer.done() and task is not None and not task.cancelling():
                writer.result()
            raise
        finally:
            self._lose()
            if call is not None:
                call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        return Loss(code, details, was_answered, connection.steps.rows_received > rows)

    async def _write(self, call: "Infer") -> None:
        """Send messages; while one is being sent, the next one gathers."""
        try:
            while True:
                await self._has_work.wait()
                self._has_work.clear()
                while (request := self.connection.next_request()) is not None:
                    await call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call has ended, and its reader gets the reason
        except Exception:
            # The reader must not wait for answers to a message that will never be sent.
            call.cancel()
            raise

    def _start_timer(self, seconds: float) -> Cancellable:
        return asyncio.get_running_loop().call_later(seconds, self._retry_postponed)


def _resolve(future: "asyncio.Future[Any]") -> None:
    if not future.done():
        future.set_result(None)
