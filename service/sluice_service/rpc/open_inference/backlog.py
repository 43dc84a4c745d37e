"""Holds the queue of a full model: which lanes wait for a place, in order, with deadlines."""

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from sluice_service.errors import LimitError
from sluice_service.rpc.open_inference.requests import InferRequest, RequestLane
from sluice_service.settings import Settings


@dataclass(slots=True)
class _Turn:
    """The place of a lane in the queue, and its deadline."""

    number: int
    deadline: float


class Backlog:
    """Lanes that wait for a place, and those that were admitted and are about to take one.

    A lane that arrives while others wait goes to the end of the queue. A lane that was admitted
    but found no place, because another stream was faster, keeps its turn.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        steps_max: int,
        now: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called when `withdrawn`, `admit` or `overdue` may name lanes."""
        self.steps = 0  # of all requests that wait here: they do not count as waiting to be run
        self._sequences_max = settings.backlog_sequences_max
        self._seconds_max = settings.backlog_seconds_max
        self._steps_max = steps_max
        self._now = now
        self._wake = wake
        self._waiting: dict[RequestLane, _Turn] = {}
        self._is_in_order = True
        self._admitted: dict[RequestLane, _Turn] = {}
        self._turns = 0
        self._has_cancelled = False
        self._is_review_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._next_deadline = math.inf  # for which the timer is set

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[RequestLane]:
        return iter(list(self._in_order()))

    def __contains__(self, lane: RequestLane) -> bool:
        return lane in self._waiting

    @property
    def admitted(self) -> int:
        """How many lanes are about to take a place."""
        return len(self._admitted)

    # Joining and leaving.

    def admit_newcomer(self, lane: RequestLane, places: int) -> bool:
        """True if a lane may take one of `places` free places, because no other waits for it."""
        if self._waiting or places <= len(self._admitted):
            return False
        self._admitted[lane] = self._next_turn()
        return True

    def wait(self, lane: RequestLane) -> LimitError | None:
        """Let a lane wait, in its earlier place if it was admitted; the error if it may not."""
        turn = self._admitted.pop(lane, None)
        if (turn is None or not self._sequences_max) and (error := self._check_room()):
            return error
        if turn is None:
            turn = self._next_turn()
        else:
            # Many may come back at once: they are sorted when the next is admitted.
            self._is_in_order = False
        self._waiting[lane] = turn
        self.steps += lane.waiting_steps
        for request in lane.requests():
            self._shorten(turn, request)
        self.review()
        return None

    def join(self, lane: RequestLane, request: InferRequest) -> LimitError | None:
        """Let one more request wait with its lane; the error if it may not."""
        error = self._check_room_for_steps()
        if error is None:
            self.steps += request.steps
            self._shorten(self._waiting[lane], request)
        return error

    def admit(self, places: int) -> list[RequestLane]:
        """The lanes at the front, as many as `places` free places allow."""
        count = places - len(self._admitted)
        if count <= 0:
            return []
        lanes = list(islice(self._in_order(), count))
        for lane in lanes:
            self._admitted[lane] = self.leave(lane)
        return lanes

    def forget_admission(self, lane: RequestLane) -> None:
        """A lane has its sequence, or will get none. A place that it did not take is free."""
        self._admitted.pop(lane, None)
        self.review()

    def note_cancelled(self) -> None:
        """A request was cancelled, which may be one that waits here."""
        self._has_cancelled = True
        self.review()

    def withdrawn(self) -> list[RequestLane]:
        """The lanes whose first request was cancelled; they stay until they `leave`."""
        if not self._has_cancelled:
            return []
        self._has_cancelled = False
        return [lane for lane in self if lane.request.is_cancelled]

    def leave(self, lane: RequestLane) -> _Turn:
        """Remove a lane from the queue, with all of its requests."""
        self.steps -= lane.waiting_steps
        return self._waiting.pop(lane)

    def _in_order(self) -> dict[RequestLane, _Turn]:
        """The waiting lanes, in order."""
        if not self._is_in_order:
            self._waiting = dict(sorted(self._waiting.items(), key=lambda item: item[1].number))
            self._is_in_order = True
        return self._waiting

    def _next_turn(self) -> _Turn:
        self._turns += 1
        return _Turn(self._turns, self._now() + self._seconds_max)

    def _check_room(self) -> LimitError | None:
        """The error if no more lanes may wait."""
        if len(self._waiting) < self._sequences_max:
            return self._check_room_for_steps()
        return LimitError(
            "as many sequences are alive as sequences_max allows, and "
            f"{len(self._waiting)} wait for a place, as many as backlog_sequences_max allows; "
            "end some, or serve with a higher --sequences-max or --backlog-sequences-max"
        )

    def _check_room_for_steps(self) -> LimitError | None:
        if self.steps < self._steps_max:
            return None
        return LimitError(
            f"{self.steps} steps wait for their sequences to have a place, as many as "
            "stream_queue_steps_max allows; wait for the answer to sequence_start before "
            "sending more"
        )

    # When to look.

    def review(self) -> None:
        """Wake after this turn of the event loop, if any lane waits."""
        if self._waiting and not self._is_review_due:
            self._is_review_due = True
            asyncio.get_running_loop().call_soon(self._review)

    def _review(self) -> None:
        self._is_review_due = False
        self._wake()

    def overdue(self) -> list[RequestLane]:
        """The lanes that have waited for too long; they stay until they `leave`."""
        now = self._now()
        if now < self._next_deadline:
            return []
        late, deadlines = [], [math.inf]
        for lane, turn in self._waiting.items():
            if turn.deadline <= now:
                late.append(lane)
            else:
                deadlines.append(turn.deadline)
        self._set_timer(min(deadlines))
        return late

    def _shorten(self, turn: _Turn, request: InferRequest) -> None:
        """Let the request with the shortest timeout set the deadline of its sequence."""
        if request.timeout_seconds is not None:
            turn.deadline = min(turn.deadline, self._now() + request.timeout_seconds)
        if turn.deadline < self._next_deadline:
            self._set_timer(turn.deadline)

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next_deadline, self._timer = deadline, None
        if deadline < math.inf:
            seconds = max(0.0, deadline - self._now())
            self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        # `now` may be behind the timer's clock. Then `overdue` sets the timer again.
        self._next_deadline = -math.inf if self._waiting else math.inf
        self.review()
