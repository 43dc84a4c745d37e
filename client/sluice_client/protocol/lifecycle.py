"""The lanes of a connection: what each waits for, and how it passes from one status to the next."""

from collections import deque

from sluice_client.errors import SequenceClosed, SluiceError
from sluice_client.protocol.calls import LaneRequest
from sluice_client.protocol.lane import Lane, Status
from sluice_client.protocol.openings import Opening
from sluice_client.protocol.steps import Steps
from sluice_client.protocol.tables import Numbers


class Lanes(dict[int, Lane]):
    """All lanes of one connection, by number."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps
        # Lanes whose open, and whose close or park, must be sent.
        self.to_open: deque[Lane] = deque()
        self.to_end: list[Lane] = []
        # Lanes that failed here while the server still has them: to be parked.
        self.abandoned: list[int] = []
        # Lanes that wait until the server's store answers again.
        self.postponed: list[Lane] = []
        # Requests that wait until their lanes are idle.
        self.waiting_for_idle: list[tuple[Lane, LaneRequest, int]] = []
        # The server opens nothing more on this stream.
        self.is_draining = False
        # Why the server opens nothing (more), in its own words.
        self.refusal = ""
        # Some lane was opened on the present stream.
        self.has_opened = False
        # A lane that had waited for the store was opened.
        self.has_recovered = False

    # -- what callers ask -----------------------------------------------------------

    def add(self, opening: Opening, request: LaneRequest, position: int) -> Lane:
        """A new lane for `opening`; not to be opened yet."""
        number = int(request.lanes[position])
        attempt = opening.ticket.attempt if opening.ticket is not None else 0
        lane = self[number] = Lane(number, opening, request, position, attempt=attempt)
        return lane

    def request_end(self, numbers: Numbers, *, is_parking: bool) -> LaneRequest:
        """Have lanes closed or parked, once all their outputs have arrived."""
        request = LaneRequest(numbers)
        for position, number in enumerate(numbers.tolist()):
            lane = self[number]
            lane.is_released = True
            if lane.status is Status.ENDED:
                request.resolve(position)
                self.free(lane)
                continue
            lane.ended_by, lane.ended_position = request, position
            lane.is_parking = is_parking
            self.to_end.append(lane)
        return request

    def when_idle(self, numbers: Numbers) -> LaneRequest:
        """A request that is done once all submitted steps are answered and applied."""
        request = LaneRequest(numbers)
        for position, number in enumerate(numbers.tolist()):
            self.waiting_for_idle.append((self[number], request, position))
        self.resolve_idle()
        return request

    def resolve_idle(self) -> None:
        """Finish the requests for lanes that are idle now, or have ended."""
        waiting, self.waiting_for_idle = self.waiting_for_idle, []
        for lane, request, position in waiting:
            if lane.status is Status.ENDED:
                request.resolve(position, lane.error)
            elif lane.status is Status.ATTACHED and self.steps.is_idle(lane.number):
                request.resolve(position)
            else:
                self.waiting_for_idle.append((lane, request, position))

    # -- the stream -----------------------------------------------------------------

    def begin(self) -> None:
        """A new stream was started."""
        self.is_draining = self.has_opened = False

    def lose(self) -> None:
        """The stream has ended: open all lanes again on the next one."""
        self.to_open.clear()
        self.postponed.clear()
        self.abandoned.clear()
        for lane in list(self.values()):
            lane.is_occupied = False
            if lane.status is Status.ENDED:
                self.free(lane)
            elif lane.status is Status.ENDING and lane.is_parking and not self._may_replay(lane):
                self.end(lane, None)  # the end of a stream parks its lanes
            else:
                self.reopen(lane)

    def _may_replay(self, lane: Lane) -> bool:
        """The server may go back behind outputs that have arrived."""
        received = self.steps.received(lane.number)
        return self.steps.replay_buffer.replay_floor(lane.number) < received

    def retry_postponed(self) -> None:
        """Ask again for the lanes that wait for the server's store."""
        self.to_open += self.postponed
        self.postponed.clear()

    def fail_postponed(self, error: SluiceError) -> None:
        """End the lanes that wait for the server's store."""
        self.postponed.clear()
        for lane in list(self.values()):
            if lane.is_postponed:
                self.end(lane, error)

    # -- from one status to the next ------------------------------------------------

    def reopen(self, lane: Lane) -> None:
        """Open a lane again, on this stream or on the next one."""
        self._suspend(lane)
        self.to_open.append(lane)

    def postpone(self, lane: Lane, refusal: str) -> None:
        """The server's store does not answer: the lane is not open, and nothing was changed."""
        self._suspend(lane)
        self.postponed.append(lane)
        lane.is_postponed = True
        self.refusal = refusal

    def _suspend(self, lane: Lane) -> None:
        self.steps.detach(lane.number)
        if lane.status is Status.ENDING:
            self.to_end.append(lane)
        lane.status = Status.WAITING

    def end(self, lane: Lane, error: SluiceError | None) -> None:
        """End a lane: with an error, or because its handle asked for it."""
        if lane.status is Status.ENDED:
            return
        lane.status, lane.is_postponed = Status.ENDED, False
        sequence_id, step = lane.opening.sequence_id, self.steps.received(lane.number)
        reason = error or SequenceClosed("its handle was closed")
        lane.error = reason.at(sequence_id, step)
        self.steps.end(lane.number, lane.error)
        if not lane.was_opened:
            lane.was_opened = True
            lane.opened_by.resolve(lane.opened_position, reason.at(sequence_id, None))
        if lane.ended_by is not None:
            lane.ended_by.resolve(lane.ended_position, error and error.at(sequence_id, step))
        if lane.is_occupied:
            self.abandoned.append(lane.number)
        self.resolve_idle()
        self.free(lane)

    def free(self, lane: Lane) -> None:
        """Free a lane's number, once neither side uses it."""
        if lane.status is Status.ENDED and lane.is_released and not lane.is_occupied:
            del self[lane.number]
            self.steps.free(lane.number)
