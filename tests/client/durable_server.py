"""Servers of docs/protocol.md over one store, without sockets: they die, fall behind, are fenced.

Each is the plain server of `model_server` that asks the store at every open, and goes
on from what the store has. Its checkpoints are made when a test says so.
"""

from copy import copy
from dataclasses import dataclass

from sluice_protos.sequences_pb2 import (
    PERIODIC,
    RESTART,
    STRICT,
    Closed,
    Fault,
    InferResponse,
    Limits,
    OpenSequence,
)
from tests.client.model_server import ModelServer, Sequence, ServerLane, Stream


@dataclass
class DurableSequence(Sequence):
    claim: int = 0
    durability: int = PERIODIC
    # Steps that are in the store.
    durable: int = 0
    # Of a strict sequence: the outputs before this have left on its lane.
    left: int = 0


class Store:
    """One record a sequence; `is_down`: it answers nobody."""

    def __init__(self) -> None:
        self.records: dict[str, DurableSequence] = {}
        self.is_down = False
        self.numbers = 0

    def draw(self) -> int:
        self.numbers += 1
        return self.numbers

    def put(self, name: str, sequence: DurableSequence) -> None:
        record = copy(sequence)
        record.held, record.lane = list(sequence.held), None
        self.records[name] = record
        sequence.durable = sequence.applied


class DurableServer(ModelServer):
    """One process; `die` is kill -9."""

    def __init__(self, limits: Limits, store: Store) -> None:
        super().__init__(limits)
        self.store = store
        self.streams: list[DurableStream] = []

    def die(self) -> None:
        for stream in self.streams:
            stream.is_over = True
            stream.lanes.clear()
        self.sequences.clear()

    def checkpoint(self, name: str) -> bool:
        """Write a sequence to the store; False where it is not this server's any more."""
        sequence, record = self.sequences[name], self.store.records.get(name)
        if record is None or record.is_closed or record.claim != sequence.claim:
            self.drop(name, Closed.FENCED)
            return False
        if sequence.durable == sequence.applied:
            return True
        self.store.put(name, sequence)
        lane = sequence.lane
        if lane is not None and sequence.durability == STRICT:
            lane.stream.let_out(lane)
        elif lane is not None:
            response = InferResponse()
            response.durable.add(lane=lane.number, step=sequence.durable)
            lane.stream.send(response)
        return True

    def drop(self, name: str, reason: int) -> None:
        """Forget a sequence, and tell the lane it is on."""
        lane = self.sequences.pop(name).lane
        if lane is not None:
            lane.stream.lanes.pop(lane.number, None)
            lane.stream.send(InferResponse(closed=[Closed(lane=lane.number, reason=reason)]))


class DurableStream(Stream):
    """One Infer stream at such a server."""

    server: DurableServer

    def __init__(self, server: DurableServer) -> None:
        super().__init__(server)
        server.streams.append(self)
        self.is_draining = False
        # Of strict lanes: faults that wait for the outputs before them. (reason, step)
        self.late_faults: dict[int, tuple[int, int]] = {}

    def accept(self, request) -> None:
        if not self.is_over:
            super().accept(request)

    def open(self, opening: OpenSequence) -> None:
        assert opening.lane not in self.lanes, "a lane in use"
        self.in_flight[opening.lane] = 0
        store, name = self.server.store, opening.sequence_id
        if store.is_down or self.is_draining:
            self.fault(opening.lane, Fault.DRAINING if self.is_draining else Fault.UNAVAILABLE)
            return
        sequence = self.find(name)
        refusal = self.judge(sequence, opening)
        if refusal is not None:
            epoch = sequence.epoch if sequence is not None else 0
            self.fault(opening.lane, refusal, epoch=epoch)
            return
        if name in self.server.sequences:
            lane = self.server.sequences[name].lane
            if lane is not None:
                self.server.drop(name, Closed.FENCED)
                lane.sequence.lane = None
        same_writer = sequence is not None and sequence.writer == opening.writer
        is_new = sequence is None or sequence.is_closed
        if is_new or (opening.mode == RESTART and not same_writer):
            sequence = DurableSequence(opening.writer, opening.attempt, store.draw())
        elif not same_writer:
            sequence.writer, sequence.epoch = opening.writer, store.draw()
            sequence.floor, sequence.held = sequence.applied, []
        sequence.attempt, sequence.claim = opening.attempt, store.draw()
        sequence.durability = opening.durability or PERIODIC
        self.server.sequences[name] = sequence
        if same_writer:
            record = store.records[name]
            record.attempt, record.claim = sequence.attempt, sequence.claim
        else:
            store.put(name, sequence)
        self.attach(opening, sequence)

    def find(self, name: str) -> DurableSequence | None:
        """A sequence as it is in memory, if nobody has claimed it since; else as it is stored."""
        record, mine = self.server.store.records.get(name), self.server.sequences.get(name)
        if record is None or (mine is not None and mine.claim == record.claim):
            return mine
        found = copy(record)
        found.held, found.durable = list(record.held), record.applied
        return found

    def attach(self, opening: OpenSequence, sequence: DurableSequence) -> None:
        if opening.HasField("received"):
            sequence.acknowledge(opening.received)
        lane = ServerLane(opening.lane, self, opening.sequence_id, sequence)
        self.lanes[opening.lane] = sequence.lane = lane
        response = InferResponse()
        response.opened.add(
            lane=opening.lane,
            sequence_id=opening.sequence_id,
            epoch=sequence.epoch,
            applied=sequence.applied,
            durable=sequence.durable,
            held_from=sequence.floor,
            durability=sequence.durability,
        )
        self.send(response)
        sequence.left = sequence.floor
        self.late_faults.pop(lane.number, None)
        if sequence.durability == STRICT:
            self.let_out(lane)
        elif sequence.held:
            super().send_outputs([(lane, sequence.floor, list(sequence.held))])

    def let_out(self, lane: ServerLane) -> None:
        """Send what is durable of a strict sequence and has not left."""
        sequence = lane.sequence
        rows = sequence.held[sequence.left - sequence.floor : sequence.durable - sequence.floor]
        if rows:
            super().send_outputs([(lane, sequence.left, rows)])
            sequence.left += len(rows)
        reason, step = self.late_faults.pop(lane.number, (0, 0))
        if reason:
            self.fault(lane.number, reason, expected=step)

    def fault(self, number: int, reason: int, *, expected: int = 0, epoch: int = 0) -> None:
        lane = self.lanes.get(number)
        is_strict = lane is not None and lane.sequence.durability == STRICT
        if is_strict and lane.sequence.left < expected:
            self.late_faults[number] = (reason, expected)
            return
        super().fault(number, reason, expected=expected, epoch=epoch)

    def send_outputs(self, answers: list) -> None:
        answers = [answer for answer in answers if answer[0].sequence.durability != STRICT]
        if answers:
            super().send_outputs(answers)

    def let_go(self, number: int, *, is_close: bool) -> None:
        lane = self.lanes.get(number)
        if lane is None:
            self.fault(number, Fault.UNKNOWN_LANE)
        elif self.server.store.is_down:
            self.refuse(lane)
        elif self.server.checkpoint(lane.sequence_id):
            if is_close:
                self.server.store.records[lane.sequence_id].is_closed = True
                self.server.drop(lane.sequence_id, Closed.CLIENT)
            else:
                self.park(lane, Closed.PARKED)

    def park(self, lane: ServerLane, reason: int) -> None:
        del self.lanes[lane.number]
        lane.sequence.lane = None
        self.send(InferResponse(closed=[Closed(lane=lane.number, reason=reason)]))

    def refuse(self, lane: ServerLane) -> None:
        """The store does not answer: the lane is unopened."""
        del self.lanes[lane.number]
        lane.sequence.lane = None
        self.fault(lane.number, Fault.UNAVAILABLE)

    def drain(self) -> None:
        """What is on this stream is let go, and nothing more is opened on it."""
        self.is_draining = True
        for lane in list(self.lanes.values()):
            if self.server.checkpoint(lane.sequence_id):
                self.park(lane, Closed.DRAINING)
