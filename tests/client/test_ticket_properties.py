"""However often clients and servers are killed, a journal gets every output once, in order."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sluice_client import errors
from sluice_client.protocol.connection import Connection
from sluice_client.protocol.lane import Status
from sluice_client.protocol.openings import Opening, ticket_opening
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Signature
from sluice_client.protocol.tickets import Ticket
from sluice_protos.sequences_pb2 import InferRequest, InferResponse, Limits
from tests.client.durable_server import DurableServer, DurableStream, Store
from tests.client.model_server import make_contract

SIGNATURE = Signature(make_contract())


def inputs(first: int, stop: int) -> np.ndarray:
    """The inputs of steps, [steps, 2]: whoever gives them gives the same."""
    steps = np.arange(first, stop)
    return np.stack([steps + 1, -steps * steps], axis=1)


def outputs(stop: int) -> list[list[int]]:
    return np.cumsum(inputs(0, stop), axis=0).tolist()


class Process:
    """A client's process with one sequence; `journal` outlives it."""

    def __init__(self, opening: Opening, bounds: Bounds) -> None:
        self.connection = Connection("sum", SIGNATURE, bounds=bounds)
        self.request = self.connection.open([opening])
        self.stream: DurableStream | None = None
        self.calls: list = []
        self.given = -1  # steps, once the sequence is open

    @property
    def number(self) -> int:
        return int(self.request.lanes[0])

    def look(self) -> None:
        """What a handle does once it is open, and when its server needs inputs again."""
        if not self.request.is_done or self.request.errors:
            return
        lane = self.connection.lanes[self.number]
        if self.given < 0:
            self.given = self.connection.steps.submitted(self.number)
            if lane.inherited is not None:
                self.calls.append(lane.inherited)
        if lane.replays_from is not None:
            received = self.connection.steps.received(self.number)
            self.connection.replay(self.number, [inputs(lane.replays_from, received)])

    def give(self, count: int) -> None:
        if self.given >= 0:
            rows = inputs(self.given, self.given + count)
            self.given += count
            lanes = np.array([self.number])
            self.calls.append(self.connection.submit(lanes, np.array([count]), [rows]))

    def go(self, server: DurableServer) -> None:
        """One round trip of messages."""
        if self.stream is None:
            if not self.connection.wants_stream:
                return
            self.stream = DurableStream(server)
            self.connection.begin(SIGNATURE)
        while (request := self.connection.next_request()) is not None:
            self.stream.accept(InferRequest.FromString(request.SerializeToString()))
        for lane in self.stream.runnable():
            self.stream.run([(lane, 3)])
        while self.stream.outbox:
            data = self.stream.outbox.pop(0).SerializeToString()
            self.connection.receive(InferResponse.FromString(data))
            self.look()
        if self.connection.is_spent or self.stream.is_over:
            self.lose()

    def lose(self) -> None:
        if self.stream is not None:
            self.stream.end()
            self.stream = None
            self.connection.lose()

    @property
    def error(self) -> errors.SluiceError | None:
        """Why the sequence has ended for this process."""
        if self.request.errors:
            return self.request.errors[0]
        lane = self.connection.lanes[self.number]
        return lane.error if lane.status is Status.ENDED else None


class Successors(RuleBasedStateMachine):
    @initialize(
        credit=st.integers(1, 9),
        unacknowledged=st.integers(2, 7),
        steps=st.integers(1, 9),
        durability=st.sampled_from(["periodic", "strict"]),
    )
    def begin(self, credit: int, unacknowledged: int, steps: int, durability: str) -> None:
        self.limits = Limits(
            request_bytes_max=2**16,
            chunk_steps_max=3,
            credit_steps=credit,
            unacknowledged_steps_max=unacknowledged,
        )
        self.store = Store()
        self.servers = [DurableServer(self.limits, self.store) for _ in range(2)]
        self.present = 0
        self.bounds = Bounds(steps_max=steps)
        opening = Opening("a", durability=durability, holds_outputs=True)
        self.process = Process(opening, self.bounds)
        self.process.go(self.servers[0])
        self.ticket = Ticket(
            "sum", "a", opening.writer, 0, 0, durability=durability, holds_outputs=True
        )
        self.journal: list[list[int]] = []
        # Processes that were thought dead and are only asleep.
        self.asleep: list[Process] = []

    @rule(
        count=st.integers(0, 2),
        turns=st.integers(1, 4),
        is_writing=st.booleans(),
        is_confirming=st.booleans(),
    )
    def work(self, count: int, turns: int, is_writing: bool, is_confirming: bool) -> None:
        for _ in range(turns):
            self.give(count)
            self.process.go(self.servers[self.present])
            if is_writing:
                self.write_down(is_confirming=is_confirming)

    def give(self, count: int) -> None:
        if count:
            self.process.give(count)

    def write_down(self, *, is_confirming: bool) -> None:
        calls = self.process.calls
        while calls and calls[0].is_done and not calls[0].errors:
            self.journal += calls.pop(0).outputs[0].tolist()
        assert self.journal == outputs(len(self.journal))
        if is_confirming and self.process.given >= 0 and self.process.error is None:
            self.process.connection.confirm(self.process.number, len(self.journal))

    @rule(is_turning=st.booleans())
    def lose(self, is_turning: bool) -> None:
        self.process.lose()
        self.present ^= is_turning

    @rule(number=st.integers(0, 1))
    def checkpoint(self, number: int) -> None:
        for name in sorted(self.servers[number].sequences):
            self.servers[number].checkpoint(name)

    @rule(number=st.integers(0, 1))
    def kill_server(self, number: int) -> None:
        self.servers[number].die()
        self.servers[number] = DurableServer(self.limits, self.store)
        for process in (self.process, *self.asleep):
            if process.stream is not None and process.stream.is_over:
                process.lose()

    @rule(is_dead=st.booleans())
    def kill_client(self, is_dead: bool) -> None:
        """What it has not written down is lost; if it was only asleep it will be back."""
        if is_dead:
            self.process.lose()
        else:
            self.asleep.append(self.process)
        self.succeed()

    def succeed(self) -> None:
        opening = ticket_opening(self.ticket.renew(len(self.journal)))
        self.process = Process(opening, self.bounds)

    @precondition(lambda self: self.asleep)
    @rule(data=st.data())
    def wake_up(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.asleep))
        for _ in range(3):
            process.go(data.draw(st.sampled_from(self.servers)))

    def teardown(self) -> None:
        if not hasattr(self, "journal"):
            return
        for _ in range(200):
            self.write_down(is_confirming=True)
            if isinstance(self.process.error, errors.ReplayNeeded):
                self.process.lose()
                self.succeed()
            assert self.process.error is None, self.process.error
            # Not by turns: how many pass before the sequence is open is up to the schedule.
            if self.process.given < 10:
                self.give(2)
            for _ in range(2):
                self.process.go(self.servers[self.present])
            self.checkpoint(0)
            self.checkpoint(1)
        self.write_down(is_confirming=True)
        assert not self.process.calls
        assert len(self.journal) == self.process.given >= 10
        # Who wakes up now is told that it was succeeded.
        for process in self.asleep:
            for _ in range(6):
                process.go(self.servers[self.present])
            assert isinstance(process.error, errors.Fenced | errors.ReplayNeeded), process.error


TestSuccessors = Successors.TestCase
TestSuccessors.settings = settings(
    max_examples=50,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
class TestSuccessorsLonger(Successors.TestCase):
    settings = settings(TestSuccessors.settings, max_examples=100)
