"""Detaches sequences from their lanes, to be parked, ended or fenced."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sluice_service.batching.scheduler import Scheduler
from sluice_service.errors import LaneError
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.events import Ended, EndReason
from sluice_service.sequences.lifecycle import Phase, Sequence
from sluice_service.sequences.stream import Stream, Streams
from sluice_service.sequences.table import NONE, SequenceTable
from sluice_service.serving.faults import Faults
from sluice_service.serving.outputs import OutputBuffer


@dataclass(frozen=True, slots=True)
class Departure:
    """A durable sequence that has left its lane. Its client is told when the store has answered."""

    sequence: Sequence
    claim_id: bytes
    reason: EndReason
    ending: str  # why the sequence ends, if it does
    stream: int  # the number of the stream it was on, or NONE
    lane: int

    @property
    def is_current(self) -> bool:
        """True while the sequence is live here under the claim that it had when it left."""
        return self.sequence.is_under(self.claim_id)


class Attachments:
    """Detaches the sequences of one model from their lanes."""

    def __init__(
        self,
        table: SequenceTable,
        streams: Streams,
        scheduler: Scheduler,
        outputs: OutputBuffer,
        faults: Faults,
        metrics: ModelMetrics,
    ) -> None:
        self._table = table
        self._streams = streams
        self._scheduler = scheduler
        self._outputs = outputs
        self._faults = faults
        self._metrics = metrics
        # Called with each durable sequence that leaves a lane, before its client is told.
        self.on_departure: Callable[[Departure], None] = lambda _: None

    def detach(self, stream: Stream) -> Iterator[None]:
        """Park the lanes of a stream that ends, one for each step of the iterator.

        Running steps finish, queued steps are dropped.
        """
        if not self._streams.begin_end(stream):
            return
        slots = stream.live_slots().tolist()
        while True:
            # A lane is parked after all outputs that were delivered before have been held.
            if (outputs := stream.take_back()) is not None:
                self._outputs.hold(outputs)
            elif slots:
                slot = slots.pop()
                if self._table.stream[slot] == stream.number:
                    self._scheduler.drop(slot)
                    self._table.detach(self._table.at(slot))
            else:
                break
            yield
        self._streams.finish_end(stream)

    def park(self, sequence: Sequence) -> None:
        """Park a sequence because its client asks. A durable one is stored first."""
        if sequence.phase is not Phase.ATTACHED:
            return
        if sequence.is_durable:
            self.on_departure(self._depart(sequence, EndReason.PARKED, ""))
        else:
            self._leave(sequence, self._take_back(sequence), EndReason.PARKED)

    def fence(self, sequence: Sequence) -> None:
        """Detach a sequence, if it is on a lane, because another lane gets it."""
        if sequence.phase is Phase.ATTACHED:
            self._leave(sequence, self._take_back(sequence), EndReason.FENCED)

    def end(self, sequence: Sequence, reason: EndReason, ending: str) -> None:
        """Drop a sequence with its state; `ending` is the reason that a late open of it gets.

        A durable one is dropped when the store has dropped it.
        """
        if sequence.is_durable:
            self.on_departure(self.begin_end(sequence, reason, ending))
            return
        if sequence.phase is Phase.ATTACHED:
            self._leave(sequence, self._stream_of(sequence), reason)
        else:
            self._metrics.closed(reason.name.lower())
        self._table.end(sequence, ending)

    def begin_end(self, sequence: Sequence, reason: EndReason, ending: str) -> Departure:
        """Detach a durable sequence that ends. Returns the departure for the store."""
        self._table.touch(sequence)
        return self._depart(sequence, reason, ending)

    def lose(self, sequence: Sequence) -> None:
        """Drop a sequence that another process owns, or of which the store has a newer state."""
        if sequence.phase is Phase.ATTACHED:
            self._leave(sequence, self._stream_of(sequence), EndReason.FENCED)
        self._table.forget(sequence)

    def break_off(self, sequence: Sequence, error: LaneError) -> None:
        """Detach a sequence with a fault. Its client may open it again."""
        if sequence.phase is Phase.ATTACHED:
            stream = self._take_back(sequence)
            self._leave(sequence, stream, None)
            self._faults.tell(stream, int(self._table.lane[sequence.slot]), error)

    def conclude(self, departure: Departure, reason: EndReason) -> None:
        """Tell the client of a departure, if its stream is still open."""
        self._metrics.closed(reason.name.lower())
        stream = self._streams.get(departure.stream)
        if stream is not None:
            stream.ending_lanes -= 1
            stream.send(Ended(departure.lane, reason))

    def drain(self, is_safe: Callable[[int], bool]) -> None:
        """Tell every lane that the server stops. Its sequence stays as it is.

        A client whose slot is not safe notices it by the end of the stream instead.
        """
        for stream in self._streams:
            for slot in stream.live_slots().tolist():
                if is_safe(slot):
                    # It is not opened here again, so its outputs need not be held.
                    self._leave(self._table.at(slot), stream, EndReason.DRAINING)
            stream.is_drained = True
            stream.wake()

    def _depart(self, sequence: Sequence, reason: EndReason, ending: str) -> Departure:
        """Detach a sequence; `conclude` tells its client when the store has answered."""
        number, lane = NONE, 0
        if sequence.phase is Phase.ATTACHED:
            stream = self._take_back(sequence)
            number, lane = stream.number, int(self._table.lane[sequence.slot])
            stream.ending_lanes += 1
            self._leave(sequence, stream, None)
        return Departure(sequence, sequence.claim_id, reason, ending, number, lane)

    def _take_back(self, sequence: Sequence) -> Stream:
        """Hold a sequence's unacknowledged outputs with it. Returns its stream."""
        stream = self._stream_of(sequence)
        self._outputs.take_back(sequence, stream)
        return stream

    def _stream_of(self, sequence: Sequence) -> Stream:
        number = int(self._table.stream[sequence.slot])
        stream = self._streams.get(number) or self._streams.ending(number)
        assert stream is not None
        return stream

    def _leave(self, sequence: Sequence, stream: Stream, reason: EndReason | None) -> None:
        """Empty a sequence's queue and tell its lane why it ends; None: its lane is told later."""
        self._scheduler.drop(sequence.slot)
        self._table.detach(sequence)
        stream.end_lane(int(self._table.lane[sequence.slot]), reason)
        if reason is not None:
            self._metrics.closed(reason.name.lower())
