"""Keeps the Infer stream of one model alive with threads, and asks its server questions.

On the blocking gRPC API, not on an event loop of its own: two loops of grpc.aio in
one process disturb each other.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, cast

import grpc

from sluice_client.errors import ModelNotFound, ProtocolViolation, SluiceError, from_status
from sluice_client.protocol.calls import Pending
from sluice_client.protocol.connection import Connection
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Signature
from sluice_client.transport.retry import QUESTION_SECONDS_MAX, RESPONSE_BYTES_MAX, Loss, Patience
from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import GetModelRequest, InferRequest
from sluice_protos.sequences_pb2_grpc import ModelsStub, SequencesStub

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


class Route:
    """The channels to a client's servers; the present one is kept while it answers."""

    def __init__(self, channels: Sequence[grpc.Channel]) -> None:
        self._channels = channels
        self._present = 0

    @property
    def servers(self) -> int:
        """How many there are to turn to."""
        return len(self._channels)

    @property
    def channel(self) -> grpc.Channel:
        """The channel to the present server."""
        return self._channels[self._present]

    def turn(self) -> None:
        """Go on with the next server."""
        self._present = (self._present + 1) % len(self._channels)

    def ask(
        self,
        question: Callable[[grpc.Channel], T],
        *,
        not_found: type[SluiceError] = ModelNotFound,
        sequence_id: str | None = None,
    ) -> T:
        """The answer of the first server that gives one. Raises its status as SluiceError.

        Each is asked twice: a question changes nothing, and a connection may have broken.
        """
        for attempts_left in reversed(range(2 * len(self._channels))):
            try:
                return question(self.channel)
            except grpc.RpcError as error:
                if not attempts_left or error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise from_status(
                        error.code().name,
                        error.details() or "",
                        sequence_id=sequence_id,
                        not_found=not_found,
                    ) from None
                self.turn()
        raise AssertionError  # the last attempt has returned or raised

    def contract(self, model: str) -> ModelContract:
        """What a model takes and gives. Raises ModelNotFound."""
        request = GetModelRequest(name=model)
        return self.ask(
            lambda channel: ModelsStub(channel).GetModel(request, timeout=QUESTION_SECONDS_MAX)
        )


class ThreadStream:
    """All sequences of one model that one Client has share this."""

    def __init__(
        self,
        model: str,
        route: Route,
        reconnect_seconds_max: float,
        bounds: Bounds | None = None,
    ) -> None:
        # Guards the connection; told of every change that could give something to send.
        self.lock = threading.Condition()
        self.route = route
        self._model = model
        self._bounds = bounds
        self._patience = Patience(reconnect_seconds_max, route.servers)
        # With a server whose store does not answer, while it serves others.
        self._store_patience = Patience(reconnect_seconds_max)
        self._retry: threading.Timer | None = None
        self._connection: Connection | None = None
        self._meeting = threading.Lock()
        self._is_closed = threading.Event()
        # Why nobody is met any more.
        self._failure: SluiceError | None = None
        self._call: _Cancellable | None = None
        self._runner = threading.Thread(target=self._run, name=f"sluice {self._model}", daemon=True)

    @property
    def connection(self) -> Connection:
        """The stream's logic, after `meet`."""
        assert self._connection is not None
        return self._connection

    def meet(self) -> Connection:
        """Learn the model's contract, once. Raises ModelNotFound, Unavailable, ClientClosed."""
        with self._meeting:
            if self._connection is None:
                if self._failure is not None:
                    raise self._failure.at(None, None)
                signature = Signature(self.route.contract(self._model))
                self._connection = Connection(
                    self._model,
                    signature,
                    bounds=self._bounds,
                    response_bytes_max=RESPONSE_BYTES_MAX,
                )
                self._runner.start()
        return self._connection

    def flush(self) -> None:
        """Have what was asked sent; the lock is held."""
        self.lock.notify_all()

    def wait(self, pending: Pending, timeout: float | None = None) -> None:
        """Wait until something asked is done. Raises TimeoutError."""
        done = threading.Event()
        with self.lock:
            if pending.is_done:
                return
            pending.wake = done.set
        if not done.wait(timeout):
            raise TimeoutError

    def close(self, error: SluiceError) -> None:
        """End the stream; sequences on it are parked by that. Who still waits gets `error`."""
        self._failure = error
        with self._meeting:
            if self._connection is None:
                return
        with self.lock:
            self._is_closed.set()
            self.connection.shut(error)
            self.lock.notify_all()
            call = self._call
        if call is not None:
            call.cancel()
        self._runner.join()

    def _run(self) -> None:
        """One stream after another, for as long as somebody needs one."""
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self._is_closed.is_set() or self.connection.wants_stream)
            if self._is_closed.is_set():
                return
            try:
                loss = self._serve()
            except ProtocolViolation as violation:
                self._fail(violation)
                continue
            except Exception as error:
                # A defect in here must not leave its callers waiting for ever.
                log.exception("the client has failed")
                self._fail(SluiceError(f"the client has failed: {error!r}"))
                continue
            if loss.asks_for_another:
                self.route.turn()
            verdict = self._patience.after(loss, time.monotonic())
            if isinstance(verdict, SluiceError):
                self._fail(verdict)
            else:
                self._is_closed.wait(verdict)

    def _fail(self, error: SluiceError) -> None:
        with self.lock:
            self.connection.fail(error)

    def _serve(self) -> Loss:
        """One stream from its begin to its end. Raises ProtocolViolation."""
        channel, connection = self.route.channel, self.connection
        is_over = threading.Event()
        failures: list[Exception] = []
        rows = connection.ledger.rows_received
        was_answered = False
        try:
            contract = ModelsStub(channel).GetModel(
                GetModelRequest(name=self._model), timeout=QUESTION_SECONDS_MAX
            )
            with self.lock:
                connection.begin(Signature(contract))
                call = SequencesStub(channel).Infer(self._requests(is_over, failures))
                self._call = cast(_Cancellable, call)
                is_closed = self._is_closed.is_set()
            for response in () if is_closed else call:
                was_answered = True
                with self.lock:
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
                        self.lock.notify_all()
            code, details = grpc.StatusCode.OK, "the server has ended the stream"
        except grpc.RpcError as error:
            if failures:
                raise failures[0] from None
            code, details = error.code(), error.details() or ""
        finally:
            with self.lock:
                is_over.set()
                if self._retry is not None:
                    self._retry.cancel()
                    self._retry = None
                if self._call is not None:
                    self._call.cancel()
                    self._call = None
                connection.lose()
                self.lock.notify_all()
        return Loss(code, details, was_answered, connection.ledger.rows_received > rows)

    def _wait_for_store(self) -> None:
        """Ask again after a pause for what waits for the store; the stream serves others."""
        if self._retry is not None:
            return
        if self.connection.has_recovered:
            self.connection.has_recovered = False
            self._store_patience.rest()
        loss = Loss(grpc.StatusCode.UNAVAILABLE, self.connection.refusal)
        verdict = self._store_patience.after(loss, time.monotonic())
        if isinstance(verdict, SluiceError):
            self.connection.give_up(verdict)
        else:
            self._retry = threading.Timer(verdict, self._ask_again)
            self._retry.daemon = True
            self._retry.start()

    def _ask_again(self) -> None:
        with self.lock:
            if threading.current_thread() is self._retry:
                self._retry = None
                self.connection.retry()
                self.lock.notify_all()

    def _requests(
        self, is_over: threading.Event, failures: list[Exception]
    ) -> Iterator[InferRequest]:
        """What to send; gRPC's own thread asks for the next when the last one has been taken.

        That thread ends the call where this raises, but keeps the reason: it is for `failures`.
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
                    self.lock.wait()
            if request is None:
                return
            yield request
