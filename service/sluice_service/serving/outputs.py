"""Hands outputs to their streams, and holds them until their clients have acknowledged them.

Outputs stay with the stream as they were sent, one frame at a time. They are cut apart and held
with their sequences only when a stream ends or a sequence leaves its lane. So the common case
costs one comparison per response.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sluice_service.arrays import Integers
from sluice_service.sequences.events import Durable, Outputs, cut
from sluice_service.sequences.lifecycle import Held, Sequence
from sluice_service.sequences.stream import Stream, Streams
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.faults import Faults


class OutputBuffer:
    """Holds the unacknowledged outputs of one model, on their streams or with sequences."""

    def __init__(self, table: SequenceTable, streams: Streams, faults: Faults) -> None:
        self._table = table
        self._streams = streams
        self._faults = faults

    # To the clients.

    def deliver(self, outputs: Outputs, number: int) -> None:
        """Hand outputs to the stream of that number, or hold them if it has ended meanwhile.

        Outputs that must be durable first wait for `release`.
        """
        stream = self._streams.get(number)
        if stream is None:
            self._hold_late(outputs, number)
            return
        is_gated = self._is_gated(outputs)
        if is_gated is not None:
            stream.gated.append(outputs.only(is_gated))
            outputs = outputs.only(~is_gated)
        if outputs.rows:
            stream.send(outputs)

    def release(self) -> None:
        """Send the outputs that have become durable, and the faults after them."""
        for stream in self._streams:
            gated = stream.gated.copy()
            stream.gated.clear()
            for outputs in gated:
                is_same = self._table.is_same(outputs.slots, outputs.generations)
                # The others were taken back when their lanes ended.
                self.deliver(outputs.only(is_same), stream.number)
            self._faults.release(stream)

    def tell_durable(self, slots: list[int]) -> None:
        """Tell the clients of `slots` up to which step they may drop their inputs.

        For strict sequences the outputs mean the same. Clients without a writer retain no inputs.
        """
        table = self._table
        for slot in slots:
            stream = self._streams.get(int(table.stream[slot]))
            if stream is None or table.is_strict[slot] or table.at(slot).is_anonymous:
                continue
            stream.send(Durable(int(table.lane[slot]), int(table.durable[slot])))

    def has_gated(self, stream: Stream) -> bool:
        """True while outputs of lanes that are still on a stream wait for the store."""
        is_same = self._table.is_same
        return any(is_same(one.slots, one.generations).any() for one in stream.gated)

    def note_sent(self, stream: Stream, outputs: Outputs, responses: int) -> None:
        """Note that outputs were sent, the last of them in response number `responses`."""
        outputs.responses = responses
        if stream.has_writer and self._streams.get(stream.number) is stream:
            stream.unacknowledged.append(outputs)
            if len(stream.unacknowledged) > stream.unacknowledged_max:
                self._drop_received(stream)

    def resend(self, stream: Stream, sequence: Sequence, lane: int) -> None:
        """Send the outputs held from `received` on, once, on a new lane."""
        table, slot = self._table, sequence.slot
        received = int(table.received[slot])
        # Outputs of a client that counts steps are held again after they are sent.
        all_held, sequence.held = sequence.held, []
        for held in all_held:
            skipped = max(received - held.first, 0)
            if skipped < held.steps:
                outputs = Outputs(
                    np.array([slot]),
                    table.generation[slot : slot + 1].copy(),
                    np.array([lane]),
                    np.array([held.first + skipped]),
                    np.array([held.steps - skipped]),
                    held.steps - skipped,
                    [cut(output, held.steps, skipped, held.steps) for output in held.outputs],
                )
                self.deliver(outputs, stream.number)

    def _is_gated(self, outputs: Outputs) -> NDArray[np.bool_] | None:
        """[chunks] which must not be sent before they are durable; None: none of them."""
        table, slots = self._table, outputs.slots
        if not table.has_strict:
            return None
        is_strict = table.is_strict[slots]
        gated = is_strict & (table.durable[slots] < outputs.first + outputs.lengths)
        return gated if gated.any() else None

    # From the clients.

    def acknowledge(self, stream: Stream, lanes: Integers, received: Integers) -> None:
        """Note that the client has the outputs of `lanes` [n] up to `received` [n]."""
        slots = stream.slots(lanes)
        is_open = slots >= 0
        slots, received = slots[is_open], received[is_open]
        if len(slots) > 1:
            # The highest step of each slot.
            order = np.lexsort((received, slots))
            slots, received = slots[order], received[order]
            is_last = np.r_[slots[1:] != slots[:-1], True]
            slots, received = slots[is_last], received[is_last]
        if len(slots):
            self._table.acknowledge(slots, received)
        self._drop_received(stream)

    def acknowledge_responses(self, stream: Stream, responses: int) -> None:
        """Note that the client has read that many responses of the stream."""
        waiting = stream.unacknowledged
        while waiting and waiting[0].responses <= responses:
            outputs = waiting.popleft()
            slots, ends = outputs.slots, outputs.first + outputs.lengths
            is_same = self._table.is_same(slots, outputs.generations)
            if not is_same.all():
                slots, ends = slots[is_same], ends[is_same]
            self._table.acknowledge(slots, ends)

    def _drop_received(self, stream: Stream) -> None:
        """Drop outputs that have arrived, or whose sequence has left the stream."""
        due = [outputs for outputs in stream.unacknowledged if self._is_due(outputs).any()]
        stream.unacknowledged.clear()
        stream.unacknowledged.extend(due)
        # Look again only after as many more outputs, to keep this cheap.
        stream.unacknowledged_max = 2 * len(due) + 64

    # With their sequences.

    def take_back(self, sequence: Sequence, stream: Stream) -> None:
        """Hold a sequence's unacknowledged outputs with it, and no longer on its stream."""
        table, slot = self._table, sequence.slot
        for outputs in stream.outputs():
            for index in np.flatnonzero(outputs.slots == slot).tolist():
                is_same = table.generation[slot] == outputs.generations[index]
                end = outputs.first[index] + outputs.lengths[index]
                if is_same and table.received[slot] < end:
                    sequence.held.append(Held(*outputs.chunk(index)))

    def hold(self, outputs: Outputs) -> None:
        """Hold the unacknowledged part of outputs with their sequences."""
        is_due = self._is_due(outputs)
        if is_due.any():
            due = outputs.only(is_due)
            for index, first, steps, rows in due.chunks():
                sequence = self._table.at(int(due.slots[index]))
                sequence.held.append(Held(first, steps, rows))

    def hold_counted(
        self, stream: Stream, lane: int, first: int, steps: int, rows: list[bytes]
    ) -> None:
        """Hold outputs that were sent to a client that counts its steps, until acknowledged."""
        slot = stream.slot(lane)
        if slot >= 0:
            sequence, received = self._table.at(slot), self._table.received[slot]
            due = [held for held in sequence.held if held.first + held.steps > received]
            sequence.held = [*due, Held(first, steps, rows)]

    def due(self, numbers: Integers) -> Iterator[Outputs]:
        """The outputs of these streams that may still be asked for, oldest first in each."""
        for number in np.unique(numbers).tolist():
            stream = self._streams.get(number) or self._streams.ending(number)
            for outputs in stream.outputs() if stream is not None else ():
                is_due = self._is_due(outputs)
                if is_due.all():
                    yield outputs
                elif is_due.any():
                    yield outputs.only(is_due)

    def _hold_late(self, outputs: Outputs, number: int) -> None:
        """Hold outputs of a stream that has ended, after those that it still has."""
        if (ending := self._streams.ending(number)) is None:
            self.hold(outputs)
            return
        # A sequence that has left the stream has already taken all earlier outputs.
        has_left = self._table.stream[outputs.slots] != number
        if has_left.any():
            self.hold(outputs.only(has_left))
            outputs = outputs.only(~has_left)
        if outputs.rows:
            ending.gated.append(outputs)

    def _is_due(self, outputs: Outputs) -> NDArray[np.bool_]:
        """[chunks] whether each chunk may be asked for again."""
        table = self._table
        due = table.received[outputs.slots] < outputs.first + outputs.lengths
        return due & table.is_same(outputs.slots, outputs.generations)
