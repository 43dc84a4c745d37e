"""Puts single requests on lanes: all calls of the Open Inference Protocol share one host's stream.

A sequence keeps its lane as long as it lives, whichever connection its requests come
from, and has one request in the scheduler at a time; the others wait here. Requests
that arrive in one turn of the event loop go to the host as one frame. A request
without a sequence borrows a lane whose state is set back to the initial one. Where all
places are taken, a lane waits for one in the backlog.
"""

import asyncio
from collections import OrderedDict

import structlog

from sluice_protos.sequences_pb2 import (
    OFF,
    RESTART,
    RESUME,
    START,
    Closed,
    Fault,
    Opened,
    OpenSequence,
)
from sluice_service.errors import (
    LimitError,
    ModelNotFoundError,
    ServiceError,
    StoppingError,
)
from sluice_service.host import Host
from sluice_service.rpc.open_inference_arrivals import Arrivals
from sluice_service.rpc.open_inference_backlog import Backlog
from sluice_service.rpc.open_inference_lanes import (
    ERRORS,
    NONE,
    Answered,
    Lane,
    Tally,
    as_frame,
    ended,
    misplaced,
    not_started,
    overdue,
    withdrawn,
)
from sluice_service.rpc.open_inference_requests import Request
from sluice_service.settings import Settings
from sluice_service.streams import Delivery, Stream

log = structlog.get_logger()

# Lanes kept for requests without a sequence; an eighth of all sequences at the most.
_SPARE_MAX = 256
# Last answers of ended sequences, kept for those who repeat their END.
_ENDED_MAX = 4096


class Exchange:
    """One model's requests on their way to the host, and its outputs on their way back."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.tally = Tally()
        self._host = host
        self._start_mode = RESTART if settings.duplicate_start == "restart" else START
        self._spare_max = min(_SPARE_MAX, settings.sequences_max // 8)
        self._version = str(host.version.number)  # on which sequences begin
        self._stream: Stream | None = None
        self._by_key: dict[str, Lane] = {}
        self._by_number: dict[int, Lane] = {}
        self._spare: list[Lane] = []
        self._ended: OrderedDict[str, Answered] = OrderedDict()
        self._free_numbers: list[int] = []
        self._numbers = 0
        self._backlog = Backlog(
            settings,
            steps_max=host.limits.credit_steps,
            now=host.now,
            on_overdue=self._overdue,
        )
        host.watch_room(self._on_room)
        self._has_cancelled = False  # among those who wait for a place
        self._waiting_steps = 0
        self._is_flush_due = False
        self._arrivals = Arrivals()
        self._opening: list[Lane] = []
        self._closing: list[int] = []
        self._parting: set[int] = set()  # numbers whose places are about to be free
        self._chunks: list[Lane] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_full(self) -> bool:
        """True while more waits than one client of the native stream may have waiting."""
        running = self._waiting_steps - self._backlog.steps
        return running >= self._host.limits.credit_steps

    @property
    def waiting(self) -> int:
        """How many sequences wait for a place."""
        return len(self._backlog)

    def submit(self, request: Request) -> None:
        """Take a request; its `on_done` is called when it has outputs or an error."""
        if self._host.is_draining:
            request.fail(StoppingError("this server is stopping; ask another"))
            return
        if not request.key and not self._host.is_welcoming:
            request.fail(StoppingError(f"model {self._host.name!r} is being unloaded"))
            return
        if (request.is_start or not request.key) and (error := self._misversioned(request)):
            request.fail(error)
            return
        if self.is_full:
            request.fail(
                LimitError(
                    f"{self._waiting_steps} steps wait to be run, as many as "
                    "stream_queue_steps_max allows; wait for answers before sending more"
                )
            )
            return
        request.expect()
        self._arrivals.count += 1
        self._waiting_steps += request.batch * request.steps
        if request.key:
            lane = self._by_key.get(request.key)
            if lane is None:
                lane = self._by_key[request.key] = Lane(request.key)
            if lane.current is None:
                lane.queue.append(request)
                self._next(lane)
            else:
                self._join(lane, request)
        else:
            for row in range(request.batch):
                lane = self._spare.pop() if self._spare else Lane("")
                if (error := self._place(lane, request, row)) is not None:
                    self._refuse(request, error)
        self._schedule()

    def _join(self, lane: Lane, request: Request) -> None:
        """Let a request wait behind the others of its sequence."""
        if lane in self._backlog:
            try:
                self._backlog.join(lane, request)
            except LimitError as error:
                self._refuse(request, error)
                return
        lane.queue.append(request)

    def _refuse(self, request: Request, error: ServiceError) -> None:
        """Fail a request, or a row of it, that no lane has."""
        self._waiting_steps -= request.steps
        request.fail(error)

    def _misversioned(self, request: Request) -> ServiceError | None:
        """Why a request that begins at the initial state cannot do so on the version it names."""
        if request.version in ("", self._version):
            return None
        return ModelNotFoundError(
            f"version {request.version} of model {self._host.name!r} takes no new sequences; "
            f"leave it out, or ask for {self._version}"
        )

    # What a lane does next.

    def _place(self, lane: Lane, request: Request, row: int = 0) -> ServiceError | None:
        """Make a request a lane's current one; the error where it can have no place."""
        lane.current, lane.row, lane.missing = request, row, request.steps
        if lane.number != NONE and not (lane.key and request.is_start):
            self._chunks.append(lane)
        elif not self._needs_place(lane, request):
            self._opening.append(lane)
        else:
            return self._seek_place(lane)
        return None

    def _next(self, lane: Lane) -> None:
        """Begin the first request that waits for a lane's sequence and is not a repeat."""
        while lane.queue and lane.current is None:
            request = lane.queue.popleft()
            if request.is_cancelled:
                self._waiting_steps -= request.steps
                continue
            last = lane.last or self._ended.get(lane.key)
            if last is not None and last.answers(request):
                self._waiting_steps -= request.steps
                request.outputs = last.outputs
                request.finish()
            else:
                error = misplaced(lane, request) if lane.is_open else None
                error = error or self._place(lane, request)
                if error is not None:
                    self._refuse(request, error)
        if lane.current is None and lane.number == NONE:
            self._by_key.pop(lane.key, None)

    def _leave(self, lane: Lane, error: ServiceError | None = None) -> None:
        """The current request of a lane is over: the next one's turn."""
        request, lane.current = lane.current, None
        assert request is not None
        self._waiting_steps -= request.steps
        if error is not None:
            request.fail(error)
        elif lane.key:
            self._remember(lane, request)
            if request.is_end:
                self._close(lane)
        if lane.key:
            self._next(lane)
        elif lane.number != NONE:
            is_spare = len(self._spare) < self._spare_max and not self._backlog
            if is_spare and self._host.is_welcoming:
                if lane.version != self._version:
                    self._restart([lane])
                self._spare.append(lane)
            else:
                self._close(lane)
        self._schedule()

    def _remember(self, lane: Lane, request: Request) -> None:
        """Keep the answer of a client that counts its steps, in case it asks again."""
        if request.first is None:
            lane.last = None
            return
        lane.last = Answered(request)
        if request.is_end:
            self._ended[lane.key] = lane.last
            if len(self._ended) > _ENDED_MAX:
                self._ended.popitem(last=False)

    def _close(self, lane: Lane) -> None:
        """Have a lane's sequence dropped before anything else is sent."""
        self._closing.append(lane.number)
        self._parting.add(lane.number)
        self._forget_number(lane)

    def _forget_number(self, lane: Lane) -> None:
        del self._by_number[lane.number]
        lane.number, lane.is_open, lane.last = NONE, False, None

    # Places.

    def _needs_place(self, lane: Lane, request: Request) -> bool:
        """False where its sequence lives here, or has to be looked for, or must not begin."""
        if lane.number != NONE or not self._host.is_welcoming:
            return False
        return not lane.key or (request.is_start and not self._host.is_live(lane.key))

    def _seek_place(self, lane: Lane) -> ServiceError | None:
        """Let a lane take a place, or wait for one; the error where it may do neither."""
        if self._host.room <= self._backlog.called:
            self._give_up_spare()
        try:
            if self._backlog.enter(lane, self._host.room + len(self._parting)):
                self._opening.append(lane)
        except LimitError as error:
            lane.current = None
            return error
        return None

    def _give_up_spare(self) -> None:
        """Let go of the places that only wait for requests without a sequence."""
        while self._spare:
            self._close(self._spare.pop())
            self._schedule()

    def _on_room(self) -> None:
        """A sequence has gone."""
        if self._backlog:
            self._schedule()

    def _admit(self) -> None:
        """Let the first of those who wait have the places that are free."""
        if self._has_cancelled:
            self._has_cancelled = False
            for lane in self._backlog:
                if lane.current is not None and lane.current.is_cancelled:
                    self._dismiss(lane, withdrawn(lane.current))
        self._opening += self._backlog.call(self._host.room)

    def cancel(self, request: Request) -> None:
        """Nobody waits for a request any more: it is not begun, and gives up its turn."""
        request.is_cancelled = True
        if self._backlog:
            self._has_cancelled = True
            self._schedule()

    def dismiss(self, error: ServiceError) -> None:
        """Let nobody wait for a place."""
        while lanes := list(self._backlog):
            for lane in lanes:
                self._dismiss(lane, error)

    def _dismiss(self, lane: Lane, error: ServiceError) -> None:
        """Let a sequence wait no more: all of its requests, up to its END, fail."""
        self._backlog.leave(lane)
        request, lane.current = lane.current, None
        assert request is not None
        self._refuse(request, error)
        while lane.queue and not request.is_end:
            request = lane.queue.popleft()
            self._refuse(request, error)
        if lane.key:
            self._next(lane)
        self._schedule()

    def _overdue(self, lane: Lane) -> None:
        assert lane.current is not None
        self._dismiss(lane, overdue(lane.current))

    # To the host.

    def _schedule(self) -> None:
        """Send what there is once this turn of the event loop is over, or what follows at once."""
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._arrivals.may_bring_more():
            asyncio.get_running_loop().call_soon(self._flush)
            return
        self._is_flush_due = False
        if self._backlog:
            self._admit()
        if self._opening or self._closing:
            task = asyncio.ensure_future(self._open())
            self._tasks.add(task)
            task.add_done_callback(self._opened_all)
        elif self._chunks:
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
        requests = [self._as_open(lane) for lane in opening]
        try:
            await self._host.open(self._stream, requests, closing=closing)
        except Exception:
            # A defect of ours: nobody must wait for ever.
            log.exception("open_broke")
            for lane in opening:
                self._backlog.settle(lane)
                if lane.current is not None:
                    self._leave(lane, ServiceError("an error inside the server"))
        self._send()

    def _as_open(self, lane: Lane) -> OpenSequence:
        """The open of a lane, under a new number; an old one ends with it."""
        if lane.number != NONE:
            self._forget_number(lane)
        if self._free_numbers:
            lane.number = self._free_numbers.pop()
        else:
            lane.number = self._numbers
            self._numbers += 1
        self._by_number[lane.number] = lane
        assert lane.current is not None
        if not lane.key:
            return OpenSequence(lane=lane.number, mode=START, durability=OFF)
        if lane.current.is_start:
            self._ended.pop(lane.key, None)
        mode = self._start_mode if lane.current.is_start else RESUME
        opening = OpenSequence(lane=lane.number, sequence_id=lane.key, mode=mode)
        if mode == RESUME and lane.current.first is not None:
            # Who counts steps can replay those that a store does not have.
            opening.received = lane.current.first
        return opening

    def _send(self) -> None:
        """Everything that can run, as one frame."""
        lanes, self._chunks = [lane for lane in self._chunks if lane.is_open], []
        if not lanes or self._stream is None:
            return
        borrowed = [lane for lane in lanes if not lane.key]
        if borrowed:
            self._restart(borrowed)
        self._host.submit(self._stream, *as_frame(lanes))

    def renew(self) -> None:
        """Let the places for requests without a sequence be of the newest version."""
        self._version = str(self._host.version.number)
        if not self._host.is_welcoming:
            self.dismiss(StoppingError(f"model {self._host.name!r} is being unloaded"))
            self._give_up_spare()
        elif self._spare:
            self._restart(self._spare)
        for lane in self._backlog:
            if lane.current is not None and (error := self._misversioned(lane.current)):
                self._dismiss(lane, error)

    def _restart(self, lanes: list[Lane]) -> None:
        """Set lanes back to the initial state, of the newest version."""
        assert self._stream is not None
        self._host.restart(self._stream, [lane.number for lane in lanes])
        for lane in lanes:
            lane.version = self._version

    # From the host.

    def _receive(self) -> None:
        """Take what the host has put into the outbox; it may be in the middle of a run."""
        if self._stream is None:
            return
        outbox = self._stream.outbox
        while outbox:
            item = outbox[0]
            if isinstance(item, Delivery):
                self._deliver(self._stream.take_delivery())
                continue
            outbox.popleft()
            if isinstance(item, Opened):
                self._opened(item)
            elif isinstance(item, Fault):
                self._faulted(item)
            elif isinstance(item, Closed):
                self._closed(item)

    def _deliver(self, delivery: Delivery) -> None:
        sizes = [len(output) // delivery.rows for output in delivery.outputs]
        start = 0
        for number, first, steps in zip(
            delivery.lanes.tolist(), delivery.first.tolist(), delivery.lengths.tolist(), strict=True
        ):
            stop = start + steps
            lane = self._by_number.get(number)
            if lane is not None and lane.current is not None:
                lane.step = first + steps
                lane.missing -= steps
                lane.current.version = lane.version
                lane.current.collect(
                    lane.row,
                    steps,
                    [
                        output[start * size : stop * size]
                        for output, size in zip(delivery.outputs, sizes, strict=True)
                    ],
                )
                if not lane.missing:
                    self._leave(lane)
            start = stop

    def _opened(self, opened: Opened) -> None:
        lane = self._by_number[opened.lane]
        self._backlog.settle(lane)
        lane.is_open, lane.step = True, opened.applied
        assert lane.current is not None and self._stream is not None
        lane.version = str(self._host.version_of(self._stream, lane.number).number)
        error = misplaced(lane, lane.current)
        if error is None:
            self._chunks.append(lane)
        else:
            self._leave(lane, error)

    def _faulted(self, fault: Fault) -> None:
        lane = self._by_number.get(fault.lane)
        if lane is None or lane.current is None:
            return
        error: ServiceError = ERRORS[fault.reason](fault.message)
        request = lane.current
        if lane.is_open:
            done = request.steps - lane.missing
            if done and lane.key:
                error = ERRORS[fault.reason](
                    f"{fault.message}; the request's first {done} steps were applied"
                )
        else:
            self._free_numbers.append(lane.number)
            self._forget_number(lane)
            if fault.reason == Fault.LIMIT:
                # A stream was quicker, or only the store has the sequence.
                try:
                    self._backlog.put_back(lane)
                except LimitError as limit:
                    error = limit
                else:
                    self._give_up_spare()
                    return
            self._backlog.settle(lane)
            if fault.reason in (Fault.NOT_FOUND, Fault.SEQUENCE_CLOSED):
                error = not_started(request, self._host.name, fault)
        self._leave(lane, error)

    def _closed(self, closed: Closed) -> None:
        """A lane has ended: as we asked, or because the host ended it."""
        self._free_numbers.append(closed.lane)
        self._parting.discard(closed.lane)
        lane = self._by_number.get(closed.lane)
        if lane is None:
            return
        self._forget_number(lane)
        if not self._by_number:
            asyncio.get_running_loop().call_soon(self._detach_if_unused)
        if lane.current is None:
            if lane.key:
                self._next(lane)
            elif lane in self._spare:
                self._spare.remove(lane)
        else:
            if lane in self._chunks:
                self._chunks.remove(lane)
            self._leave(lane, ended(lane.current, closed))

    def _detach_if_unused(self) -> None:
        """Be no stream of the host's while there is nothing to say."""
        is_used = self._by_number or self._opening or self._closing or self._tasks
        if self._stream is not None and not is_used:
            self._host.detach(self._stream)
            self._stream = None
            self._numbers = 0
            self._free_numbers.clear()
            self._parting.clear()
