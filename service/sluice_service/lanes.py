"""Which sequence is on which lane: opening, parting, and the outputs held in between."""

import uuid
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from sluice_protos.sequences_pb2 import Closed, Limits, Opened, OpenSequence
from sluice_service.arena import Arena
from sluice_service.claims import TABLE, Claim, Record, decide
from sluice_service.clock import AwakeClock
from sluice_service.errors import (
    DrainingError,
    InvalidInputError,
    LaneError,
    LaneInUseError,
    LimitError,
    OutOfRangeError,
    UnknownLaneError,
)
from sluice_service.inputs import InputRules
from sluice_service.metrics import ModelMetrics
from sluice_service.ragged import Integers
from sluice_service.scheduler import Scheduler
from sluice_service.sequences import Held, Phase, Sequence, Sequences
from sluice_service.streams import LANES_MAX, Delivery, Stream, cut

Reason = Closed.Reason
# Of a sequence's id and of a writer.
_NAME_BYTES_MAX = 512


class Lanes:
    """The streams of one model and the sequences on their lanes."""

    def __init__(
        self,
        arena: Arena,
        sequences: Sequences,
        scheduler: Scheduler,
        inputs: InputRules,
        limits: Limits,
        clock: AwakeClock,
        metrics: ModelMetrics,
        *,
        outbox_rows_max: int,
    ) -> None:
        self.is_draining = False
        self._arena = arena
        self._sequences = sequences
        self._scheduler = scheduler
        self._inputs = inputs
        self._limits = limits
        self._outbox_rows_max = outbox_rows_max
        self._clock = clock
        self._metrics = metrics
        self._streams: dict[int, Stream] = {}
        self._stream_number = 0

    def __len__(self) -> int:
        return len(self._streams)

    def stream(self, number: int) -> Stream | None:
        """The stream of that number, if it is still there."""
        return self._streams.get(number)

    # Streams.

    def attach(self, on_change: Callable[[], None]) -> Stream:
        """A new stream; its first word to the client is the limits."""
        self._stream_number += 1
        stream = Stream(
            self._stream_number,
            queue_steps_max=self._limits.credit_steps,
            outbox_rows_max=self._outbox_rows_max,
            on_change=on_change,
        )
        self._streams[stream.number] = stream
        stream.send(self._limits)
        return stream

    def detach(self, stream: Stream) -> None:
        """Park every lane of a stream that ends: what runs finishes, what is queued is dropped."""
        if self._streams.pop(stream.number, None) is None:
            return
        for slot in stream.live_slots().tolist():
            self._scheduler.drop(slot)
            self._sequences.detach(self._sequences.at(slot))
        for delivery in stream.deliveries():
            self._hold(delivery)

    def stop_reading(self) -> None:
        """Open nothing new, and read no further from any stream."""
        self.is_draining = True
        for stream in self._streams.values():
            stream.is_draining = True

    def drain(self) -> None:
        """Tell every lane that the server stops; its sequence stays as it is."""
        for stream in list(self._streams.values()):
            for slot in stream.live_slots().tolist():
                self.part(self._sequences.at(slot), Closed.DRAINING)
            stream.is_drained = True
            stream.wake()

    # Opening.

    def open(self, stream: Stream, requests: Iterable[OpenSequence]) -> None:
        """Give each request its lane and its sequence, or tell its fault. Between runs only."""
        for request in requests:
            try:
                self._open(stream, request)
            except LaneError as error:
                if request.lane < LANES_MAX and stream.slot(request.lane) < 0:
                    # Chunks that were sent with the open are not worth a fault each.
                    stream.end_lane(request.lane, None)
                self.tell(stream, request.lane, error)

    def _open(self, stream: Stream, request: OpenSequence) -> None:
        if self.is_draining:
            raise DrainingError("this server is stopping; open the sequence at another")
        if request.lane >= LANES_MAX:
            raise InvalidInputError(f"lanes are numbers below {LANES_MAX}, not {request.lane}")
        if stream.slot(request.lane) >= 0:
            raise LaneInUseError(
                f"lane {request.lane} has a sequence; take another lane or wait for its Closed"
            )
        _check_names(request)
        if not request.sequence_id:
            request.sequence_id = uuid.uuid4().hex
        claim = decide(self._sequences.record(request.sequence_id), request)
        found = self._sequences.get(request.sequence_id)
        if found is None:
            sequence = self._create(request)
        else:
            sequence = found
            self._claim(sequence, request, claim)
        table, slot = self._sequences, sequence.slot
        table.attach(sequence, stream.number, request.lane, self._clock.now())
        stream.put_lane(request.lane, slot)
        stream.has_writer |= not sequence.is_anonymous
        stream.send(
            Opened(
                lane=request.lane,
                sequence_id=sequence.sequence_id,
                epoch=sequence.record.epoch,
                applied=int(table.step[slot]),
                held_from=table.held_from(slot),
            )
        )
        self._resend(stream, sequence, request.lane)
        self._metrics.opened(claim.name.lower())

    def _create(self, request: OpenSequence) -> Sequence:
        has_state = request.HasField("state")
        row = self._inputs.state_row(request.state) if has_state else None
        if self._arena.is_full:
            raise LimitError(
                f"{len(self._sequences)} sequences are alive, as many as sequences_max allows; "
                "close some, or serve with a higher --sequences-max"
            )
        record = Record(
            request.writer, request.attempt, self._sequences.raise_epoch(), is_alive=True
        )
        return self._sequences.create(
            request.sequence_id,
            self._arena.allocate(row),
            record,
            step=request.state.step if has_state else 0,
            now=self._clock.now(),
        )

    def _claim(self, sequence: Sequence, request: OpenSequence, claim: Claim) -> None:
        """Take a live sequence from its lane, and from its writer where the claim says so."""
        table, slot = self._sequences, sequence.slot
        received, step = table.held_from(slot), int(table.step[slot])
        is_wiped = claim is Claim.WIPE
        row = (
            self._inputs.state_row(request.state)
            if is_wiped and request.HasField("state")
            else None
        )
        if request.HasField("received") and not is_wiped:
            if not received <= request.received <= step:
                raise OutOfRangeError(
                    f"sequence {request.sequence_id!r} holds outputs {received} to {step}, "
                    f"not from {request.received}; resume with received {received} or more"
                )
            received = request.received
        elif claim is Claim.TAKE:
            received = step  # outputs of another handle are not this one's
        self.part(sequence, Closed.FENCED)
        table.received[slot] = received
        if is_wiped:
            if row is None:
                self._arena.reset(slot)
            else:
                self._arena.put(np.array([slot]), row[np.newaxis])
            table.rewind(slot, 0 if row is None else request.state.step)
            sequence.held.clear()
        if claim is not Claim.RESUME:
            sequence.record.writer = request.writer
            sequence.record.epoch = table.raise_epoch()
        sequence.record.attempt = request.attempt

    # Parting.

    def part(self, sequence: Sequence, reason: "Reason.ValueType") -> None:
        """Take a sequence from its lane, if it has one; unacknowledged outputs stay with it."""
        if sequence.phase is Phase.ATTACHED:
            stream = self._streams[int(self._sequences.stream[sequence.slot])]
            for delivery in stream.deliveries():
                self._hold(delivery, only=sequence.slot)
            self._leave(sequence, stream, reason)

    def end(self, sequence: Sequence, reason: "Reason.ValueType", ending: str) -> None:
        """Drop a sequence, state and all; `ending` is what a late open of it is told."""
        if sequence.phase is Phase.ATTACHED:
            stream = self._streams[int(self._sequences.stream[sequence.slot])]
            self._leave(sequence, stream, reason)
        else:
            self._metrics.closed(Reason.Name(reason).lower())
        self._sequences.end(sequence, ending, self._clock.now())
        self._arena.free(sequence.slot)

    def _leave(self, sequence: Sequence, stream: Stream, reason: "Reason.ValueType") -> None:
        """Empty a sequence's queue and tell its lane why it ends."""
        self._scheduler.drop(sequence.slot)
        self._sequences.detach(sequence)
        stream.end_lane(int(self._sequences.lane[sequence.slot]), reason)
        self._metrics.closed(Reason.Name(reason).lower())

    # Faults.

    def tell(self, stream: Stream, lane: int, error: LaneError, *, expected_step: int = 0) -> None:
        """Tell a client of one lane's fault, and count it."""
        stream.fault(lane, error, expected_step=expected_step)
        self._metrics.fault(error.status.name, type(error).reason_name())

    def tell_unknown(self, stream: Stream, lane: int) -> None:
        """Tell a client that it named a lane it has not opened."""
        self.tell(
            stream,
            lane,
            UnknownLaneError(f"lane {lane} is not open on this stream; open it first"),
        )

    def fault(self, slot: int, error: LaneError) -> None:
        """Stop a sequence's lane at the step it stands: nothing of the chunk was applied."""
        table = self._sequences
        table.stop(slot)
        stream = self._streams.get(int(table.stream[slot]))
        if stream is not None:
            self.tell(stream, int(table.lane[slot]), error, expected_step=int(table.step[slot]))

    def finish_steps(self, number: int, steps: int) -> None:
        """Give a stream, if it is still there, credit back for steps that were run or dropped."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.finish_steps(steps)

    # Outputs.

    def deliver(self, delivery: Delivery, number: int) -> None:
        """Hand outputs to a stream, or keep them where it went away while they were computed."""
        stream = self._streams.get(number)
        if stream is None:
            self._hold(delivery)
        else:
            stream.send(delivery)

    def sending(self, stream: Stream, delivery: Delivery, responses: int) -> None:
        """A delivery is about to go out, the last of it as response number `responses`."""
        delivery.responses = responses
        if stream.has_writer and stream.number in self._streams:
            stream.unacknowledged.append(delivery)
            if len(stream.unacknowledged) > stream.unacknowledged_max:
                self._forget_received(stream)

    def acknowledge(self, stream: Stream, lanes: Integers, received: Integers) -> None:
        """The client has the outputs of `lanes` [n] up to `received` [n]."""
        slots = stream.slots(lanes)
        for slot, step in zip(slots.tolist(), received.tolist(), strict=True):
            if slot >= 0:
                self._acknowledge(np.array([slot]), np.array([step]))
        self._forget_received(stream)

    def acknowledge_responses(self, stream: Stream, responses: int) -> None:
        """The client has read that many responses of the stream."""
        waiting = stream.unacknowledged
        while waiting and waiting[0].responses <= responses:
            delivery = waiting.popleft()
            slots, ends = delivery.slots, delivery.first + delivery.lengths
            is_same = self._sequences.is_same(slots, delivery.generations)
            if not is_same.all():
                slots, ends = slots[is_same], ends[is_same]
            self._acknowledge(slots, ends)

    def _forget_received(self, stream: Stream) -> None:
        """Let go of what nobody can ask for again: it arrived, or its sequence went elsewhere."""
        due = [delivery for delivery in stream.unacknowledged if self._is_due(delivery)]
        stream.unacknowledged.clear()
        stream.unacknowledged.extend(due)
        # Looking again only after as many more keeps this cheap.
        stream.unacknowledged_max = 2 * len(due) + 64

    def _acknowledge(self, slots: Integers, ends: Integers) -> None:
        """Outputs of `slots` [n], all different, have arrived up to `ends` [n]."""
        table = self._sequences
        before = table.received[slots]
        # Nobody can have more than was applied, whatever he says; and what has
        # arrived never becomes less.
        table.received[slots] = np.maximum(before, np.minimum(ends, table.step[slots]))
        self._scheduler.acknowledged(slots)

    def _is_due(self, delivery: Delivery) -> bool:
        """True while some output of a delivery may be asked for again."""
        return bool(self._due(delivery).any())

    def _due(self, delivery: Delivery) -> NDArray[np.bool_]:
        """[chunks] whether each chunk of a delivery may be asked for again."""
        table = self._sequences
        due = table.received[delivery.slots] < delivery.first + delivery.lengths
        return due & table.is_same(delivery.slots, delivery.generations)

    def _hold(self, delivery: Delivery, *, only: int | None = None) -> None:
        """Give a delivery's outputs to their sequences; to that in slot `only`, where given."""
        wanted = self._due(delivery)
        if only is not None:
            wanted &= delivery.slots == only
        if wanted.any():
            kept = delivery.only(wanted)
            for index, first, steps, outputs in kept.chunks():
                sequence = self._sequences.at(int(kept.slots[index]))
                sequence.held.append(Held(first, steps, outputs))

    def _resend(self, stream: Stream, sequence: Sequence, lane: int) -> None:
        """Send what is held from `received` on, once, on the new lane."""
        table, slot = self._sequences, sequence.slot
        received = int(table.received[slot])
        for held in sequence.held:
            skipped = max(received - held.first, 0)
            if skipped < held.steps:
                stream.send(
                    Delivery(
                        np.array([slot]),
                        table.generation[slot : slot + 1].copy(),
                        np.array([lane]),
                        np.array([held.first + skipped]),
                        np.array([held.steps - skipped]),
                        held.steps - skipped,
                        [cut(output, held.steps, skipped, held.steps) for output in held.outputs],
                    )
                )
        sequence.held.clear()


def _check_names(request: OpenSequence) -> None:
    """Refuse what no open can mean. Raises InvalidInputError."""
    if request.mode not in TABLE:
        raise InvalidInputError(f"there is no open mode {request.mode}")
    for name, size in (
        ("sequence_id", len(request.sequence_id.encode())),
        ("writer", len(request.writer)),
    ):
        if size > _NAME_BYTES_MAX:
            raise InvalidInputError(f"{name} has {size} bytes; {_NAME_BYTES_MAX} are allowed")
