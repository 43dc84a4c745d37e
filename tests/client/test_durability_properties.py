"""Whatever happens to servers that share a store, every output arrives once, and is right."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from sluice_client.protocol.connection import Connection
from sluice_client.protocol.openings import Opening
from sluice_client.protocol.replay_buffer import Bounds
from tests.client.durable_server import DurableServer, DurableStream, Store
from tests.client.test_connection_properties import ClientUnderLoss, Expected

DURABILITIES = st.sampled_from(["periodic", "strict"])


class ClientOfMortalServers(ClientUnderLoss):
    """Two servers over one store; the client moves between them, and both may die."""

    @initialize(
        credit=st.integers(1, 12),
        unacknowledged=st.integers(1, 6),
        chunk=st.integers(1, 4),
        steps=st.integers(1, 8),
        size=st.sampled_from([1, 2000, 2**30]),
    )
    def begin(self, credit: int, unacknowledged: int, chunk: int, steps: int, size: int) -> None:
        super().begin(credit, unacknowledged, chunk)
        self.limits = self.server.limits
        self.connection = Connection("sum", self.signature, bounds=Bounds(steps, size))
        self.store = Store()
        self.servers = [DurableServer(self.limits, self.store) for _ in range(2)]
        self.present = 0
        self.stored: dict[str, int] = {}
        for durability in ("periodic", "strict"):
            self.open_sequences(1, durability)
        self.pass_on()
        self.pass_on()

    @precondition(lambda self: self.names < 12)
    @rule(count=st.integers(1, 3), durability=DURABILITIES)
    def open_sequences(self, count: int, durability: str) -> None:
        names = [f"s{self.names + k}" for k in range(count)]
        self.names += count
        request = self.connection.open([Opening(name, durability=durability) for name in names])
        self.openings.append((request, names))

    # -- the network

    @precondition(lambda self: self.stream is None and self.connection.wants_stream)
    @rule()
    def connect(self) -> None:
        self.stream = DurableStream(self.servers[self.present])
        self.connection.begin(self.signature)

    @precondition(lambda self: self.stream is not None and self.stream.outbox)
    @rule()
    def arrive_at_client(self) -> None:
        super().arrive_at_client()
        if self.connection.is_spent:
            self.lose(is_noticed=True)

    @precondition(lambda self: self.stream is None)
    @rule()
    def turn(self) -> None:
        self.present = 1 - self.present

    @precondition(lambda self: self.connection.lanes.postponed)
    @rule()
    def ask_again(self) -> None:
        self.connection.lanes.retry_postponed()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), turns=st.integers(1, 4))
    def work(self, data: st.DataObject, turns: int) -> None:
        """For a while nothing is lost and nothing dies; nothing is checkpointed either."""
        for _ in range(turns):
            if self.live:
                self.give_chunk(data, 3)
            self.pass_on()

    @rule()
    def pass_on(self) -> None:
        """All messages arrive, and what can run runs."""
        if self.stream is None:
            if not self.connection.wants_stream:
                return
            self.connect()
        self.send()
        while self.to_server:
            self.arrive_at_server()
        for lane in self.stream.runnable():
            self.stream.run([(lane, 3)])
        while self.stream is not None and self.stream.outbox:
            self.arrive_at_client()

    # -- the servers and their store

    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        if self.store.is_down:
            return
        server = data.draw(st.sampled_from(self.servers))
        if server.sequences:
            server.checkpoint(data.draw(st.sampled_from(sorted(server.sequences))))

    @rule(number=st.integers(0, 1))
    def die(self, number: int) -> None:
        """The client notices at once, or when it reads: nothing arrives any more."""
        server = self.servers[number]
        server.die()
        self.servers[number] = DurableServer(self.limits, self.store)
        if self.stream is not None and self.stream.server is server:
            self.lose(is_noticed=True)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def part_behind(self, data: st.DataObject) -> None:
        """Sequences end while their server has gone back."""
        self.die(self.present)
        self.end_sequence(data, True)
        self.pass_on()
        self.pass_on()

    @rule(is_down=st.booleans())
    def change_store(self, is_down: bool) -> None:
        self.store.is_down = is_down

    @precondition(lambda self: self.store.is_down and self.stream is not None)
    @rule(data=st.data())
    def refuse_lane(self, data: st.DataObject) -> None:
        """The store has not answered for too long."""
        if self.stream.lanes:
            lane = data.draw(st.sampled_from(sorted(self.stream.lanes)))
            self.stream.refuse(self.stream.lanes[lane])

    @precondition(
        lambda self: (
            self.stream is not None and not self.store.is_down and not self.stream.is_draining
        )
    )
    @rule()
    def drain(self) -> None:
        self.stream.drain()

    # -- what must hold

    def check_ended(self, sequence: Expected, *, is_parking: bool) -> None:
        record = self.store.records[sequence.sequence_id]
        assert record.is_closed is not is_parking
        self.stored[sequence.sequence_id] = record.applied

    def check_applied(self, sequence: Expected) -> None:
        record = self.store.records[sequence.sequence_id]
        # What has ended was all in the store at that moment.
        assert self.stored.get(sequence.sequence_id, sequence.steps) == sequence.steps
        assert record.applied == sequence.steps
        assert (record.total == sequence.total).all()

    def tend(self) -> None:
        self.store.is_down = False
        self.connection.lanes.retry_postponed()
        for server in self.servers:
            for name in sorted(server.sequences):
                server.checkpoint(name)


TestClientOfMortalServers = ClientOfMortalServers.TestCase
TestClientOfMortalServers.settings = settings(
    max_examples=50,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
class TestClientOfMortalServersLonger(ClientOfMortalServers.TestCase):
    settings = settings(TestClientOfMortalServers.settings, max_examples=150)
