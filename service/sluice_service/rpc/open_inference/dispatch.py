"""Puts single requests on lanes: all calls of the Open Inference Protocol share one host's stream.

A sequence keeps its lane as long as it lives, whichever connection its requests come
from, and has one request in the scheduler at a time; the others wait here. Requests
that arrive in one turn of the event loop go to the host as one frame. A request
without a sequence borrows a lane whose state is set back to the initial one. Where all
places are taken, a lane waits for one in the backlog.
"""

import asyncio

from sluice_service.errors import (
    LaneError,
    LimitError,
    ModelNotFoundError,
    NotFoundError,
    OutOfRangeError,
    SequenceClosedError,
    ServiceError,
    StoppingError,
)
from sluice_service.models.host import Host
from sluice_service.rpc.open_inference.backlog import Backlog
from sluice_service.rpc.open_inference.host_stream import Trunk
from sluice_service.rpc.open_inference.last_answers import Answers
from sluice_service.rpc.open_inference.messages import Request
from sluice_service.rpc.open_inference.refusals import (
    NONE,
    Lane,
    Tally,
    applied_before,
    misplaced,
    not_started,
    overdue,
    passed,
    withdrawn,
)
from sluice_service.sequences.events import Opened
from sluice_service.settings import Settings

# Lanes kept for requests without a sequence; an eighth of all sequences at the most.
_SPARE_MAX = 256


class Exchange:
    """One model's requests on their way to the host, and its outputs on their way back."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.tally = Tally()
        self._host = host
        self._trunk = Trunk(host, settings, self)
        self._spare_max = min(_SPARE_MAX, settings.sequences_max // 8)
        self._version = str(host.version.number)  # on which sequences begin
        self._by_key: dict[str, Lane] = {}
        self._spare: list[Lane] = []
        self._answers = Answers()
        self._backlog = Backlog(
            settings,
            steps_max=host.limits.credit_steps,
            now=host.now,
            on_overdue=self._overdue,
        )
        host.watch_room(self._review)
        self._has_cancelled = False  # among those who wait for a place
        self._is_admission_due = False
        self._waiting_steps = 0

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
                    self._waiting_steps -= (request.batch - row - 1) * request.steps
                    self._refuse(request, error)
                    break

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
        self._fail(request, error)

    def _fail(self, request: Request, error: ServiceError) -> None:
        """Fail a request; rows of its batch that wait for a place have nothing to wait for."""
        request.fail(error)
        if request.batch > 1 and not request.is_cancelled:
            self.cancel(request)

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
        lane.resumes_at = NONE
        if lane.number != NONE and not (lane.key and request.is_start):
            self._trunk.send(lane)
        elif not self._needs_place(lane, request):
            self._trunk.open(lane)
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
            if self._answers.repeat(lane, request):
                self._waiting_steps -= request.steps
            else:
                error = misplaced(lane, request) if lane.is_open else None
                error = error or self._place(lane, request)
                if error is not None:
                    self._refuse(request, error)
        if lane.current is None and lane.number == NONE:
            self._by_key.pop(lane.key, None)
            self._answers.lose(lane)

    def leave(self, lane: Lane, error: ServiceError | None = None) -> None:
        """The current request of a lane is over: the next one's turn."""
        request, lane.current = lane.current, None
        assert request is not None
        self._waiting_steps -= request.steps
        if error is not None:
            self._settle(lane)
            self._fail(request, error)
        elif lane.key:
            self._answers.keep(lane, request)
            if request.is_end:
                self._trunk.close(lane)
        if lane.key:
            self._next(lane)
        elif lane.number != NONE:
            is_spare = len(self._spare) < self._spare_max and not self._backlog
            if is_spare and self._host.is_welcoming:
                if lane.version != self._version:
                    self._trunk.restart([lane])
                self._spare.append(lane)
            else:
                self._trunk.close(lane)

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
            if self._backlog.enter(lane, self._host.room + self._trunk.parting):
                self._trunk.open(lane)
        except LimitError as error:
            lane.current = None
            return error
        return None

    def _give_up_spare(self) -> None:
        """Let go of the places that only wait for requests without a sequence."""
        while self._spare:
            self._trunk.close(self._spare.pop())

    def _settle(self, lane: Lane) -> None:
        """A lane has its sequence, or will have none: a place it did not take is the next one's."""
        self._backlog.settle(lane)
        self._review()

    def _review(self) -> None:
        """Look at those who wait, if there are any, once this turn of the event loop is over."""
        if self._backlog and not self._is_admission_due:
            self._is_admission_due = True
            asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        """Let the first of those who wait have the places that are free."""
        self._is_admission_due = False
        if self._has_cancelled:
            self._has_cancelled = False
            for lane in self._backlog:
                if lane.current is not None and lane.current.is_cancelled:
                    self._dismiss(lane, withdrawn(lane.current))
        for lane in self._backlog.call(self._host.room):
            self._trunk.open(lane)

    def cancel(self, request: Request) -> None:
        """Nobody waits for a request any more: it is not begun, and gives up its turn."""
        request.is_cancelled = True
        self._has_cancelled = True
        self._review()

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

    def _overdue(self, lane: Lane) -> None:
        assert lane.current is not None
        self._dismiss(lane, overdue(lane.current))

    def renew(self) -> None:
        """Let the places for requests without a sequence be of the newest version."""
        self._version = str(self._host.version.number)
        if not self._host.is_welcoming:
            self.dismiss(StoppingError(f"model {self._host.name!r} is being unloaded"))
            self._give_up_spare()
        elif self._spare:
            self._trunk.restart(self._spare)
        for lane in self._backlog:
            if lane.current is not None and (error := self._misversioned(lane.current)):
                self._dismiss(lane, error)

    # What has come of a lane.

    def opened(self, lane: Lane, opened: Opened) -> bool:
        """A lane has its sequence; True where its current request is to be run."""
        self._settle(lane)
        request = lane.current
        assert request is not None
        self._answers.forget(lane)
        held = applied_before(lane, request, opened)
        lane.step = opened.applied - held
        if held:
            # Those outputs come by themselves, and then what is left of it is run.
            lane.resumes_at = opened.applied
            return False
        error = misplaced(lane, request)
        if error is not None:
            self.leave(lane, error)
        return error is None

    def refused(self, lane: Lane, refusal: LaneError) -> None:
        """A lane has no sequence: it waits where there was no place, else its request fails."""
        assert lane.current is not None
        error: ServiceError = refusal
        if isinstance(refusal, LimitError):
            # A stream was quicker, or only the store has the sequence.
            try:
                self._backlog.put_back(lane)
            except LimitError as limit:
                error = limit
            else:
                self._give_up_spare()
                self._review()
                return
        if isinstance(refusal, NotFoundError | SequenceClosedError):
            error = not_started(lane.current, self._host.name, refusal)
        if isinstance(refusal, OutOfRangeError):
            error = passed(lane.current, refusal.expected_step)
        self.leave(lane, error)

    def vacated(self, lane: Lane) -> None:
        """The host has ended a lane that has no request."""
        if lane.key:
            self._next(lane)
        elif lane in self._spare:
            self._spare.remove(lane)
