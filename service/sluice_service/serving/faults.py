"""Tells clients of the faults of their lanes, each after the outputs before it."""

from sluice_service.errors import LaneError, UnknownLaneError
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.stream import Stream, Streams
from sluice_service.sequences.table import SequenceTable


class Faults:
    """The faults of one model's lanes."""

    def __init__(self, table: SequenceTable, streams: Streams, metrics: ModelMetrics) -> None:
        self._table = table
        self._streams = streams
        self._metrics = metrics

    def tell(self, stream: Stream, lane: int, error: LaneError, *, expected_step: int = 0) -> None:
        """Tell a client of one lane's fault now, and count it."""
        stream.fault(lane, error, expected_step=expected_step)
        self._metrics.fault(error.status.name, error.reason.lower())

    def tell_unknown(self, stream: Stream, lane: int) -> None:
        """Tell a client that it named a lane it has not opened."""
        self.tell(
            stream,
            lane,
            UnknownLaneError(f"lane {lane} is not open on this stream; open it first"),
        )

    def stop(self, slot: int, error: LaneError) -> None:
        """Stop a sequence's lane at its present step: nothing of the chunk was applied."""
        table = self._table
        table.fault(slot)
        stream = self._streams.get(int(table.stream[slot]))
        if stream is not None:
            step = int(table.step[slot])
            stream.late_faults.append((slot, int(table.generation[slot]), step, error))
            self.release(stream)

    def release(self, stream: Stream) -> None:
        """Send the faults of a stream that no longer wait for outputs before them."""
        table, faults = self._table, stream.late_faults
        stream.late_faults = []
        for fault in faults:
            slot, generation, step, error = fault
            if table.generation[slot] != generation or table.stream[slot] != stream.number:
                continue  # its lane has ended
            if table.is_strict[slot] and table.durable[slot] < step:
                stream.late_faults.append(fault)
            else:
                self.tell(stream, int(table.lane[slot]), error, expected_step=step)
