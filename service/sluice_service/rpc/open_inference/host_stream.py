"""The one stream of a host that carries the lanes of all requests: their opens, chunks and ends.

What is asked for in one turn of the event loop goes to the host at once, and in one batch of
opens. Lanes have numbers there only while they are open.
"""

import asyncio
from typing import Protocol

import numpy as np
import structlog

from sluice_service.errors import LaneError, ServiceError, StoreDownError
from sluice_service.models.host import Host
from sluice_service.rpc.open_inference.refusals import NONE, Lane, as_chunk, ended
from sluice_service.sequences.events import Ended, EndReason, Failed, Opened, Outputs
from sluice_service.sequences.stream import Stream
from sluice_service.settings import Settings
from sluice_service.store.claims import Durability, OpenMode, OpenRequest

log = structlog.get_logger()


class Owner(Protocol):
    """Whose lanes they are."""

    def opened(self, lane: Lane, opened: Opened) -> bool:
        """A lane has its sequence; True where its current request is to be run."""

    def refused(self, lane: Lane, error: LaneError) -> None:
        """A lane has none."""

    def leave(self, lane: Lane, error: ServiceError | None = None) -> None:
        """The current request of a lane is over."""

    def vacated(self, lane: Lane) -> None:
        """A lane without a request has ended."""


class Trunk:
    """One model's lanes on their way to the host, and its outputs on their way back."""

    def __init__(self, host: Host, settings: Settings, owner: Owner) -> None:
        self._host = host
        self._owner = owner
        self._start_mode = (
            OpenMode.RESTART if settings.duplicate_start == "restart" else OpenMode.START
        )
        self._answer_steps_max = host.limits.unacknowledged_steps_max
        self._stream: Stream | None = None
        self._by_number: dict[int, Lane] = {}
        self._free_numbers: list[int] = []
        self._numbers = 0
        self._parting: set[int] = set()  # closed, and not yet gone
        self._is_flush_due = False
        self._opening: list[Lane] = []
        self._closing: list[int] = []
        self._chunks: list[Lane] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def parting(self) -> int:
        """How many places are about to be free."""
        return len(self._parting)

    # To the host.

    def open(self, lane: Lane) -> None:
        """Have a lane opened for its current request, which then waits to be sent."""
        self._opening.append(lane)
        self._schedule()

    def send(self, lane: Lane) -> None:
        """Have the current request of an open lane run."""
        self._chunks.append(lane)
        self._schedule()

    def close(self, lane: Lane) -> None:
        """Have a lane's sequence dropped before others are opened."""
        self._closing.append(lane.number)
        self._parting.add(lane.number)
        self._forget(lane)
        self._schedule()

    def restart(self, lanes: list[Lane]) -> None:
        """Set open lanes back to the initial state, of the newest version."""
        assert self._stream is not None
        self._host.restart(self._stream, [lane.number for lane in lanes])
        version = str(self._host.version.number)
        for lane in lanes:
            lane.version = version

    def _forget(self, lane: Lane) -> None:
        del self._by_number[lane.number]
        lane.number, lane.is_open = NONE, False

    def _schedule(self) -> None:
        """Send what there is once this turn of the event loop is over, or what follows at once."""
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._opening or self._closing:
            task = asyncio.ensure_future(self._open())
            self._tasks.add(task)
            task.add_done_callback(self._opened_all)
            # Where a store is asked, who has a lane does not wait for its answers; where none
            # is, this comes when all has been opened and sent, in one frame.
            asyncio.get_running_loop().call_soon(self._send)
        else:
            self._send()

    def _opened_all(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._detach_if_unused()

    async def _open(self) -> None:
        """Close and open lanes, then send what waited for them."""
        opening, self._opening = self._opening, []
        closing, self._closing = self._closing, []
        if self._stream is None:
            self._stream = self._host.attach(self._receive)
            self._stream.has_counters = True
        requests = [self._as_open(lane) for lane in opening]
        try:
            await self._host.open(self._stream, requests, closing=closing)
        except Exception:
            # A defect of ours: nobody must wait for ever.
            log.exception("open_broke")
            for lane in opening:
                if lane.current is not None:
                    self._owner.leave(lane, ServiceError("an error inside the server"))
        self._send()

    def _as_open(self, lane: Lane) -> OpenRequest:
        """The open of a lane, under a new number; an old one ends with it."""
        if lane.number != NONE:
            self._forget(lane)
        if self._free_numbers:
            lane.number = self._free_numbers.pop()
        else:
            lane.number = self._numbers
            self._numbers += 1
        self._by_number[lane.number] = lane
        assert lane.current is not None
        if not lane.key:
            return OpenRequest(lane=lane.number, mode=OpenMode.START, durability=Durability.OFF)
        mode = self._start_mode if lane.current.is_start else OpenMode.RESUME
        # Who counts steps has the outputs before them, and can replay what a store does not have.
        received = lane.current.first
        return OpenRequest(lane=lane.number, sequence_id=lane.key, mode=mode, received=received)

    def _send(self) -> None:
        """Everything that can run, at once."""
        lanes, self._chunks = [lane for lane in self._chunks if lane.is_open], []
        if not lanes or self._stream is None:
            return
        borrowed = [lane for lane in lanes if not lane.key]
        if borrowed:
            self.restart(borrowed)
        counted = [lane for lane in lanes if lane.is_counted]
        if counted:
            numbers = np.array([lane.number for lane in counted])
            received = np.array([lane.first for lane in counted])
            self._host.acknowledge(self._stream, numbers, received)
        self._host.submit_singles(self._stream, map(as_chunk, lanes))

    # From the host.

    def _receive(self) -> None:
        """Take what the host has put into the outbox; it may be in the middle of a run."""
        if self._stream is None:
            return
        outbox = self._stream.outbox
        while outbox:
            item = outbox[0]
            if isinstance(item, Outputs):
                self._deliver(self._stream.take_delivery())
                continue
            outbox.popleft()
            if isinstance(item, Opened):
                self._opened(item)
            elif isinstance(item, Failed):
                self._faulted(item)
            elif isinstance(item, Ended):
                self._closed(item)

    def _deliver(self, delivery: Outputs) -> None:
        sizes = [len(output) // delivery.rows for output in delivery.outputs]
        start = 0
        for number, first, steps in zip(
            delivery.lanes.tolist(), delivery.first.tolist(), delivery.lengths.tolist(), strict=True
        ):
            stop = start + steps
            lane = self._by_number.get(number)
            if lane is not None:
                outputs = [
                    output[start * size : stop * size]
                    for output, size in zip(delivery.outputs, sizes, strict=True)
                ]
                if lane.is_counted:
                    self._hold(lane, first, steps, outputs)
                self._hand_over(lane, first, steps, outputs)
            start = stop

    def _hand_over(self, lane: Lane, first: int, steps: int, outputs: list[bytes]) -> None:
        """Give outputs to the request that waits for them, if there is one."""
        request, is_next = lane.current, first == lane.step
        lane.step = max(lane.step, first + steps)
        if request is not None and is_next:
            lane.missing -= steps
            request.version = lane.version
            request.collect(lane.row, steps, outputs)
            if not lane.missing:
                self._owner.leave(lane)
            elif lane.step == lane.resumes_at:
                self.send(lane)

    def _hold(self, lane: Lane, first: int, steps: int, outputs: list[bytes]) -> None:
        """Have the answer to a lane's last request stored with its state, for a repeat.

        One longer than the host holds is let go of, piece by piece.
        """
        assert self._stream is not None
        if lane.current is None or lane.current.steps <= self._answer_steps_max:
            self._host.lanes.keep(self._stream, lane.number, first, steps, outputs)
        else:
            end = np.array([first + steps])
            self._host.acknowledge(self._stream, np.array([lane.number]), end)

    def _opened(self, opened: Opened) -> None:
        lane = self._by_number[opened.lane]
        assert lane.current is not None and self._stream is not None
        lane.is_open = True
        lane.is_counted = opened.durability is not Durability.OFF and lane.current.first is not None
        lane.version = str(self._host.version_of(self._stream, lane.number).number)
        if self._owner.opened(lane, opened):
            self._chunks.append(lane)

    def _faulted(self, failed: Failed) -> None:
        lane = self._by_number.get(failed.lane)
        if lane is None:
            return
        was_open = lane.is_open
        if not was_open or isinstance(failed.error, StoreDownError):
            # The host has no such lane, or has parked it: only another open goes on.
            self._lose(lane)
        request = lane.current
        if request is None:
            if not lane.is_open:
                self._owner.vacated(lane)
        elif not was_open:
            self._owner.refused(lane, failed.error)
        else:
            done = request.steps - lane.missing
            told = f"; the request's first {done} steps were applied" if done and lane.key else ""
            self._owner.leave(lane, type(failed.error)(f"{failed.error}{told}"))

    def _closed(self, closed: Ended) -> None:
        """A lane has ended: as we asked, or because the host ended it."""
        self._parting.discard(closed.lane)
        lane = self._by_number.get(closed.lane)
        if lane is None:
            self._free_numbers.append(closed.lane)
            return
        self._lose(lane)
        request = lane.current
        if request is None:
            self._owner.vacated(lane)
        elif not lane.key and closed.reason is EndReason.IDLE and lane.missing == request.steps:
            # A place that nobody used expired as this request borrowed it.
            self.open(lane)
        else:
            self._owner.leave(lane, ended(request, closed.reason))

    def _lose(self, lane: Lane) -> None:
        """The host has ended a lane: its number is free, and nothing of it is sent."""
        self._free_numbers.append(lane.number)
        self._forget(lane)
        if lane in self._chunks:
            self._chunks.remove(lane)
        if not self._by_number:
            asyncio.get_running_loop().call_soon(self._detach_if_unused)

    def _detach_if_unused(self) -> None:
        """Be no stream of the host's while there is nothing to say."""
        is_used = self._by_number or self._opening or self._closing or self._tasks
        if self._stream is not None and not is_used:
            self._host.detach(self._stream)
            self._stream = None
            self._numbers = 0
            self._free_numbers.clear()
            self._parting.clear()
