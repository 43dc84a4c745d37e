"""A server of docs/protocol.md without sockets or a model file: what client tests compare with.

Written from the protocol's text alone, one step at a time, as plainly as can be. Its
model adds up its inputs; an input of POISON is refused.
"""

from dataclasses import dataclass, field

import numpy as np

from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import (
    RESTART,
    RESUME,
    START,
    START_OR_RESUME,
    TAKEOVER,
    Closed,
    Fault,
    InferRequest,
    InferResponse,
    Limits,
    OpenSequence,
)

POISON = -666


def make_contract() -> ModelContract:
    contract = ModelContract(name="sum", digest="d", state_size=2)
    contract.inputs.add(name="x", datatype="INT64", shape=[2])
    contract.outputs.add(name="total", datatype="INT64", shape=[2])
    return contract


@dataclass
class Sequence:
    writer: bytes
    attempt: int
    epoch: int
    applied: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    floor: int = 0
    held: list = field(default_factory=list)
    is_closed: bool = False
    lane: "ServerLane | None" = None

    def acknowledge(self, step: int) -> None:
        while self.floor < min(step, self.applied):
            self.floor += 1
            self.held.pop(0)


@dataclass
class ServerLane:
    number: int
    stream: "Stream"
    sequence_id: str
    sequence: Sequence
    # One (first step, row) for each step that waits.
    queue: list = field(default_factory=list)
    as_sent: int = 0
    is_skipping: bool = False


class ModelServer:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sequences: dict[str, Sequence] = {}
        self.epochs = 0

    def next_epoch(self) -> int:
        self.epochs += 1
        return self.epochs


class Stream:
    """One Infer stream at the server: give it requests, take its responses."""

    def __init__(self, server: ModelServer, *, merges_notices: bool = False) -> None:
        self.server = server
        self.lanes: dict[int, ServerLane] = {}
        self.outbox: list[InferResponse] = []
        self.requests = 0
        # The steps of each response sent, for received_responses: [(sequence, step), …].
        self.sent_log: list[list] = []
        self.responses_acknowledged = 0
        self.in_flight: dict[int, int] = {}
        self.is_over = False
        self.merges_notices = merges_notices

    # -- requests

    def accept(self, request: InferRequest) -> None:
        self.requests += 1
        if self.requests == 1:
            assert request.model == "sum"
            self.send(InferResponse(limits=self.server.limits))
        assert len(request.SerializeToString()) <= self.server.limits.request_bytes_max
        for received in range(self.responses_acknowledged, request.received_responses):
            for sequence, lane, step in self.sent_log[received]:
                if sequence.lane is lane:
                    sequence.acknowledge(step)
        self.responses_acknowledged = max(
            self.responses_acknowledged, int(request.received_responses)
        )
        for entry in request.received:
            if entry.lane in self.lanes:
                self.lanes[entry.lane].sequence.acknowledge(entry.step)
        for opening in request.open:
            self.open(opening)
        self.accept_chunks(request)
        for number in request.close:
            self.let_go(number, is_close=True)
        for number in request.park:
            self.let_go(number, is_close=False)

    def accept_chunks(self, request: InferRequest) -> None:
        if not request.lane:
            return
        steps = list(request.steps) or [1] * len(request.lane)
        rows = np.frombuffer(request.inputs[0].data, "<i8").reshape(-1, 2)
        assert len(rows) == sum(steps) and min(steps) >= 1
        assert max(steps) <= self.server.limits.chunk_steps_max
        at = 0
        for number, count, first in zip(request.lane, steps, request.first_step, strict=True):
            lane = self.lanes.get(number)
            if lane is None:
                self.fault(number, Fault.UNKNOWN_LANE)
            elif not (lane.is_skipping and first != lane.as_sent):
                # What a fault drops had its credit given back by that fault.
                self.in_flight[number] = self.in_flight.get(number, 0) + count
                lane.queue += [(first + k, rows[at + k]) for k in range(count)]
                lane.as_sent = first + count
            at += count
        assert sum(self.in_flight.values()) <= self.server.limits.credit_steps

    def open(self, opening: OpenSequence) -> None:
        assert opening.lane not in self.lanes, "a lane in use"
        self.in_flight[opening.lane] = 0
        sequences, name = self.server.sequences, opening.sequence_id
        sequence = sequences.get(name)
        refusal = self.judge(sequence, opening)
        if refusal is not None:
            epoch = sequence.epoch if sequence is not None else 0
            self.fault(opening.lane, refusal, epoch=epoch)
            return
        same_writer = sequence is not None and sequence.writer == opening.writer
        if sequence is not None and sequence.lane is not None:
            old = sequence.lane
            old.stream.lanes.pop(old.number, None)
            old.stream.send(InferResponse(closed=[Closed(lane=old.number, reason=Closed.FENCED)]))
        if sequence is None or sequence.is_closed or (opening.mode == RESTART and not same_writer):
            sequence = Sequence(opening.writer, opening.attempt, self.server.next_epoch())
            if opening.HasField("state"):
                sequence.applied = sequence.floor = opening.state.step
                sequence.total = np.frombuffer(opening.state.row, "<f4").astype(np.int64)
            sequences[name] = sequence
        elif not same_writer:
            sequence.writer, sequence.epoch = opening.writer, self.server.next_epoch()
            sequence.floor, sequence.held = sequence.applied, []
        sequence.attempt = opening.attempt
        if opening.HasField("received"):
            sequence.acknowledge(opening.received)
        lane = ServerLane(opening.lane, self, name, sequence)
        self.lanes[opening.lane] = sequence.lane = lane
        response = InferResponse()
        response.opened.add(
            lane=opening.lane,
            sequence_id=name,
            epoch=sequence.epoch,
            applied=sequence.applied,
            held_from=sequence.floor,
        )
        self.send(response)
        if sequence.held:
            self.send_outputs([(lane, sequence.floor, list(sequence.held))])

    def judge(self, sequence: Sequence | None, opening: OpenSequence) -> int | None:
        """The table of docs/protocol.md: the reason to refuse an open, if any."""
        mode = opening.mode
        if sequence is not None and not sequence.is_closed:
            if sequence.writer == opening.writer:
                if opening.attempt < sequence.attempt:
                    return Fault.STALE
                if opening.HasField("received") and opening.received < sequence.floor:
                    return Fault.OUT_OF_RANGE
                return None
            if mode == RESUME:
                return Fault.FENCED
            if mode == START:
                return Fault.ALREADY_EXISTS
            return None if opening.expected_epoch == sequence.epoch else Fault.CONFLICT
        if sequence is not None and sequence.writer == opening.writer:
            return Fault.SEQUENCE_CLOSED
        if mode in (RESUME, TAKEOVER):
            return Fault.NOT_FOUND
        assert mode in (START, START_OR_RESUME, RESTART)
        expected = 0 if sequence is None else sequence.epoch
        return None if opening.expected_epoch == expected else Fault.CONFLICT

    def let_go(self, number: int, *, is_close: bool) -> None:
        lane = self.lanes.get(number)
        if lane is None:
            self.fault(number, Fault.UNKNOWN_LANE)
            return
        while lane.queue:
            before = len(lane.queue)
            self.run([(lane, before)])
            if len(lane.queue) == before:
                break
        del self.lanes[number]
        lane.sequence.lane = None
        lane.sequence.is_closed = is_close
        reason = Closed.CLIENT if is_close else Closed.PARKED
        self.send(InferResponse(closed=[Closed(lane=number, reason=reason)]))

    def end(self) -> None:
        """The stream is over: its lanes are parked, what is queued is dropped."""
        self.is_over = True
        for lane in self.lanes.values():
            lane.sequence.lane = None
        self.lanes.clear()

    # -- runs

    def runnable(self) -> list[ServerLane]:
        most = self.server.limits.unacknowledged_steps_max
        return [
            lane
            for lane in self.lanes.values()
            if lane.queue and lane.sequence.applied - lane.sequence.floor < most
        ]

    def run(self, plan: list[tuple[ServerLane, int]]) -> None:
        """Run up to so many queued steps of each lane, and answer them in one response."""
        answers = []
        faults = []
        for lane, count in plan:
            sequence = lane.sequence
            first = sequence.applied
            rows = []
            taken = 0
            while taken < count and lane.queue:
                if sequence.applied - sequence.floor >= self.server.limits.unacknowledged_steps_max:
                    break
                taken += 1
                step, row = lane.queue.pop(0)
                if step < sequence.applied:
                    continue
                if step > sequence.applied:
                    if not lane.is_skipping:
                        lane.is_skipping = True
                        faults.append((lane, Fault.GAP))
                    continue
                if (row == POISON).any():
                    lane.is_skipping = True
                    faults.append((lane, Fault.INVALID_INPUT))
                    break
                lane.is_skipping = False
                sequence.total = sequence.total + row
                sequence.applied += 1
                sequence.held.append(sequence.total)
                rows.append(sequence.total)
            if rows:
                answers.append((lane, first, rows))
        if answers:
            self.send_outputs(answers)
        for lane, reason in faults:
            lane.as_sent = lane.sequence.applied
            self.fault(lane.number, reason, expected=lane.sequence.applied)

    # -- responses

    def send_outputs(self, answers: list) -> None:
        response = InferResponse()
        data = b""
        for lane, first, rows in answers:
            response.lane.append(lane.number)
            response.first_step.append(first)
            response.steps.append(len(rows))
            data += np.array(rows, "<i8").tobytes()
            self.in_flight[lane.number] = max(0, self.in_flight.get(lane.number, 0) - len(rows))
        response.outputs.add(data=data)
        self.send(
            response,
            [(lane.sequence, lane, first + len(rows)) for lane, first, rows in answers],
        )

    def fault(self, number: int, reason: int, *, expected: int = 0, epoch: int = 0) -> None:
        self.in_flight[number] = 0
        fault = Fault(lane=number, reason=reason, message="no", expected_step=expected, epoch=epoch)
        self.send(InferResponse(faults=[fault]))

    def send(self, response: InferResponse, log: list | None = None) -> None:
        if self.is_over:
            return
        last = self.outbox[-1] if self.outbox and self.merges_notices else None
        if last is not None and not last.outputs and not response.outputs:
            last.MergeFrom(response)
        else:
            self.outbox.append(response)
            self.sent_log.append(log or [])


__all__ = ["POISON", "ModelServer", "Stream", "make_contract"]
