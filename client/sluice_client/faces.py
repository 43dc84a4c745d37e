"""What the two clients share: everything that does not wait for a server."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Generic, TypeVar
from uuid import uuid4

import grpc

from sluice_client.errors import ClientClosed
from sluice_client.protocol.openings import (
    Mode,
    Opening,
    SequenceState,
    group_openings,
    ticket_opening,
)
from sluice_client.protocol.replay_buffer import RETAINED_BYTES_MAX, RETAINED_STEPS_MAX, Bounds
from sluice_client.protocol.tickets import Durability, Ticket
from sluice_client.transport.channel import read_addresses

AnyChannel = TypeVar("AnyChannel")
AnyStream = TypeVar("AnyStream")
AnySequence = TypeVar("AnySequence")
AnyGroup = TypeVar("AnyGroup")


class BaseClient(ABC, Generic[AnyChannel, AnyStream, AnySequence, AnyGroup]):
    """The settings, channels and streams of a client, and the handles it makes."""

    def __init__(
        self,
        address: str | Iterable[str] = "127.0.0.1:8001",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        reconnect_seconds_max: float = 60.0,
        kept_steps_max: int = RETAINED_STEPS_MAX,
        kept_bytes_max: int = RETAINED_BYTES_MAX,
    ) -> None:
        """Make a client; nothing is sent yet.

        address                `host:port`, any gRPC target such as `dns:///name:port`, or
                               several of them, tried in turn when one does not answer
        credentials            for TLS; None: plain text
        reconnect_seconds_max  how long steps wait for a server to answer again
        kept_steps_max         inputs of one sequence in the replay buffer: retained until
                               they are durable
        kept_bytes_max         the size of the replay buffer, of all sequences of one model
        """
        self._addresses = read_addresses(address)
        self._credentials = credentials
        self._reconnect_seconds_max = reconnect_seconds_max
        self._bounds = Bounds(kept_steps_max, kept_bytes_max)
        # Guards what follows: threads may share a client.
        self._lock = threading.RLock()
        self._channels: list[AnyChannel] = []
        self._streams: dict[str, AnyStream] = {}
        self._is_closed = False

    def sequence(
        self,
        model: str,
        sequence_id: str | None = None,
        *,
        mode: Mode = Mode.START,
        state: SequenceState | None = None,
        durability: Durability | None = None,
        holds_outputs: bool = False,
    ) -> AnySequence:
        """A sequence, opened by `with` or `async with`.

        sequence_id    None: a random id
        state          where a new sequence begins; None: at the model's initial state
        durability     what survives the server's death: "off", "periodic" or "strict";
                       None: what the server is set to, which is also the most it grants
        holds_outputs  the server holds outputs until `confirm` says that they are stored,
                       so that another process can `resume` the sequence

        Opening raises SequenceExists, SequenceNotFound, ModelNotFound, LimitReached,
        WrongModel, DataLoss or Unavailable.
        """
        opening = Opening(sequence_id or uuid4().hex, mode, state, durability, holds_outputs)
        return self._make_sequence(model, opening)

    def resume(self, ticket: Ticket, *, received: int | None = None) -> AnySequence:
        """Continue the sequence of a ticket; opened by `with` or `async with`.

        For a process whose predecessor was killed. `received` is the number of outputs
        in its journal (None: as many as the ticket says). `settle` returns the outputs
        that the server has beyond them; `replays_from` says whether it needs inputs
        again. Of several handles with one ticket the latest has the sequence.
        """
        return self._make_sequence(ticket.model, ticket_opening(ticket.renew(received)))

    def group(
        self,
        model: str,
        sequence_ids: Iterable[str],
        *,
        mode: Mode = Mode.START,
        durability: Durability | None = None,
    ) -> AnyGroup:
        """Sequences that step together, opened by `with` or `async with`: all of them or none."""
        return self._make_group(model, group_openings(sequence_ids, mode, durability))

    @abstractmethod
    def _make_sequence(self, model: str, opening: Opening) -> AnySequence: ...

    @abstractmethod
    def _make_group(self, model: str, openings: list[Opening]) -> AnyGroup: ...

    @abstractmethod
    def _make_stream(self, model: str) -> AnyStream: ...

    @abstractmethod
    def _make_channel(self, address: str) -> AnyChannel: ...

    def _stream(self, model: str) -> AnyStream:
        """The stream that all sequences of a model share."""
        with self._lock:
            if model not in self._streams:
                self._streams[model] = self._make_stream(model)
            return self._streams[model]

    def _open_channels(self) -> list[AnyChannel]:
        """A channel to each server; made at the first use, when an event loop is there."""
        with self._lock:
            if self._is_closed:
                raise ClientClosed("the client was closed; make another one")
            if not self._channels:
                self._channels = [self._make_channel(address) for address in self._addresses]
            return self._channels

    def _mark_closed(self) -> ClientClosed:
        """Refuse everything from now on; the error for those who wait."""
        with self._lock:
            self._is_closed = True
        return ClientClosed("the client was closed")
