"""Holds one client's stream: its lanes, its outbox, and its unacknowledged outputs."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from sluice_service.arrays import Integers
from sluice_service.errors import LaneError
from sluice_service.sequences.events import Ended, EndReason, Event, Failed, Limits, Outputs
from sluice_service.sequences.states import Slots

LANES_MAX = 1 << 20
_LANES_START = 64
# Waiting messages, of any size.
_OUTBOX_MAX = 1 << 14
_UNKNOWN = -1  # no open has named the lane
_ENDED = -2  # the server ended it; chunks that the client had already sent are ignored


def _do_nothing() -> None:
    pass


class Stream:
    """The host's view of one client's stream. It reports when there is something to send."""

    def __init__(
        self,
        number: int,
        *,
        queue_steps_max: int,
        outbox_rows_max: int,
        on_change: Callable[[], None],
    ) -> None:
        self.number = number
        self.outbox: deque[Event] = deque()
        self.unacknowledged: deque[Outputs] = deque()
        # Beyond this many of them, those that are not due any more are searched for.
        self.unacknowledged_max = 64
        # Outputs that may not be sent before they are durable.
        self.gated: deque[Outputs] = deque()
        # Faults that follow such outputs: slot, generation, step, error.
        self.late_faults: list[tuple[int, int, int, LaneError]] = []
        # Lanes that are ending. Their Closed is sent when the store has answered.
        self.ending_lanes = 0
        self.queued_steps = 0
        # True when a lane has been opened that may ask for its outputs again.
        self.has_writer = False
        # True if clients count steps: they have a sequence's outputs before its next chunk.
        self.has_counters = False
        self._outbox_rows = 0
        # True when the client sends no more: the stream ends when its queue is done.
        self.is_half_closed = False
        # True while nothing more is read, and when every lane has been told of the stop.
        self.is_draining = False
        self.is_drained = False
        self._queue_steps_max = queue_steps_max
        self._outbox_rows_max = outbox_rows_max
        self._on_change = on_change
        self._slots = np.full(_LANES_START, _UNKNOWN, np.int64)

    @property
    def is_ahead(self) -> bool:
        """True while nothing more is read.

        The client is beyond its credit, or reads too slowly, or the server is stopping.
        """
        return (
            self.is_draining
            or self.queued_steps > self._queue_steps_max
            or self._outbox_rows > self._outbox_rows_max
            or len(self.outbox) > _OUTBOX_MAX
        )

    def wake(self) -> None:
        """Wake the session of this stream."""
        self._on_change()

    def fall_silent(self) -> None:
        """Stop calling the session, because it has ended."""
        self._on_change = _do_nothing

    def send(self, item: Event) -> None:
        """Put something into the outbox."""
        self.outbox.append(item)
        if isinstance(item, Outputs):
            self._outbox_rows += item.rows
        self._on_change()

    def take_outputs(self) -> Outputs:
        """Take the outputs at the front out of the outbox."""
        item = self.outbox.popleft()
        assert isinstance(item, Outputs)
        self._outbox_rows -= item.rows
        return item

    def fault(self, lane: int, error: LaneError, *, expected_step: int = 0) -> None:
        """Tell the client of a fault of one lane."""
        self.send(Failed(lane, error, expected_step))

    def finish_steps(self, steps: int) -> None:
        """Give back credit for steps that were run or dropped."""
        was_ahead = self.is_ahead
        self.queued_steps -= steps
        if was_ahead or self.is_half_closed:
            self._on_change()

    def slots(self, lanes: Integers) -> Slots:
        """The slots of `lanes` [n]; negative for lanes without one."""
        try:
            return self._slots.take(lanes)
        except IndexError:
            inside = lanes < len(self._slots)
            return np.where(inside, self._slots[np.where(inside, lanes, 0)], _UNKNOWN)

    def slot(self, lane: int) -> int:
        """The slot of one lane, or a negative number."""
        return int(self._slots[lane]) if lane < len(self._slots) else _UNKNOWN

    def is_unknown(self, lane: int) -> bool:
        """True if no open has named the lane."""
        return self.slot(lane) == _UNKNOWN

    def put_lane(self, lane: int, slot: int) -> None:
        """Give a lane to a slot."""
        while lane >= len(self._slots):
            self._slots = np.concatenate([self._slots, np.full_like(self._slots, _UNKNOWN)])
        self._slots[lane] = slot

    def end_lane(self, lane: int, reason: EndReason | None) -> None:
        """Remove a lane and, if there is a reason, tell the client."""
        self.put_lane(lane, _ENDED)
        if reason is not None:
            self.send(Ended(lane, reason))

    def live_slots(self) -> Slots:
        """The slots of all open lanes."""
        return self._slots[self._slots >= 0]

    def take_back(self) -> Outputs | None:
        """Take out the oldest outputs that were delivered but not acknowledged; None if none.

        For a stream that has ended. Waiting events without outputs are dropped.
        """
        for waiting in (self.unacknowledged, self.outbox, self.gated):
            while waiting:
                item = waiting.popleft()
                if isinstance(item, Outputs):
                    return item
        return None

    def outputs(self) -> Iterator[Outputs]:
        """All outputs that are not acknowledged, oldest first."""
        yield from self.unacknowledged
        for item in self.outbox:
            if isinstance(item, Outputs):
                yield item
        yield from self.gated


class Streams:
    """The streams of one model: open ones, and ended ones whose lanes are being parked."""

    def __init__(self, limits: Limits, *, outbox_rows_max: int) -> None:
        self._limits = limits
        self._outbox_rows_max = outbox_rows_max
        self._open: dict[int, Stream] = {}
        self._ending: dict[int, Stream] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._open.values()))

    def get(self, number: int) -> Stream | None:
        """The open stream of that number."""
        return self._open.get(number)

    def ending(self, number: int) -> Stream | None:
        """The stream of that number, if it has ended and has lanes left to be parked."""
        return self._ending.get(number)

    def open(self, on_change: Callable[[], None]) -> Stream:
        """A new stream; its first event is the limits."""
        self._number += 1
        stream = Stream(
            self._number,
            queue_steps_max=self._limits.credit_steps,
            outbox_rows_max=self._outbox_rows_max,
            on_change=on_change,
        )
        self._open[stream.number] = stream
        stream.send(self._limits)
        return stream

    def begin_end(self, stream: Stream) -> bool:
        """Note that a stream has ended; False if that is already known."""
        if self._open.pop(stream.number, None) is None:
            return False
        self._ending[stream.number] = stream
        stream.fall_silent()
        return True

    def finish_end(self, stream: Stream) -> None:
        """Forget an ended stream, because all of its lanes are parked."""
        del self._ending[stream.number]

    def stop_reading(self) -> None:
        """Stop reading from all streams, because the server stops."""
        for stream in self._open.values():
            stream.is_draining = True

    def finish_steps(self, number: int, steps: int) -> None:
        """Give a stream, if it is still open, credit back for steps that were run or dropped."""
        stream = self._open.get(number)
        if stream is not None:
            stream.finish_steps(steps)
