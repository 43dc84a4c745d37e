"""The line before a full model: who waits for a place, in which order, and for how long."""

import asyncio
import math
from collections.abc import Callable, Iterator
from itertools import islice

from sluice_service.errors import LimitError
from sluice_service.rpc.open_inference.messages import Request
from sluice_service.rpc.open_inference.refusals import Lane
from sluice_service.settings import Settings


class _Turn:
    """Where a lane stands in the line, and until when."""

    __slots__ = ("deadline", "number")

    def __init__(self, number: int, deadline: float) -> None:
        self.number = number
        self.deadline = deadline


class Backlog:
    """Lanes that wait for a place, and those that have been called to take one.

    Who comes while others wait goes to the end of the line. Who was called and found no
    place, because another stream was quicker, keeps his turn.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        steps_max: int,
        now: Callable[[], float],
        on_overdue: Callable[[Lane], None],
    ) -> None:
        """`on_overdue` is called for each lane that has waited for too long, and lets it leave."""
        self._sequences_max = settings.backlog_sequences_max
        self._seconds_max = settings.backlog_seconds_max
        self._steps_max = steps_max
        self._now = now
        self._on_overdue = on_overdue
        self._waiting: dict[Lane, _Turn] = {}
        self._is_in_order = True
        self._called: dict[Lane, _Turn] = {}
        self._turns = 0
        # Of all requests that wait, for they do not count as waiting to be run.
        self.steps = 0
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = math.inf  # when the timer rings

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._in_order()))

    def __contains__(self, lane: Lane) -> bool:
        return lane in self._waiting

    @property
    def called(self) -> int:
        """How many are about to take a place."""
        return len(self._called)

    # Coming and going.

    def enter(self, lane: Lane, room: int) -> bool:
        """True where a lane may take one of `room` places at once; else it waits.

        Raises LimitError where it cannot.
        """
        turn = self._next_turn()
        if not self._waiting and room > len(self._called):
            self._called[lane] = turn
            return True
        self._require_room()
        self._wait(lane, turn)
        return False

    def put_back(self, lane: Lane) -> None:
        """Let a lane that found no place wait where it stood, or at the end. Raises LimitError."""
        turn = self._called.pop(lane, None)
        if turn is None or not self._sequences_max:
            self._require_room()
        self._wait(lane, turn or self._next_turn())
        self._is_in_order = False  # until somebody is called: many may come back at once

    def join(self, lane: Lane, request: Request) -> None:
        """Let one more request wait with its lane. Raises LimitError."""
        self._require_room_for_steps()
        self.steps += request.steps
        self._hurry(self._waiting[lane], request)

    def call(self, room: int) -> list[Lane]:
        """Those whose turn it is, where there is room for so many in all."""
        count = room - len(self._called)
        if count <= 0:
            return []
        lanes = list(islice(self._in_order(), count))
        for lane in lanes:
            self._called[lane] = self.leave(lane)
        return lanes

    def leave(self, lane: Lane) -> _Turn:
        """Let a lane wait no more, with all of its requests."""
        self.steps -= lane.steps_asked
        return self._waiting.pop(lane)

    def settle(self, lane: Lane) -> None:
        """A lane that was called has its place, or will have none."""
        self._called.pop(lane, None)

    def _in_order(self) -> dict[Lane, _Turn]:
        """Those who wait, the first of them first."""
        if not self._is_in_order:
            self._waiting = dict(sorted(self._waiting.items(), key=lambda item: item[1].number))
            self._is_in_order = True
        return self._waiting

    def _next_turn(self) -> _Turn:
        self._turns += 1
        return _Turn(self._turns, self._now() + self._seconds_max)

    def _wait(self, lane: Lane, turn: _Turn) -> None:
        self._waiting[lane] = turn
        self.steps += lane.steps_asked
        for request in lane.requests():
            self._hurry(turn, request)

    def _require_room(self) -> None:
        if len(self._waiting) >= self._sequences_max:
            raise LimitError(
                "as many sequences are alive as sequences_max allows, and "
                f"{len(self._waiting)} wait for a place, as many as backlog_sequences_max allows; "
                "end some, or serve with a higher --sequences-max or --backlog-sequences-max"
            )
        self._require_room_for_steps()

    def _require_room_for_steps(self) -> None:
        if self.steps >= self._steps_max:
            raise LimitError(
                f"{self.steps} steps wait for their sequences to have a place, as many as "
                "stream_queue_steps_max allows; wait for the answer to sequence_start before "
                "sending more"
            )

    # Time.

    def _hurry(self, turn: _Turn, request: Request) -> None:
        """Let a request that waits for less time than others set the time for its sequence."""
        if request.timeout_seconds is not None:
            turn.deadline = min(turn.deadline, self._now() + request.timeout_seconds)
        self._look_at(turn.deadline)

    def _look_at(self, deadline: float) -> None:
        if deadline < self._looks_at:
            if self._timer is not None:
                self._timer.cancel()
            self._looks_at = deadline
            seconds = max(0.0, deadline - self._now())
            self._timer = asyncio.get_running_loop().call_later(seconds, self.expire)

    def expire(self) -> None:
        """Tell of all that have waited for too long, and look again when others will have."""
        if self._timer is not None:
            self._timer.cancel()
        now, self._looks_at = self._now(), math.inf
        for lane, turn in list(self._waiting.items()):
            if turn.deadline <= now:
                self._on_overdue(lane)
        if self._waiting:
            self._look_at(min(turn.deadline for turn in self._waiting.values()))
