"""The Infer stream of one model, run by threads.

Uses the blocking gRPC API instead of an event loop of its own: two event loops with
grpc.aio in one process disturb each other.
"""

import threading
from collections.abc import Iterator
from typing import TypeVar, cast

import grpc

from sluice_client.errors import SluiceError
from sluice_client.protocol.calls import Pending
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Signature
from sluice_client.transport import questions
from sluice_client.transport.questions import Question
from sluice_client.transport.retry import Loss
from sluice_client.transport.route import BaseRoute
from sluice_client.transport.stream import BaseStream, Cancellable
from sluice_protos.sequences_pb2 import InferRequest
from sluice_protos.sequences_pb2_grpc import SequencesStub

Result = TypeVar("Result")


class Route(BaseRoute[grpc.Channel]):
    """The servers of a client that uses threads."""

    def ask(self, question: Question[Result]) -> Result:
        """The answer of the first server that gives one. Raises its status as SluiceError."""
        for attempts_left in self._attempts():
            try:
                answer = question.call(self.channel)
                return question.read(list(answer) if question.is_stream else answer)
            except grpc.RpcError as error:
                self._turn_or_raise(error, question, attempts_left)
        raise AssertionError  # the last attempt has returned or raised


class ThreadStream(BaseStream[Route]):
    """All sequences of one model that one Client has share this."""

    def __init__(
        self, model: str, route: Route, reconnect_seconds_max: float, bounds: Bounds
    ) -> None:
        super().__init__(model, route, reconnect_seconds_max, bounds)
        # Notified of every change that could give something to send.
        self.lock = self._changed = threading.Condition()
        self._starting = threading.Lock()
        self._is_closed = threading.Event()
        self._call: Cancellable | None = None
        self._runner = threading.Thread(target=self._run, name=f"sluice {model}", daemon=True)

    def start(self) -> None:
        """Learn the contract and run, once. Raises ModelNotFound, Unavailable, ClientClosed."""
        with self._starting:
            if self._connection is None:
                if self._failure is not None:
                    raise self._failure.at(None, None)
                self._make_connection(self.route.ask(questions.contract(self._model)))
                self._runner.start()

    def flush(self) -> None:
        """Send what the connection has to send; the lock is held."""
        self._changed.notify_all()

    def wait(self, pending: Pending, timeout: float | None = None) -> None:
        """Wait until a request is done. Raises TimeoutError."""
        done = threading.Event()
        with self.lock:
            if pending.is_done:
                return
            pending.wake = done.set
        if not done.wait(timeout):
            raise TimeoutError

    def close(self, error: SluiceError) -> None:
        """End the stream, which parks its sequences; who still waits gets `error`."""
        self._failure = error
        with self._starting:
            if self._connection is None:
                return
        with self.lock:
            self._is_closed.set()
            self.connection.shut_down(error)
            self._changed.notify_all()
            call = self._call
        if call is not None:
            call.cancel()
        self._runner.join()

    def _run(self) -> None:
        """Run one stream after another, as long as some sequence needs one."""
        while True:
            with self.lock:
                self._changed.wait_for(
                    lambda: self._is_closed.is_set() or self.connection.wants_stream
                )
            if self._is_closed.is_set():
                return
            try:
                pause = self._pause_after(self._serve())
            except Exception as error:
                self._fail_with(error)
            else:
                self._is_closed.wait(pause)

    def _serve(self) -> Loss:
        """Run one stream until it ends. Raises ProtocolViolation."""
        channel, connection = self.route.channel, self.connection
        is_over = threading.Event()
        failures: list[Exception] = []
        rows = connection.steps.rows_received
        was_answered = False
        try:
            contract = questions.contract(self._model).call(channel)
            with self.lock:
                connection.begin(Signature(contract))
                call = SequencesStub(channel).Infer(self._requests(is_over, failures))
                self._call = cast(Cancellable, call)
                is_closed = self._is_closed.is_set()
            for response in () if is_closed else call:
                was_answered = True
                with self.lock:
                    if (loss := self._receive(response)) is not None:
                        return loss
            code, details = grpc.StatusCode.OK, "the server has ended the stream"
        except grpc.RpcError as error:
            if failures:
                raise failures[0] from None
            code, details = error.code(), error.details() or ""
        finally:
            with self.lock:
                is_over.set()
                if self._call is not None:
                    self._call.cancel()
                    self._call = None
                self._lose()
                self._changed.notify_all()
        return Loss(code, details, was_answered, connection.steps.rows_received > rows)

    def _requests(
        self, is_over: threading.Event, failures: list[Exception]
    ) -> Iterator[InferRequest]:
        """The messages to send; a thread of gRPC takes the next one when the last one was sent.

        If this raises, that thread ends the call but hides the reason: `failures` gets it.
        """
        while True:
            with self.lock:
                request: InferRequest | None = None
                while not is_over.is_set():
                    try:
                        request = self.connection.next_request()
                    except Exception as error:
                        failures.append(error)
                        raise
                    if request is not None:
                        break
                    self._changed.wait()
            if request is None:
                return
            yield request

    def _start_timer(self, seconds: float) -> Cancellable:
        timer = threading.Timer(seconds, lambda: self._on_timer(timer))
        timer.daemon = True
        timer.start()
        return timer

    def _on_timer(self, timer: Cancellable) -> None:
        with self.lock:
            # A timer that was cancelled too late is not the present one.
            if timer is self._store_timer:
                self._retry_postponed()
