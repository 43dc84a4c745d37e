"""Which sequence is on which lane: parting, faults, and the outputs held in between."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sluice_service.arrays import Integers
from sluice_service.batching.scheduler import Scheduler
from sluice_service.errors import LaneError, UnknownLaneError
from sluice_service.metrics import ModelMetrics
from sluice_service.runtime.clock import AwakeClock
from sluice_service.sequences.events import Ended, EndReason, Limits, Outputs, cut
from sluice_service.sequences.states import Arena
from sluice_service.sequences.stream import Stream
from sluice_service.sequences.table import NONE, Held, Phase, Sequence, Sequences


@dataclass(frozen=True, slots=True)
class Parting:
    """A durable sequence that left its lane, until the store has its part in that."""

    sequence: Sequence
    claim_id: bytes
    reason: EndReason
    ending: str  # of a sequence that ends: why
    stream: int  # the number of the one it was on, or NONE
    lane: int


class Lanes:
    """The streams of one model and the sequences on their lanes."""

    def __init__(
        self,
        arena: Arena,
        sequences: Sequences,
        scheduler: Scheduler,
        limits: Limits,
        clock: AwakeClock,
        metrics: ModelMetrics,
        *,
        outbox_rows_max: int,
    ) -> None:
        self.is_draining = False
        self.is_unloading = False  # what lives goes on, nothing begins
        self._arena = arena
        self._sequences = sequences
        self._scheduler = scheduler
        self._limits = limits
        self._outbox_rows_max = outbox_rows_max
        self._clock = clock
        self._metrics = metrics
        self._streams: dict[int, Stream] = {}
        # Those that have ended, while their lanes are being parked.
        self._ended: dict[int, Stream] = {}
        self._stream_number = 0
        # Durable sequences that leave; and the sign that the store has something to do.
        self.parks: list[Parting] = []
        self.closings: list[Parting] = []
        self.is_due = asyncio.Event()

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

    def detach(self, stream: Stream) -> Iterator[None]:
        """Park every lane of a stream that ends, one after another as the iterator is drawn from.

        What runs finishes, what is queued is dropped.
        """
        number = stream.number
        if self._streams.pop(number, None) is None:
            return
        self._ended[number] = stream
        stream.fall_silent()
        slots = stream.live_slots().tolist()
        while True:
            # A lane is parked when nothing that was delivered before is left to be held.
            if (delivery := stream.take_back()) is not None:
                self._hold(delivery)
            elif slots:
                slot = slots.pop()
                if self._sequences.stream[slot] == number:
                    self._scheduler.drop(slot)
                    self._sequences.detach(self._sequences.at(slot))
            else:
                break
            yield
        del self._ended[number]

    def stop_reading(self) -> None:
        """Open nothing new, and read no further from any stream."""
        self.is_draining = True
        for stream in self._streams.values():
            stream.is_draining = True

    def drain(self, is_safe: Callable[[int], bool]) -> None:
        """Tell every lane that the server stops; its sequence stays as it is.

        Where what is in slot is not safe, its client learns it from the end of the stream.
        """
        for stream in list(self._streams.values()):
            for slot in stream.live_slots().tolist():
                if is_safe(slot):
                    # Nobody opens it here again: what it has put out need not be held.
                    self._leave(self._sequences.at(slot), stream, EndReason.DRAINING)
            stream.is_drained = True
            stream.wake()

    # Parting.

    def part(self, sequence: Sequence, reason: EndReason) -> None:
        """Take a sequence from its lane, if it has one; unacknowledged outputs stay with it."""
        if sequence.phase is Phase.ATTACHED:
            if sequence.is_durable and reason == EndReason.PARKED:
                self.parks.append(self._leave_quietly(sequence, reason, ""))
            else:
                self._leave(sequence, self._take_back(sequence), reason)

    def end(self, sequence: Sequence, reason: EndReason, ending: str) -> None:
        """Drop a sequence, state and all; `ending` is what a late open of it is told.

        A durable one is dropped once the store has dropped it.
        """
        if sequence.is_durable:
            self.closings.append(self.begin_end(sequence, reason, ending))
            return
        if sequence.phase is Phase.ATTACHED:
            self._leave(sequence, self._stream_of(sequence), reason)
        else:
            self._metrics.closed(reason.name.lower())
        self._sequences.end(sequence, ending, self._clock.now())
        self._arena.free(sequence.slot)

    def begin_end(self, sequence: Sequence, reason: EndReason, ending: str) -> Parting:
        """Take a durable sequence that ends from its lane; what the store is to be told."""
        self._sequences.active[sequence.slot] = self._clock.now()
        return self._leave_quietly(sequence, reason, ending)

    def lose(self, sequence: Sequence) -> None:
        """Forget a sequence that is another process's now, or goes on from the store's copy."""
        if sequence.phase is Phase.ATTACHED:
            self._leave(sequence, self._stream_of(sequence), EndReason.FENCED)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Drop what memory has of a sequence that is on no lane; the store knows the rest."""
        self._sequences.forget(sequence)
        self._arena.free(sequence.slot)

    def break_off(self, sequence: Sequence, error: LaneError) -> None:
        """Take a sequence from its lane with a fault; its client may open it again."""
        if sequence.phase is Phase.ATTACHED:
            stream = self._take_back(sequence)
            self._leave(sequence, stream, None)
            self.tell(stream, int(self._sequences.lane[sequence.slot]), error)

    def conclude(self, parting: Parting, reason: EndReason) -> None:
        """Tell the client of a sequence's parting, if its stream is still there."""
        self._metrics.closed(reason.name.lower())
        stream = self._streams.get(parting.stream)
        if stream is not None:
            stream.ending_lanes -= 1
            stream.send(Ended(parting.lane, reason))

    def _leave_quietly(self, sequence: Sequence, reason: EndReason, ending: str) -> Parting:
        """Take a sequence from its lane; `conclude` tells the client when the time has come."""
        number, lane = NONE, 0
        if sequence.phase is Phase.ATTACHED:
            stream = self._take_back(sequence)
            number, lane = stream.number, int(self._sequences.lane[sequence.slot])
            stream.ending_lanes += 1
            self._leave(sequence, stream, None)
        self.is_due.set()
        return Parting(sequence, sequence.claim_id, reason, ending, number, lane)

    def _take_back(self, sequence: Sequence) -> Stream:
        """Let a sequence hold what its stream has not acknowledged; the stream."""
        stream, slot = self._stream_of(sequence), sequence.slot
        for delivery in stream.deliveries():
            for index in np.flatnonzero(delivery.slots == slot).tolist():
                self._hold_chunk(delivery, index)
        return stream

    def _stream_of(self, sequence: Sequence) -> Stream:
        number = int(self._sequences.stream[sequence.slot])
        return self._streams.get(number) or self._ended[number]

    def _leave(self, sequence: Sequence, stream: Stream, reason: EndReason | None) -> None:
        """Empty a sequence's queue and tell its lane why it ends; None: somebody else will."""
        self._scheduler.drop(sequence.slot)
        self._sequences.detach(sequence)
        stream.end_lane(int(self._sequences.lane[sequence.slot]), reason)
        if reason is not None:
            self._metrics.closed(reason.name.lower())

    # Faults.

    def tell(self, stream: Stream, lane: int, error: LaneError, *, expected_step: int = 0) -> None:
        """Tell a client of one lane's fault, and count it."""
        stream.fault(lane, error, expected_step=expected_step)
        self._metrics.fault(error.status.name, error.reason.lower())

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
            step = int(table.step[slot])
            stream.late_faults.append((slot, int(table.generation[slot]), step, error))
            self._tell_late(stream)

    def _tell_late(self, stream: Stream) -> None:
        """Tell of the faults whose lanes' outputs before them have left, or may leave."""
        table, faults = self._sequences, stream.late_faults
        stream.late_faults = []
        for fault in faults:
            slot, generation, step, error = fault
            if table.generation[slot] != generation or table.stream[slot] != stream.number:
                continue  # its lane has ended
            if table.is_strict[slot] and table.durable[slot] < step:
                stream.late_faults.append(fault)
            else:
                self.tell(stream, int(table.lane[slot]), error, expected_step=step)

    def finish_steps(self, number: int, steps: int) -> None:
        """Give a stream, if it is still there, credit back for steps that were run or dropped."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.finish_steps(steps)

    # Outputs.

    def deliver(self, delivery: Outputs, number: int) -> None:
        """Hand outputs to a stream, or keep them where it went away while they were computed."""
        stream = self._streams.get(number)
        if stream is None:
            self._keep_late(delivery, number)
            return
        is_gated = self._is_gated(delivery)
        if is_gated is not None:
            stream.gated.append(delivery.only(is_gated))
            delivery = delivery.only(~is_gated)
        if delivery.rows:
            stream.send(delivery)

    def _keep_late(self, delivery: Outputs, number: int) -> None:
        """Keep what nobody waits for any more, behind what its stream still has."""
        if (ended := self._ended.get(number)) is None:
            self._hold(delivery)
            return
        # Whoever has left the stream has taken all back that came before this.
        has_left = self._sequences.stream[delivery.slots] != number
        if has_left.any():
            self._hold(delivery.only(has_left))
            delivery = delivery.only(~has_left)
        if delivery.rows:
            ended.gated.append(delivery)

    def release(self) -> None:
        """Let go out what has become durable."""
        for stream in self._streams.values():
            gated = stream.gated.copy()
            stream.gated.clear()
            for delivery in gated:
                is_same = self._sequences.is_same(delivery.slots, delivery.generations)
                # What is not the same any more was taken back when its lane ended.
                self.deliver(delivery.only(is_same), stream.number)
            self._tell_late(stream)

    def has_gated(self, stream: Stream) -> bool:
        """True while outputs of lanes that are still on a stream wait for the store."""
        is_same = self._sequences.is_same
        return any(is_same(one.slots, one.generations).any() for one in stream.gated)

    def _is_gated(self, delivery: Outputs) -> NDArray[np.bool_] | None:
        """[chunks] which may not leave yet, for want of the store; None: all may."""
        table, slots = self._sequences, delivery.slots
        if not table.has_strict:
            return None
        is_strict = table.is_strict[slots]
        gated = is_strict & (table.durable[slots] < delivery.first + delivery.lengths)
        return gated if gated.any() else None

    def sending(self, stream: Stream, delivery: Outputs, responses: int) -> None:
        """A delivery is about to go out, the last of it as response number `responses`."""
        delivery.responses = responses
        if stream.has_writer and stream.number in self._streams:
            stream.unacknowledged.append(delivery)
            if len(stream.unacknowledged) > stream.unacknowledged_max:
                self._forget_received(stream)

    def acknowledge(self, stream: Stream, lanes: Integers, received: Integers) -> None:
        """The client has the outputs of `lanes` [n] up to `received` [n]."""
        slots = stream.slots(lanes)
        is_open = slots >= 0
        slots, received = slots[is_open], received[is_open]
        if len(slots) > 1:
            # Of each slot the furthest step.
            order = np.lexsort((received, slots))
            slots, received = slots[order], received[order]
            is_last = np.r_[slots[1:] != slots[:-1], True]
            slots, received = slots[is_last], received[is_last]
        if len(slots):
            self._acknowledge(slots, received)
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

    def due(self, streams: Integers) -> Iterator[Outputs]:
        """What may still be asked for of the outputs of these streams, oldest first in each."""
        for number in np.unique(streams).tolist():
            stream = self._streams.get(number) or self._ended.get(number)
            for delivery in stream.deliveries() if stream is not None else ():
                due = self._due(delivery)
                if due.all():
                    yield delivery
                elif due.any():
                    yield delivery.only(due)

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
        table.bound(slots)
        self._scheduler.unbound(slots)

    def _is_due(self, delivery: Outputs) -> bool:
        """True while some output of a delivery may be asked for again."""
        return bool(self._due(delivery).any())

    def _due(self, delivery: Outputs) -> NDArray[np.bool_]:
        """[chunks] whether each chunk of a delivery may be asked for again."""
        table = self._sequences
        due = table.received[delivery.slots] < delivery.first + delivery.lengths
        return due & table.is_same(delivery.slots, delivery.generations)

    def _hold(self, delivery: Outputs) -> None:
        """Give a delivery's outputs to their sequences."""
        wanted = self._due(delivery)
        if wanted.any():
            kept = delivery.only(wanted)
            for index, first, steps, outputs in kept.chunks():
                sequence = self._sequences.at(int(kept.slots[index]))
                sequence.held.append(Held(first, steps, outputs))

    def _hold_chunk(self, delivery: Outputs, index: int) -> None:
        """As `_hold`, of one chunk."""
        table, slot = self._sequences, int(delivery.slots[index])
        is_same = table.generation[slot] == delivery.generations[index]
        if is_same and table.received[slot] < delivery.first[index] + delivery.lengths[index]:
            table.at(slot).held.append(Held(*delivery.chunk(index)))

    def resend(self, stream: Stream, sequence: Sequence, lane: int) -> None:
        """Send what is held from `received` on, once, on the new lane."""
        table, slot = self._sequences, sequence.slot
        received = int(table.received[slot])
        # Where it is counted, what goes out is kept again.
        kept, sequence.held = sequence.held, []
        for held in kept:
            skipped = max(received - held.first, 0)
            if skipped < held.steps:
                delivery = Outputs(
                    np.array([slot]),
                    table.generation[slot : slot + 1].copy(),
                    np.array([lane]),
                    np.array([held.first + skipped]),
                    np.array([held.steps - skipped]),
                    held.steps - skipped,
                    [cut(output, held.steps, skipped, held.steps) for output in held.outputs],
                )
                self.deliver(delivery, stream.number)

    def keep(self, stream: Stream, lane: int, first: int, steps: int, outputs: list[bytes]) -> None:
        """Hold outputs that have gone to a client that counts its steps, until acknowledged."""
        slot = stream.slot(lane)
        if slot >= 0:
            sequence, received = self._sequences.at(slot), self._sequences.received[slot]
            due = [held for held in sequence.held if held.first + held.steps > received]
            sequence.held = [*due, Held(first, steps, outputs)]
