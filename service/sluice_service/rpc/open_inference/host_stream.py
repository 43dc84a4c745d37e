"""The one stream at the host that carries the lanes of a model: opens, chunks and ends.

All that is asked for in one turn of the event loop goes to the host together. Lanes have
numbers at the host only while they are open.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import structlog

from sluice_service.errors import LaneError
from sluice_service.models.host import Host
from sluice_service.rpc.open_inference.requests import NO_LANE, RequestLane
from sluice_service.sequences.events import Ended, Failed, Opened, Outputs
from sluice_service.sequences.stream import Stream
from sluice_service.settings import Settings
from sluice_service.store.claims import Durability, OpenMode, OpenRequest

log = structlog.get_logger()

# An event of a lane; None: its current request has all its outputs.
LaneEvent: TypeAlias = Opened | Failed | Ended | None


class HostStream:
    """Passes the opens, chunks and ends of one model's lanes to the host, and returns events."""

    def __init__(self, host: Host, settings: Settings, wake: Callable[[], None]) -> None:
        """`wake` is called when there is something to `receive`."""
        self._host = host
        self._wake = wake
        self._start_mode = (
            OpenMode.RESTART if settings.duplicate_start == "restart" else OpenMode.START
        )
        self._held_steps_max = host.limits.unacknowledged_steps_max
        self._stream: Stream | None = None
        self._by_number: dict[int, RequestLane] = {}
        self._free_numbers: list[int] = []
        self._numbers = 0
        self._leaving: set[int] = set()  # closed here, and not yet ended at the host
        self._closing: set[int] = set()  # that the host still has to close, ended or not
        self._to_open: list[RequestLane] = []
        self._to_close: list[int] = []
        self._to_send: list[RequestLane] = []
        self._is_flush_due = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def leaving(self) -> int:
        """How many places will soon be free."""
        return len(self._leaving)

    # To the host.

    def open(self, lane: RequestLane) -> None:
        """Have a lane opened for its current request."""
        self._to_open.append(lane)
        self._flush_soon()

    def send(self, lane: RequestLane) -> None:
        """Have the current request of an open lane run."""
        self._to_send.append(lane)
        self._flush_soon()

    def close(self, lane: RequestLane) -> None:
        """Have a lane's sequence dropped, before other lanes are opened."""
        self._to_close.append(lane.number)
        self._closing.add(lane.number)
        self._leaving.add(lane.number)
        self._forget(lane)
        self._flush_soon()

    def restart(self, lanes: list[RequestLane]) -> None:
        """Reset open lanes to the initial state, on the newest version."""
        assert self._stream is not None
        self._host.restart(self._stream, [lane.number for lane in lanes])
        version = str(self._host.version.number)
        for lane in lanes:
            lane.version = version

    def release(self, lane: RequestLane) -> None:
        """Forget a lane that the host has not opened or has ended. Its number is free."""
        self._free_numbers.append(lane.number)
        self._forget(lane)
        if lane in self._to_send:
            self._to_send.remove(lane)
        if not self._by_number:
            asyncio.get_running_loop().call_soon(self._detach_if_unused)

    def _forget(self, lane: RequestLane) -> None:
        del self._by_number[lane.number]
        lane.number, lane.is_open = NO_LANE, False

    def _flush_soon(self) -> None:
        """Flush after this turn of the event loop, so that all of its calls go together."""
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._to_open or self._to_close:
            task = asyncio.ensure_future(self._open_all())
            self._tasks.add(task)
            task.add_done_callback(self._opened_all)
            # Without a store this comes when all has been opened, and sends both in one frame.
            # With one, open lanes do not wait for its answers.
            asyncio.get_running_loop().call_soon(self._send_all)
        else:
            self._send_all()

    def _opened_all(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._detach_if_unused()

    async def _open_all(self) -> None:
        """Close and open lanes, then send the requests that waited for them."""
        closing, self._to_close = self._to_close, []
        opening, self._to_open = self._to_open, []
        if self._stream is None:
            self._stream = self._host.attach(self._wake)
            self._stream.has_counters = True
        requests = [self._as_open(lane) for lane in opening]
        try:
            await self._host.open(self._stream, requests, closing=closing)
        except Exception:
            # A defect of the server: no request must wait for ever.
            log.exception("open_broke")
            for request in requests:
                lane = self._by_number.get(request.lane)
                if lane is not None and not lane.is_open:
                    error = LaneError("an error inside the server")
                    self._stream.send(Failed(request.lane, error, expected_step=0))
        self._closing.difference_update(closing)
        self._free_numbers += [number for number in closing if number not in self._leaving]
        self._send_all()

    def _as_open(self, lane: RequestLane) -> OpenRequest:
        """The open of a lane, under a new number; an old one ends with it."""
        if lane.number != NO_LANE:
            self._forget(lane)
        if self._free_numbers:
            lane.number = self._free_numbers.pop()
        else:
            lane.number = self._numbers
            self._numbers += 1
        self._by_number[lane.number] = lane
        if not lane.sequence_id:
            return OpenRequest(lane=lane.number, mode=OpenMode.START, durability=Durability.OFF)
        return OpenRequest(
            lane=lane.number,
            sequence_id=lane.sequence_id,
            mode=self._start_mode if lane.request.is_start else OpenMode.RESUME,
            # A client that counts steps has the outputs before them, and can replay what a
            # store does not have.
            received=lane.request.first_step,
        )

    def _send_all(self) -> None:
        """Have all requests run that wait for that on open lanes."""
        lanes, self._to_send = [lane for lane in self._to_send if lane.is_open], []
        if not lanes or self._stream is None:
            return
        borrowed = [lane for lane in lanes if not lane.sequence_id]
        if borrowed:
            self.restart(borrowed)
        holding = [lane for lane in lanes if lane.holds_answer]
        if holding:
            # A client that sends the next request has the answer to the last.
            numbers = np.array([lane.number for lane in holding])
            received = np.array([lane.steps_before for lane in holding])
            self._host.acknowledge(self._stream, numbers, received)
        self._host.submit_singles(self._stream, map(RequestLane.chunk, lanes))

    # From the host.

    def receive(self) -> Iterator[tuple[RequestLane, LaneEvent]]:
        """The events of the lanes, in order. Outputs are handed to their requests."""
        if self._stream is None:
            return
        outbox = self._stream.outbox
        while outbox:
            event = outbox[0]
            if isinstance(event, Outputs):
                yield from self._distribute(self._stream.take_outputs())
                continue
            outbox.popleft()
            if not isinstance(event, Opened | Failed | Ended):
                continue
            lane = self._by_number.get(event.lane)
            if lane is not None:
                if isinstance(event, Opened):
                    self._note_opened(lane, event)
                yield lane, event
            elif isinstance(event, Ended):
                self._leaving.discard(event.lane)
                # Another sequence with the same number would be closed instead of this one.
                if event.lane not in self._closing:
                    self._free_numbers.append(event.lane)

    def _note_opened(self, lane: RequestLane, opened: Opened) -> None:
        assert self._stream is not None
        counts_steps = lane.request.first_step is not None
        lane.is_open = True
        lane.holds_answer = counts_steps and opened.durability is not Durability.OFF
        lane.version = str(self._host.version_of(self._stream, lane.number).number)

    def _distribute(self, run: Outputs) -> Iterator[tuple[RequestLane, None]]:
        """Cut the outputs of a run by lane. Returns the lanes whose current request is complete."""
        sizes = [len(output) // run.rows for output in run.outputs]
        start = 0
        for number, first, steps in zip(
            run.lanes.tolist(), run.first.tolist(), run.lengths.tolist(), strict=True
        ):
            stop = start + steps
            lane = self._by_number.get(number)
            if lane is not None:
                outputs = [
                    output[start * size : stop * size]
                    for output, size in zip(run.outputs, sizes, strict=True)
                ]
                if lane.holds_answer:
                    self._hold(lane, first, steps, outputs)
                if lane.take(first, steps, outputs):
                    yield lane, None
                elif lane.current is not None and lane.step == lane.resumes_at:
                    lane.resumes_at = None
                    self.send(lane)
            start = stop

    def _hold(self, lane: RequestLane, first: int, steps: int, outputs: list[bytes]) -> None:
        """Have the host hold outputs of a lane's last request with its state, for a repeat.

        Nothing is held of a request that is longer than the host's limit.
        """
        assert self._stream is not None
        if lane.current is None or lane.current.steps <= self._held_steps_max:
            self._host.hold_outputs(self._stream, lane.number, first, steps, outputs)
        else:
            end = np.array([first + steps])
            self._host.acknowledge(self._stream, np.array([lane.number]), end)

    def _detach_if_unused(self) -> None:
        """Close the stream at the host while no lane needs one."""
        is_used = self._by_number or self._to_open or self._to_close or self._tasks
        if self._stream is not None and not is_used:
            self._host.detach(self._stream)
            self._stream = None
            self._numbers = 0
            self._free_numbers.clear()
            self._leaving.clear()
