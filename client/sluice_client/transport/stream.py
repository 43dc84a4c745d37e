"""What a stream does alike with threads and in an event loop: react to responses and to losses."""

import logging
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

import grpc

from sluice_client.errors import ProtocolViolation, SluiceError
from sluice_client.protocol.connection import Connection
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Signature
from sluice_client.transport.channel import RESPONSE_BYTES_MAX
from sluice_client.transport.retry import Backoff, Loss
from sluice_client.transport.route import BaseRoute
from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import InferResponse

log = logging.getLogger(__name__)

Route = TypeVar("Route", bound=BaseRoute[Any])


class Cancellable(Protocol):
    """A timer, or a call to a server."""

    def cancel(self) -> object: ...


class BaseStream(ABC, Generic[Route]):
    """All sequences of one model that one client has share this."""

    # Held while the connection is used.
    lock: AbstractContextManager[Any]

    def __init__(
        self, model: str, route: Route, reconnect_seconds_max: float, bounds: Bounds
    ) -> None:
        self.route = route
        self._model = model
        self._bounds = bounds
        self._backoff = Backoff(reconnect_seconds_max, route.servers)
        # For a server whose store does not answer, while it serves other sequences.
        self._store_backoff = Backoff(reconnect_seconds_max)
        self._store_timer: Cancellable | None = None
        self._connection: Connection | None = None
        # Why the stream was closed.
        self._failure: SluiceError | None = None

    @property
    def connection(self) -> Connection:
        """The stream's logic, after `start`."""
        assert self._connection is not None
        return self._connection

    @abstractmethod
    def flush(self) -> None:
        """Send what the connection has to send; the lock is held."""

    @abstractmethod
    def _start_timer(self, seconds: float) -> Cancellable:
        """Call `_retry_postponed` after a while."""

    def _make_connection(self, contract: ModelContract) -> None:
        self._connection = Connection(
            self._model,
            Signature(contract),
            bounds=self._bounds,
            response_bytes_max=RESPONSE_BYTES_MAX,
        )

    def _receive(self, response: InferResponse) -> Loss | None:
        """Process a response; a Loss if the server has no use for this stream any more."""
        connection = self.connection
        connection.receive(response)
        lanes = connection.lanes
        if connection.is_spent:
            return Loss(
                grpc.StatusCode.UNAVAILABLE,
                lanes.refusal,
                was_answered=lanes.has_opened,
                is_refused=True,
            )
        if lanes.postponed:
            self._back_off_from_store()
        if connection.has_something_to_send:
            self.flush()
        return None

    def _back_off_from_store(self) -> None:
        """Retry the lanes that wait for the server's store after a pause, or give them up."""
        if self._store_timer is not None:
            return
        lanes = self.connection.lanes
        if lanes.has_recovered:
            lanes.has_recovered = False
            self._store_backoff.reset()
        loss = Loss(grpc.StatusCode.UNAVAILABLE, lanes.refusal)
        verdict = self._store_backoff.after(loss, time.monotonic())
        if isinstance(verdict, SluiceError):
            lanes.fail_postponed(verdict)
        else:
            self._store_timer = self._start_timer(verdict)

    def _retry_postponed(self) -> None:
        self._store_timer = None
        self.connection.lanes.retry_postponed()
        self.flush()

    def _lose(self) -> None:
        """The stream has ended; the lock is held."""
        if self._store_timer is not None:
            self._store_timer.cancel()
            self._store_timer = None
        self.connection.lose()

    def _pause_after(self, loss: Loss) -> float:
        """Seconds until the next stream may be started; fails all sequences after too long."""
        with self.lock:
            if not self.connection.wants_stream:
                return 0
        if loss.asks_for_another:
            self.route.turn()
        verdict = self._backoff.after(loss, time.monotonic())
        if isinstance(verdict, SluiceError):
            self._fail(verdict)
            return 0
        return verdict

    def _fail_with(self, error: Exception) -> None:
        """End all sequences after an exception that no new stream can mend."""
        if isinstance(error, ProtocolViolation):
            self._fail(error)
        else:
            # A defect of the client must not leave its callers waiting for ever.
            log.error("the client has failed", exc_info=error)
            self._fail(SluiceError(f"the client has failed: {error!r}"))

    def _fail(self, error: SluiceError) -> None:
        with self.lock:
            self.connection.fail(error)
