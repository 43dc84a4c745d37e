"""One client's stream: its lanes, what waits to be sent on it, what waits to be acknowledged."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sluice_protos.sequences_pb2 import Closed, Durable, Fault, Limits, Opened
from sluice_service.arrays import Integers
from sluice_service.errors import LaneError
from sluice_service.sequences.states import Slots

LANES_MAX = 1 << 20
_LANES_START = 64
# Messages that wait to be sent, of whatever size.
_OUTBOX_MAX = 1 << 14
_UNKNOWN = -1  # no open has named the lane
_ENDED = -2  # the server ended it; what the client had already sent is ignored


@dataclass(slots=True)
class Delivery:
    """Outputs of one run for one stream: chunks of several lanes, rows one after another."""

    slots: Slots
    generations: NDArray[np.int64]
    lanes: Integers
    first: Integers
    lengths: Integers
    rows: int
    outputs: list[bytes]
    # How many responses the stream had sent when the last of this had gone.
    responses: int = 0

    def chunks(self) -> Iterator[tuple[int, int, int, list[bytes]]]:
        """Each chunk alone: (index, first, steps, outputs), the bytes copied."""
        rows, start = self.rows, 0
        chunks = zip(self.first.tolist(), self.lengths.tolist(), strict=True)
        for index, (first, steps) in enumerate(chunks):
            end = start + steps
            yield index, first, steps, [cut(output, rows, start, end) for output in self.outputs]
            start = end

    def chunk(self, index: int) -> tuple[int, int, list[bytes]]:
        """One chunk: (first, steps, outputs), the bytes copied."""
        steps, start = int(self.lengths[index]), int(self.lengths[:index].sum())
        outputs = [cut(output, self.rows, start, start + steps) for output in self.outputs]
        return int(self.first[index]), steps, outputs

    def only(self, chosen: NDArray[np.bool_]) -> "Delivery":
        """The same without the chunks that were not chosen [chunks]."""
        row_bytes = [len(output) // self.rows for output in self.outputs]
        rows = np.repeat(chosen, self.lengths)
        return replace(
            self,
            slots=self.slots[chosen],
            generations=self.generations[chosen],
            lanes=self.lanes[chosen],
            first=self.first[chosen],
            lengths=self.lengths[chosen],
            rows=int(rows.sum()),
            outputs=[
                np.frombuffer(output, np.uint8).reshape(self.rows, size)[rows].tobytes()
                for output, size in zip(self.outputs, row_bytes, strict=True)
            ],
        )

    def split(self, rows_max: int) -> Iterator["Delivery"]:
        """The same outputs in pieces of at most `rows_max` rows."""
        rows = self.rows
        if rows <= rows_max:
            yield self
            return
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        for start in range(0, rows, rows_max):
            stop = min(start + rows_max, rows)
            chosen = np.flatnonzero((starts < stop) & (ends > start))
            skipped = np.maximum(start - starts[chosen], 0)
            yield replace(
                self,
                slots=self.slots[chosen],
                generations=self.generations[chosen],
                lanes=self.lanes[chosen],
                first=self.first[chosen] + skipped,
                lengths=np.minimum(ends[chosen], stop) - starts[chosen] - skipped,
                rows=stop - start,
                outputs=[cut(output, rows, start, stop) for output in self.outputs],
            )


def _wake_nobody() -> None:
    pass


def cut(output: bytes, rows: int, start: int, stop: int) -> bytes:
    """Rows `start` to `stop` of an output that has `rows` rows."""
    row_bytes = len(output) // rows
    return output[start * row_bytes : stop * row_bytes]


Notice = Opened | Durable | Fault | Closed | Limits


class Stream:
    """What the host knows of one client's stream. Says when there is something to send."""

    def __init__(
        self,
        number: int,
        *,
        queue_steps_max: int,
        outbox_rows_max: int,
        on_change: Callable[[], None],
    ) -> None:
        self.number = number
        self.outbox: deque[Notice | Delivery] = deque()
        self.unacknowledged: deque[Delivery] = deque()
        # Beyond so many of them it is worth a look whether all are still due.
        self.unacknowledged_max = 64
        # Outputs that may not leave before they are durable.
        self.gated: deque[Delivery] = deque()
        # Faults that follow such outputs: slot, generation, step, error.
        self.late_faults: list[tuple[int, int, int, LaneError]] = []
        # Lanes that are ending: their Closed comes once the store has its part.
        self.ending_lanes = 0
        self.queued_steps = 0
        # True once a lane was opened that may ask for its outputs again.
        self.has_writer = False
        # True where who counts steps has a sequence's outputs before each chunk of it.
        self.has_counters = False
        self._outbox_rows = 0
        # True once the client will send no more: it ends when its queue is done.
        self.is_half_closed = False
        # True while nothing more is read, and once every lane has been told.
        self.is_draining = False
        self.is_drained = False
        self._queue_steps_max = queue_steps_max
        self._outbox_rows_max = outbox_rows_max
        self._on_change = on_change
        self._slots = np.full(_LANES_START, _UNKNOWN, np.int64)

    @property
    def is_ahead(self) -> bool:
        """True while nothing more is read.

        The client is beyond its credit, or reads too slowly, or the server stops.
        """
        return (
            self.is_draining
            or self.queued_steps > self._queue_steps_max
            or self._outbox_rows > self._outbox_rows_max
            or len(self.outbox) > _OUTBOX_MAX
        )

    def wake(self) -> None:
        """Have whoever serves this stream look at it."""
        self._on_change()

    def fall_silent(self) -> None:
        """Wake nobody any more: whoever served this stream may be forgotten."""
        self._on_change = _wake_nobody

    def send(self, item: Notice | Delivery) -> None:
        """Put something into the outbox."""
        self.outbox.append(item)
        if isinstance(item, Delivery):
            self._outbox_rows += item.rows
        self._on_change()

    def take_delivery(self) -> Delivery:
        """The delivery that stands first in the outbox, taken out of it."""
        item = self.outbox.popleft()
        assert isinstance(item, Delivery)
        self._outbox_rows -= item.rows
        return item

    def fault(self, lane: int, error: LaneError, *, expected_step: int = 0) -> None:
        """Tell the client of one lane's fault."""
        self.send(
            Fault(
                lane=lane,
                reason=error.reason,
                code=error.status.value[0],
                message=str(error),
                expected_step=expected_step,
                epoch=error.epoch,
            )
        )

    def finish_steps(self, steps: int) -> None:
        """Give back credit for steps that were run or dropped."""
        was_ahead = self.is_ahead
        self.queued_steps -= steps
        if was_ahead or self.is_half_closed:
            self._on_change()

    def slots(self, lanes: Integers) -> Slots:
        """The slots of `lanes` [n], negative where there is none."""
        try:
            return self._slots.take(lanes)
        except IndexError:
            inside = lanes < len(self._slots)
            return np.where(inside, self._slots[np.where(inside, lanes, 0)], _UNKNOWN)

    def slot(self, lane: int) -> int:
        """The slot of one lane, or a negative number."""
        return int(self._slots[lane]) if lane < len(self._slots) else _UNKNOWN

    def is_unknown(self, lane: int) -> bool:
        """True when no open has named the lane."""
        return self.slot(lane) == _UNKNOWN

    def put_lane(self, lane: int, slot: int) -> None:
        """Give a lane to a slot."""
        while lane >= len(self._slots):
            self._slots = np.concatenate([self._slots, np.full_like(self._slots, _UNKNOWN)])
        self._slots[lane] = slot

    def end_lane(self, lane: int, reason: "Closed.Reason.ValueType | None") -> None:
        """Take a lane away and, where there is a reason, tell the client."""
        self.put_lane(lane, _ENDED)
        if reason is not None:
            self.send(Closed(lane=lane, reason=reason))

    def live_slots(self) -> Slots:
        """The slots of all open lanes."""
        return self._slots[self._slots >= 0]

    def take_back(self) -> Delivery | None:
        """The oldest of what was delivered and not acknowledged, taken out; None: nothing is left.

        For a stream that has ended: notices that wait are dropped on the way.
        """
        for waiting in (self.unacknowledged, self.outbox, self.gated):
            while waiting:
                item = waiting.popleft()
                if isinstance(item, Delivery):
                    return item
        return None

    def deliveries(self) -> Iterator[Delivery]:
        """Everything delivered and not acknowledged, oldest first."""
        yield from self.unacknowledged
        for item in self.outbox:
            if isinstance(item, Delivery):
                yield item
        yield from self.gated
