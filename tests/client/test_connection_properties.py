"""Whatever happens to the streams, every output arrives once and is that of an undisturbed run."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sluice_client import errors
from sluice_client.protocol.connection import Connection
from sluice_client.protocol.openings import Opening
from sluice_client.protocol.signature import Signature
from sluice_protos.sequences_pb2 import InferRequest, InferResponse, Limits
from tests.client.model_server import POISON, ModelServer, Stream, make_contract


class Expected:
    """One sequence as its caller sees it: what was given, and what must come of it."""

    def __init__(self, lane: int, sequence_id: str) -> None:
        self.lane = lane
        self.sequence_id = sequence_id
        self.steps = 0
        self.total = np.zeros(2, np.int64)
        self.calls: list = []  # (call, position, start, inputs [steps, 2])

    def judge(self) -> None:
        """Check all calls that are done, in the order in which they were given."""
        while self.calls and self.calls[0][0].is_done:
            call, position, start, inputs = self.calls.pop(0)
            bad = np.flatnonzero((inputs == POISON).any(axis=1))
            good = int(bad[0]) if bad.size else len(inputs)
            error = call.errors.get(position)
            sums = self.total + np.cumsum(inputs[:good], axis=0)
            outputs = call.outputs[0][start : start + len(inputs)]
            assert np.array_equal(outputs[:good], sums)
            self.steps += good
            self.total = sums[-1] if good else self.total
            if not bad.size:
                assert error is None
                continue
            assert type(error) is errors.InvalidInput
            assert error.step == self.steps
            # What was given behind it, before anybody knew, was not applied.
            for later, where, _, _ in self.calls:
                if where in later.errors:
                    assert type(later.errors[where]) in (errors.StepDiscarded, errors.InvalidInput)
            while self.calls and self.calls[0][1] in self.calls[0][0].errors:
                if not isinstance(self.calls[0][0].errors[self.calls[0][1]], errors.StepDiscarded):
                    break
                self.calls.pop(0)


class ClientUnderLoss(RuleBasedStateMachine):
    @initialize(
        credit=st.integers(1, 12), unacknowledged=st.integers(1, 6), chunk=st.integers(1, 4)
    )
    def begin(self, credit: int, unacknowledged: int, chunk: int) -> None:
        limits = Limits(
            request_bytes_max=4096 + 40 * 8,
            chunk_steps_max=chunk,
            credit_steps=credit,
            unacknowledged_steps_max=unacknowledged,
        )
        self.server = ModelServer(limits)
        self.signature = Signature(make_contract())
        self.connection = Connection("sum", self.signature)
        self.stream: Stream | None = None
        self.to_server: list[bytes] = []
        self.late: list[tuple[Stream, list[bytes]]] = []
        self.openings: list = []
        self.live: list[Expected] = []
        self.ending: list = []
        self.ended: list[Expected] = []
        self.names = 0

    # -- the caller

    @rule(count=st.integers(1, 3))
    def open_sequences(self, count: int) -> None:
        names = [f"s{self.names + k}" for k in range(count)]
        self.names += count
        request = self.connection.open([Opening(name) for name in names])
        self.openings.append((request, names))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), steps=st.integers(1, 6))
    def give_chunk(self, data: st.DataObject, steps: int) -> None:
        size = data.draw(st.integers(1, len(self.live)))
        chosen = data.draw(st.permutations(self.live))[:size]
        counts = [data.draw(st.integers(1, steps)) for _ in chosen]
        rows = np.array(
            data.draw(
                st.lists(
                    st.one_of(st.integers(-9, 9), st.just(POISON))
                    if data.draw(st.integers(0, 4)) == 0
                    else st.integers(-9, 9),
                    min_size=2 * sum(counts),
                    max_size=2 * sum(counts),
                )
            ),
            np.int64,
        ).reshape(-1, 2)
        lanes = np.array([sequence.lane for sequence in chosen])
        call = self.connection.submit(lanes, np.array(counts), [rows])
        starts = np.cumsum([0, *counts])
        for position, sequence in enumerate(chosen):
            mine = rows[starts[position] : starts[position + 1]]
            sequence.calls.append((call, position, int(starts[position]), mine))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), is_parking=st.booleans())
    def end_sequence(self, data: st.DataObject, is_parking: bool) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        end = self.connection.park if is_parking else self.connection.close
        self.ending.append((end(np.array([sequence.lane])), sequence, is_parking))

    # -- the network

    @precondition(lambda self: self.stream is None and self.connection.wants_stream)
    @rule()
    def connect(self) -> None:
        self.stream = Stream(self.server)
        self.connection.begin(self.signature)

    @precondition(lambda self: self.stream is not None)
    @rule()
    def send(self) -> None:
        request = self.connection.next_request()
        if request is not None:
            self.to_server.append(request.SerializeToString())

    @precondition(lambda self: self.to_server)
    @rule()
    def arrive_at_server(self) -> None:
        self.stream.accept(InferRequest.FromString(self.to_server.pop(0)))

    @precondition(lambda self: self.stream is not None and self.stream.outbox)
    @rule()
    def arrive_at_client(self) -> None:
        data = self.stream.outbox.pop(0).SerializeToString()
        self.connection.receive(InferResponse.FromString(data))
        self.judge()

    @precondition(lambda self: self.stream is not None and self.stream.runnable())
    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        lanes = data.draw(st.permutations(self.stream.runnable()))
        lanes = lanes[: data.draw(st.integers(1, len(lanes)))]
        self.stream.run([(lane, data.draw(st.integers(1, 4))) for lane in lanes])

    @precondition(lambda self: self.stream is not None)
    @rule(is_noticed=st.booleans())
    def lose(self, is_noticed: bool) -> None:
        """The stream breaks; the server may not notice, and take what was on its way later."""
        if is_noticed:
            self.stream.end()
        else:
            self.late.append((self.stream, self.to_server))
        self.stream, self.to_server = None, []
        self.connection.lose()
        self.judge()

    @precondition(lambda self: any(messages for _, messages in self.late))
    @rule()
    def arrive_late(self) -> None:
        for stream, messages in self.late:
            if messages:
                stream.accept(InferRequest.FromString(messages.pop(0)))
                for lane in stream.runnable():
                    stream.run([(lane, 2)])
                return

    # -- what must hold

    def judge(self) -> None:
        for sequence in self.live:
            sequence.judge()
        for sequence in (*(sequence for _, sequence, _ in self.ending), *self.ended):
            sequence.judge()
        for request, names in list(self.openings):
            if request.is_done:
                assert not request.errors
                self.openings.remove((request, names))
                self.live += map(Expected, request.lanes.tolist(), names)
        for ended in list(self.ending):
            request, sequence, is_parking = ended
            if request.is_done:
                assert not request.errors
                self.check_ended(sequence, is_parking=is_parking)
                self.ending.remove(ended)
                self.ended.append(sequence)

    def check_ended(self, sequence: Expected, *, is_parking: bool) -> None:
        assert self.server.sequences[sequence.sequence_id].is_closed is not is_parking

    def check_applied(self, sequence: Expected) -> None:
        assert self.server.sequences[sequence.sequence_id].applied == sequence.steps

    def tend(self) -> None:
        """What a server and a client's face do by themselves, given time."""

    @invariant()
    def credit_is_what_is_under_way(self) -> None:
        lanes = self.connection.steps.lanes.rows
        behind = self.connection.steps.lanes.rare["behind"]
        under_way = (lanes["sent"] - lanes["received"] + behind)[lanes["is_attached"]]
        assert (under_way >= 0).all()
        assert under_way.sum() == self.connection.steps.in_flight

    def teardown(self) -> None:
        """With a network that holds, everything comes to its end."""
        if not hasattr(self, "server"):
            return
        for _ in range(3000):
            if self.stream is None:
                if not self.connection.wants_stream:
                    break
                self.connect()
            before = len(self.to_server) + len(self.stream.outbox)
            self.send()
            while self.to_server:
                self.arrive_at_server()
            for lane in self.stream.runnable():
                self.stream.run([(lane, 3)])
            self.tend()
            is_quiet = not self.stream.outbox and not before
            while self.stream is not None and self.stream.outbox:
                self.arrive_at_client()
            if is_quiet and self.stream is not None:
                request = self.connection.next_request()
                if request is None:
                    break
                self.to_server.append(request.SerializeToString())
        assert not self.openings
        assert not self.ending
        for sequence in self.live + self.ended:
            assert not sequence.calls
            self.check_applied(sequence)


TestClientUnderLoss = ClientUnderLoss.TestCase
TestClientUnderLoss.settings = settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
class TestClientUnderLossLonger(ClientUnderLoss.TestCase):
    settings = settings(TestClientUnderLoss.settings, max_examples=300)
