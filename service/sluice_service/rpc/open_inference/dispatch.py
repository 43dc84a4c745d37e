"""Decides which request of each sequence is run next, and which sequence gets a place.

A sequence keeps its lane as long as it lives, for all connections. It has one request at the host
at a time; its other requests wait here. A request without a sequence borrows a lane whose state is
reset to the initial one. If all places are taken, a lane waits for one in the backlog.
"""

from sluice_service.errors import LaneError, LimitError, ServiceError, StoreDownError
from sluice_service.models.host import Host
from sluice_service.rpc.open_inference import refusals
from sluice_service.rpc.open_inference.backlog import Backlog
from sluice_service.rpc.open_inference.host_stream import HostStream
from sluice_service.rpc.open_inference.last_answers import LastAnswers
from sluice_service.rpc.open_inference.requests import NO_LANE, InferRequest, RequestLane
from sluice_service.sequences.events import Ended, EndReason, Failed, Opened
from sluice_service.settings import Settings

# Open lanes kept for requests without a sequence; an eighth of all sequences at the most.
_SPARE_MAX = 256


class Dispatcher:
    """Passes one model's requests to the host, each in its turn.

    It is woken when the host has events, when a place is free, and when a lane has waited for
    too long.
    """

    def __init__(self, host: Host, settings: Settings) -> None:
        self.lanes: dict[str, RequestLane] = {}  # by sequence id
        self.answers = LastAnswers()
        self.waiting_steps = 0  # of all requests that are not done
        self._host = host
        self._stream = HostStream(host, settings, self._receive)
        self._spare: list[RequestLane] = []  # open, for requests without a sequence
        self._spare_max = min(_SPARE_MAX, settings.sequences_max // 8)
        self._version = str(host.version.number)  # on which sequences begin
        self.backlog = Backlog(
            settings, steps_max=host.limits.credit_steps, now=host.now, wake=self._review
        )
        host.watch_room(self.backlog.review)

    @property
    def is_full(self) -> bool:
        """True while more waits than one client of the native stream may have waiting."""
        return self.waiting_steps - self.backlog.steps >= self._host.limits.credit_steps

    # Requests.

    def submit(self, request: InferRequest) -> None:
        """Take a request, which is done once it has its outputs or an error."""
        error = self._reason_against(request)
        if error is not None:
            request.fail(error)
            return
        request.expect_outputs()
        self.waiting_steps += request.batch * request.steps
        if request.sequence_id:
            self._queue(request)
        else:
            self._borrow_lanes(request)

    def _reason_against(self, request: InferRequest) -> ServiceError | None:
        """The error of a request that is refused at once; else None."""
        host = self._host
        if host.is_draining:
            return refusals.stopping()
        if not request.sequence_id and not host.is_welcoming:
            return refusals.unloading(host.name)
        if request.is_start or not request.sequence_id:
            error = refusals.wrong_version(request, host.name, self._version)
            if error is not None:
                return error
        return refusals.too_much_waits(self.waiting_steps) if self.is_full else None

    def _queue(self, request: InferRequest) -> None:
        """Put a request behind the others of its sequence."""
        lane = self.lanes.get(request.sequence_id)
        if lane is None:
            lane = self.lanes[request.sequence_id] = RequestLane(request.sequence_id)
        if lane.current is not None and lane in self.backlog:
            error = self.backlog.join(lane, request)
            if error is not None:
                self._refuse(request, error)
                return
        lane.waiting.append(request)
        if lane.current is None:
            self._begin_next(lane)

    def _borrow_lanes(self, request: InferRequest) -> None:
        """Give each row of a request without a sequence its own lane."""
        for row in range(request.batch):
            lane = self._spare.pop() if self._spare else RequestLane("")
            error = self._begin(lane, request, row)
            if error is not None:
                self.waiting_steps -= (request.batch - row - 1) * request.steps
                self._refuse(request, error)
                break

    def cancel(self, request: InferRequest) -> None:
        """Drop a request that was cancelled before it began, and give up its turn."""
        request.is_cancelled = True
        self.backlog.note_cancelled()

    def _refuse(self, request: InferRequest, error: ServiceError) -> None:
        """Fail a request, or one row of it, that is on no lane."""
        self.waiting_steps -= request.steps
        self._fail(request, error)

    def _fail(self, request: InferRequest, error: ServiceError) -> None:
        request.fail(error)
        if request.batch > 1 and not request.is_cancelled:
            # Its other rows need no place any more.
            self.cancel(request)

    # What a lane does next.

    def _begin_next(self, lane: RequestLane) -> None:
        """Begin the first request that waits for a lane's sequence and is not a repeat."""
        while lane.waiting and lane.current is None:
            request = lane.waiting.popleft()
            if request.is_cancelled or self.answers.answer_repeat(lane, request):
                self.waiting_steps -= request.steps
                continue
            error = refusals.wrong_turn(lane, request) if lane.is_open else None
            error = error or self._begin(lane, request)
            if error is not None:
                self._refuse(request, error)
        if lane.current is None and lane.number == NO_LANE:
            self.lanes.pop(lane.sequence_id, None)
            self.answers.forget_unless_end(lane)

    def _begin(self, lane: RequestLane, request: InferRequest, row: int = 0) -> ServiceError | None:
        """Make a request a lane's current one; the error if it can have no place."""
        lane.begin(request, row)
        if lane.number != NO_LANE and not (lane.sequence_id and request.is_start):
            self._stream.send(lane)
        elif self._needs_place(lane, request):
            return self._seek_place(lane)
        else:
            self._stream.open(lane)
        return None

    def _finish(self, lane: RequestLane, error: ServiceError | None = None) -> None:
        """The current request of a lane is over: begin the next."""
        request, lane.current = lane.request, None
        self.waiting_steps -= request.steps
        if error is not None:
            self.backlog.forget_admission(lane)
            self._fail(request, error)
        elif lane.sequence_id:
            self.answers.remember(lane, request)
            if request.is_end:
                self._stream.close(lane)
        if lane.sequence_id:
            self._begin_next(lane)
        elif lane.number != NO_LANE:
            self._keep_or_close(lane)

    def _keep_or_close(self, lane: RequestLane) -> None:
        """Keep an open lane for the next request without a sequence, or close it."""
        is_kept = len(self._spare) < self._spare_max and not self.backlog
        if is_kept and self._host.is_welcoming:
            if lane.version != self._version:
                self._stream.restart([lane])
            self._spare.append(lane)
        else:
            self._stream.close(lane)

    # Places.

    def _needs_place(self, lane: RequestLane, request: InferRequest) -> bool:
        """False if its sequence lives here, must first be looked up, or must not begin."""
        if lane.number != NO_LANE or not self._host.is_welcoming:
            return False
        if not lane.sequence_id:
            return True
        return request.is_start and not self._host.is_live(lane.sequence_id)

    def _seek_place(self, lane: RequestLane) -> ServiceError | None:
        """Let a lane take a place, or wait for one; the error if it may do neither."""
        if self._host.room <= self.backlog.admitted:
            self._close_spare()
        if self.backlog.admit_newcomer(lane, self._host.room + self._stream.leaving):
            self._stream.open(lane)
            return None
        error = self.backlog.wait(lane)
        if error is not None:
            lane.current = None
        return error

    def _close_spare(self) -> None:
        """Give up the places of lanes that no request uses."""
        while self._spare:
            self._stream.close(self._spare.pop())

    def _review(self) -> None:
        """Give free places to the front of the backlog; remove overdue and cancelled lanes."""
        for lane in self.backlog.withdrawn():
            self._dismiss(lane, refusals.withdrawn(lane))
        for lane in self.backlog.admit(self._host.room):
            self._stream.open(lane)
        for lane in self.backlog.overdue():
            self._dismiss(lane, refusals.overdue(lane))

    def dismiss_all(self, error: ServiceError) -> None:
        """Fail all requests that wait for a place."""
        while lanes := list(self.backlog):
            for lane in lanes:
                self._dismiss(lane, error)

    def _dismiss(self, lane: RequestLane, error: ServiceError) -> None:
        """Take a sequence out of the backlog; its requests, up to its END, fail."""
        self.backlog.leave(lane)
        request, lane.current = lane.request, None
        self._refuse(request, error)
        while lane.waiting and not request.is_end:
            request = lane.waiting.popleft()
            self._refuse(request, error)
        if lane.sequence_id:
            self._begin_next(lane)

    def model_changed(self) -> None:
        """The host has another version, or takes no more new sequences."""
        self._version = str(self._host.version.number)
        if not self._host.is_welcoming:
            self.dismiss_all(refusals.unloading(self._host.name))
            self._close_spare()
        elif self._spare:
            self._stream.restart(self._spare)
        for lane in self.backlog:
            error = refusals.wrong_version(lane.request, self._host.name, self._version)
            if error is not None:
                self._dismiss(lane, error)

    # From the host.

    def _receive(self) -> None:
        """Handle the events of the lanes. The host may be in the middle of a run."""
        for lane, event in self._stream.receive():
            if event is None:
                self._finish(lane)
            elif isinstance(event, Opened):
                self._opened(lane, event)
            elif isinstance(event, Failed):
                self._failed(lane, event.error)
            else:
                self._ended(lane, event)

    def _opened(self, lane: RequestLane, opened: Opened) -> None:
        """A lane has its sequence: run its current request, or what is left of it."""
        self.backlog.forget_admission(lane)
        self.answers.forget(lane)
        held = lane.held_steps(opened)
        lane.step = opened.applied - held
        if held:
            # The host sends those outputs by itself; what is left is run after them.
            lane.resumes_at = opened.applied
        elif (error := refusals.wrong_turn(lane, lane.request)) is not None:
            self._finish(lane, error)
        else:
            self._stream.send(lane)

    def _failed(self, lane: RequestLane, error: LaneError) -> None:
        """The host has not opened a lane, or not run its current request."""
        request, was_open = lane.current, lane.is_open
        if not was_open or isinstance(error, StoreDownError):
            # The host has no such lane, or has parked its sequence: only another open goes on.
            self._stream.release(lane)
        if request is None:
            if not lane.is_open:
                self._forget_idle(lane)
        elif was_open:
            self._finish(lane, refusals.not_run(lane, error))
        elif isinstance(error, LimitError):
            # Another stream was faster, or only the store has the sequence.
            limit = self.backlog.wait(lane)
            if limit is None:
                self._close_spare()
            else:
                self._finish(lane, limit)
        else:
            self._finish(lane, refusals.not_opened(request, self._host.name, error))

    def _ended(self, lane: RequestLane, ended: Ended) -> None:
        """The host has ended a lane by itself."""
        self._stream.release(lane)
        request = lane.current
        if request is None:
            self._forget_idle(lane)
        elif (
            not lane.sequence_id
            and ended.reason is EndReason.IDLE
            and lane.missing == request.steps
        ):
            # The lane expired just when this request borrowed it.
            self._stream.open(lane)
        else:
            self._finish(lane, refusals.ended(request, ended.reason))

    def _forget_idle(self, lane: RequestLane) -> None:
        """A lane that ran no request has gone: begin what waits for its sequence, if anything."""
        if lane.sequence_id:
            self._begin_next(lane)
        elif lane in self._spare:
            self._spare.remove(lane)
