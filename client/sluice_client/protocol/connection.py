"""The client's side of the stream: which message to send next, and what a message that came means.

No I/O, no threads, no clock: a face calls `begin` when it has a stream, sends what
`next_request` gives, hands what arrives to `receive`, and calls `lose` when the
stream has ended. The rules it keeps are in docs/protocol.md: every step is applied
once and every output arrives once, however often the stream is lost.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

from sluice_client import errors
from sluice_client.errors import ProtocolViolation, SluiceError
from sluice_client.protocol.calls import Call, Opening, Request
from sluice_client.protocol.lane import Lane, Status
from sluice_client.protocol.messages import (
    LANE_BYTES,
    UNLIMITED,
    lanes_that_fit,
    one_open_fits,
    one_step_fits,
    open_message,
    put_frame,
    request_bytes_max,
    rows_that_fit,
)
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.resume import begin, go_on, judge, told
from sluice_client.protocol.signature import Array, Signature
from sluice_client.protocol.steps import Ledger
from sluice_client.protocol.tables import Numbers
from sluice_protos.sequences_pb2 import (
    Closed,
    Durable,
    Fault,
    InferRequest,
    InferResponse,
    Limits,
    Opened,
)

# The server has a sequence on the lane of the present stream, or soon may.
_ON_STREAM: Final = {Status.ASKED, Status.ATTACHED, Status.ENDING}

# A step that one of these refuses is not applied; its lane goes on from there.
_STEP_FAULTS: Final = {Fault.INVALID_INPUT, Fault.RUN_FAILED, Fault.NON_FINITE, Fault.LIMIT}
# What a close may meet that means it has been done already, or is another's to do.
_GONE: Final = {
    Fault.SEQUENCE_CLOSED,
    Fault.NOT_FOUND,
    Fault.FENCED,
    Fault.STALE,
    Fault.UNKNOWN_LANE,
}


class Connection:
    """All sequences of one model that one client has, over whichever stream it has."""

    def __init__(
        self,
        model: str,
        signature: Signature,
        *,
        bounds: Bounds | None = None,
        response_bytes_max: int = 0,
    ) -> None:
        self.model = model
        self.signature = signature
        self.ledger = Ledger(bounds)
        self.limits = Limits()
        self._response_bytes_max = response_bytes_max
        self._lanes: dict[int, Lane] = {}
        self._opens: deque[Lane] = deque()
        self._ends: list[Lane] = []
        # Lanes the server could not open because its store does not answer.
        self._postponed: list[Lane] = []
        # Who waits for lanes to rest.
        self._resting: list[tuple[Lane, Request, int]] = []
        # Lanes given up here that the server still holds.
        self._abandoned: list[int] = []
        self._is_streaming = False
        self._is_first = True
        self._is_draining = False
        self._is_acknowledgement_due = False
        self._responses = 0
        self._failure: SluiceError | None = None
        # Some lane was opened on the present stream.
        self.has_opened = False
        # A lane that had waited for the store was opened.
        self.has_recovered = False
        # Why the server opens nothing (more), in its own words.
        self.refusal = ""

    # -- what callers ask ---------------------------------------------------------

    @property
    def wants_stream(self) -> bool:
        """Some sequence is to be opened, or is open."""
        return any(lane.status is not Status.ENDED for lane in self._lanes.values())

    @property
    def has_something_to_send(self) -> bool:
        """`next_request` may have something to give."""
        return self._is_acknowledgement_due or bool(
            self._opens or self._ends or self._abandoned or self.ledger.has_work
        )

    @property
    def is_spent(self) -> bool:
        """The server has let all lanes go and opens none: another stream is needed."""
        is_refused = bool(self._postponed) and not self._opens
        return (self._is_draining or is_refused) and not any(
            lane.status in _ON_STREAM for lane in self._lanes.values()
        )

    @property
    def has_postponed(self) -> bool:
        """Some lane waits for the server's store, to be asked for again after a while."""
        return bool(self._postponed)

    def lane(self, number: int) -> Lane:
        """What is known of a lane, for its handle to read."""
        return self._lanes[number]

    def durable(self, number: int) -> int:
        """Steps of a lane that are known to survive the death of the server."""
        given = self._lanes[number].durability
        return 0 if given in ("off", None) else self.ledger.safe(number)

    def open(self, openings: Sequence[Opening]) -> Request:
        """Ask for sequences; the lanes are in the request at once, usable when it is done."""
        request = Request(self.ledger.take(len(openings)))
        for position, opening in enumerate(openings):
            number = int(request.lanes[position])
            attempt = opening.ticket.attempt if opening.ticket is not None else 0
            lane = Lane(number, opening, request, position, attempt=attempt)
            self._lanes[number] = lane
            if self._failure is not None:
                self._end(lane, self._failure)
            else:
                self._opens.append(lane)
        return request

    def submit(self, lanes: Numbers, counts: Numbers, inputs: list[Array]) -> Call:
        """Give each of `lanes` its next steps: [chunks], [chunks], [sum(counts), …] each.

        Raises LimitReached when the server can never take one.
        """
        if not one_step_fits(self.limits, self.signature.step_bytes):
            raise errors.LimitReached(
                f"one step has {self.signature.step_bytes} bytes, more than the server takes in a "
                f"message ({self.limits.request_bytes_max}); serve with a higher "
                "--request-bytes-max"
            )
        held_max = self.limits.unacknowledged_steps_max or UNLIMITED
        if self.ledger.acknowledgements.most_held(lanes, counts) > held_max:
            raise errors.LimitReached(
                f"the server holds {held_max} outputs of a sequence at most, and a chunk of "
                "more steps could not be confirmed before it is done; give smaller chunks"
            )
        call = Call(lanes, counts, inputs, self.signature.allocate(len(inputs[0])))
        self.ledger.submit(call)
        if not self._is_streaming:
            self.ledger.admit()
        return call

    def confirm(self, number: int, step: int) -> None:
        """The outputs before `step` are safe with the caller of a lane that holds its outputs."""
        self.ledger.acknowledgements.confirm(number, step)
        steps_max = self.limits.unacknowledged_steps_max or UNLIMITED
        self._is_acknowledgement_due |= self.ledger.acknowledgements.is_due(
            np.array([number]), steps_max
        )

    def replay(self, number: int, inputs: list[Array]) -> None:
        """Give a lane the inputs that it lacks, [steps, …] each; its outputs are not given again.

        Raises InvalidInput when they are not as many as are needed.
        """
        lane, rows = self._lanes[number], len(inputs[0])
        first = self.ledger.received(number) - rows
        if lane.replays_from is None or first != lane.replays_from:
            needed = "none" if lane.replays_from is None else first + rows - lane.replays_from
            raise errors.InvalidInput(f"{needed} steps are to be replayed, not {rows}")
        lane.replays_from = None
        self.ledger.restore(number, Call(np.array([number]), np.array([rows]), inputs, []))

    def close(self, lanes: Numbers) -> Request:
        """Drop the sequences once all their outputs have arrived, and let the lanes go."""
        return self._ask_end(lanes, is_parking=False)

    def park(self, lanes: Numbers) -> Request:
        """Let the lanes go once all their outputs have arrived; the sequences stay."""
        return self._ask_end(lanes, is_parking=True)

    def rest(self, lanes: Numbers) -> Request:
        """Wait until all that was given has been answered, and is applied at this server."""
        request = Request(lanes)
        for position, number in enumerate(lanes.tolist()):
            self._resting.append((self._lanes[number], request, position))
        self._settle_resting()
        return request

    def _settle_resting(self) -> None:
        waiting, self._resting = self._resting, []
        for lane, request, position in waiting:
            if lane.status is Status.ENDED:
                request.settle(position, lane.error)
            elif lane.status is Status.ATTACHED and self.ledger.is_idle(lane.number):
                request.settle(position)
            else:
                self._resting.append((lane, request, position))

    def _ask_end(self, numbers: Numbers, *, is_parking: bool) -> Request:
        request = Request(numbers)
        for position, number in enumerate(numbers.tolist()):
            lane = self._lanes[number]
            lane.is_released = True
            if lane.status is Status.ENDED:
                request.settle(position)
                self._free(lane)
                continue
            lane.ended_by, lane.ended_position = request, position
            lane.is_parking = is_parking
            self._ends.append(lane)
        return request

    # -- the stream ---------------------------------------------------------------

    def begin(self, signature: Signature) -> None:
        """A new stream is there, to a server whose model has this signature."""
        if not signature.is_like(self.signature):
            message = "the server now has another model of this name"
            for lane in list(self._lanes.values()):
                if lane.was_opened:
                    self._end(lane, self._place(errors.WrongModel(message), lane))
        # A new version of the model: who began with the old one may still be served by it.
        self.signature = signature
        self._is_streaming, self._is_first = True, True
        self._is_draining = self._is_acknowledgement_due = self.has_opened = False
        self._responses = 0

    def lose(self) -> None:
        """The stream has ended: everything goes on with the next one."""
        self._is_streaming = False
        self._opens.clear()
        self._postponed.clear()
        self._abandoned.clear()
        # Every RESUME tells what has arrived.
        self.ledger.acknowledgements.clear()
        for lane in list(self._lanes.values()):
            lane.is_occupied = False
            is_safe = self.ledger.is_safe(lane.number)
            if lane.status is Status.ENDED:
                self._free(lane)
            elif lane.status is Status.ENDING and lane.is_parking and is_safe:
                self._end(lane, None)  # a stream that ends parks its lanes
            else:
                self._reopen(lane)

    def retry(self) -> None:
        """Ask again for the lanes that wait for the server's store."""
        self._opens += self._postponed
        self._postponed.clear()

    def give_up(self, error: SluiceError) -> None:
        """The store stays away: end the lanes that wait for it with `error`."""
        self._postponed.clear()
        for lane in list(self._lanes.values()):
            if lane.is_postponed:
                self._end(lane, self._place(error, lane))

    def fail(self, error: SluiceError) -> None:
        """No stream can be had: end every sequence with `error`."""
        self.lose()
        for lane in list(self._lanes.values()):
            self._end(lane, error)

    def shut(self, error: SluiceError) -> None:
        """As `fail`, and for everything that is asked from now on."""
        self._failure = error
        self.fail(error)

    def next_request(self) -> InferRequest | None:
        """The next message to send, as full as credit and limits allow; None: nothing to say."""
        if not self._is_streaming:
            return None
        request = InferRequest()
        bytes_used = self._put_opens(request)
        bytes_used += self._put_ends(request, bytes_used)
        self._put_chunks(request, bytes_used + self.ledger.acknowledgements.bytes_max)
        is_needed = request.open or request.lane or request.close or request.park
        if not is_needed and not self._is_acknowledgement_due:
            return None
        self._put_acknowledgements(request)
        if self._is_first:
            request.model = self.model
            request.response_bytes_max = self._response_bytes_max
            self._is_first = False
        return request

    def _put_opens(self, request: InferRequest) -> int:
        size, size_max = 0, request_bytes_max(self.limits) // 2
        while self._opens and not self._is_draining:
            lane = self._opens.popleft()
            if lane.status is not Status.WAITING:
                continue
            lane.attempt += 1
            message = open_message(lane, told(lane, self.ledger))
            if not one_open_fits(self.limits, message):
                why = (
                    f"its open has {message.ByteSize()} bytes, more than the server takes in a "
                    f"message ({self.limits.request_bytes_max}); serve with a higher "
                    "--request-bytes-max"
                )
                self._end(lane, self._place(errors.LimitReached(why), lane))
                continue
            size += message.ByteSize() + 8
            if size > size_max and request.open:
                self._opens.appendleft(lane)
                break
            request.open.append(message)
            lane.status = Status.ASKED
        return size

    def _put_chunks(self, request: InferRequest, bytes_used: int) -> None:
        limits, ledger, step_bytes = self.limits, self.ledger, self.signature.step_bytes
        is_alone = not (request.open or request.close or request.park)
        rows_max = rows_that_fit(
            limits, step_bytes, bytes_used, ledger.in_flight, is_alone=is_alone
        )
        frame = ledger.pick(rows_max, limits.chunk_steps_max or UNLIMITED, step_bytes)
        if frame is not None:
            put_frame(request, frame)

    def _put_acknowledgements(self, request: InferRequest) -> None:
        acknowledgements = self.ledger.acknowledgements
        if acknowledgements.count and acknowledgements.is_by_response:
            request.received_responses = self._responses
        elif acknowledgements.count:
            lanes, steps = acknowledgements.entries()
            for number, step in zip(lanes.tolist(), steps.tolist(), strict=True):
                request.received.add(lane=number, step=step)
        acknowledgements.clear()
        self._is_acknowledgement_due = False

    def _put_ends(self, request: InferRequest, bytes_used: int) -> int:
        """Let go of lanes at rest, which have no chunk in this message; the bytes they take."""
        room = lanes_that_fit(self.limits, bytes_used)
        request.park.extend(self._abandoned[:room])
        del self._abandoned[:room]
        count = len(request.park)
        later: list[Lane] = []
        for lane in self._ends:
            is_due = lane.status is Status.ATTACHED and self.ledger.is_idle(lane.number)
            if is_due and count < room:
                (request.park if lane.is_parking else request.close).append(lane.number)
                self.ledger.detach(lane.number)
                lane.status = Status.ENDING
                count += 1
            elif lane.status is not Status.ENDED:
                later.append(lane)
        self._ends = later
        return count * LANE_BYTES

    # -- what arrives -----------------------------------------------------------------

    def receive(self, response: InferResponse) -> None:
        """Take in one message of the present stream. Raises ProtocolViolation."""
        self._responses += 1
        if response.HasField("limits"):
            self.limits = response.limits
        for opened in response.opened:
            self._take_opened(opened)
        if response.lane:
            self._take_outputs(response)
        if response.durable:
            self._take_durable(response.durable)
        for fault in response.faults:
            self._take_fault(fault)
        for closed in response.closed:
            self._take_closed(closed)
        if self._resting:
            self._settle_resting()

    def _take_opened(self, opened: Opened) -> None:
        lane = self._lanes.get(opened.lane)
        if lane is None or lane.status is not Status.ASKED:
            return
        lane.is_occupied = self.has_opened = True
        self.has_recovered |= lane.is_postponed
        lane.is_postponed = False
        if not lane.was_opened:
            begin(lane, opened, self.ledger, self.signature)
        error = judge(lane, opened, self.ledger)
        if error is not None:
            self._end(lane, self._place(error, lane))
            return
        go_on(lane, opened, self.ledger)
        if not lane.was_opened:
            lane.was_opened = True
            lane.asked_by.settle(lane.asked_position)

    def _take_outputs(self, response: InferResponse) -> None:
        count = len(response.lane)
        if len(response.first_step) != count or len(response.steps) not in (0, count):
            raise ProtocolViolation("lane, steps and first_step differ in length")
        lanes = np.fromiter(response.lane, np.int64, count)
        first = np.fromiter(response.first_step, np.int64, count)
        if response.steps:
            counts = np.fromiter(response.steps, np.int64, count)
        else:
            counts = np.ones(count, np.int64)
        outputs = self.signature.decode(response.outputs, int(counts.sum()))
        for number in self.ledger.deliver(lanes, first, counts, outputs).tolist():
            lane = self._lanes[number]
            message = "an output came that follows none, or answers no input"
            self._end(lane, self._place(ProtocolViolation(message), lane))
        steps_max = self.limits.unacknowledged_steps_max or UNLIMITED
        credit = self.limits.credit_steps or UNLIMITED
        self._is_acknowledgement_due |= (
            self.ledger.acknowledgements.count >= credit
            or self.ledger.acknowledgements.is_due(lanes, steps_max)
        )

    def _take_durable(self, durable: Sequence[Durable]) -> None:
        lanes = np.array([entry.lane for entry in durable], np.int64)
        steps = np.array([entry.step for entry in durable], np.int64)
        for number in self.ledger.secure(lanes, steps).tolist():
            lane = self._lanes[number]
            message = "the server calls steps durable that were never sent"
            self._end(lane, self._place(ProtocolViolation(message), lane))

    def _take_fault(self, fault: Fault) -> None:
        lane = self._lanes.get(fault.lane)
        if lane is None or lane.status in (Status.WAITING, Status.ENDED):
            if lane is not None and fault.reason == Fault.UNAVAILABLE:
                lane.is_occupied = False
                self._free(lane)
            return
        received = self.ledger.received(lane.number)
        error = errors.from_fault(fault, sequence_id=lane.opening.sequence_id, step=received)
        if fault.reason in _GONE or fault.reason == Fault.UNAVAILABLE:
            lane.is_occupied = False
        if fault.reason == Fault.UNAVAILABLE:
            self._postpone(lane, fault)
        elif lane.status is Status.ASKED:
            self._take_refusal(lane, fault, error)
        elif lane.status is Status.ENDING:
            self._end(lane, None if lane.is_parking or fault.reason in _GONE else error)
        elif fault.reason in _STEP_FAULTS:
            # Order within a lane holds: the outputs before the fault have come before it.
            if fault.expected_step == received:
                self.ledger.refuse(lane.number, error)
            elif self.ledger.safe(lane.number) <= fault.expected_step < received:
                message = f"what had been applied cannot be applied again: {error.message}"
                self._end(lane, self._place(errors.DataLoss(message, reason=error.reason), lane))
            else:
                message = f"a fault names step {fault.expected_step}, not step {received}"
                self._end(lane, self._place(ProtocolViolation(message), lane))
        else:
            self._end(lane, error)

    def _take_refusal(self, lane: Lane, fault: Fault, error: SluiceError) -> None:
        if fault.reason == Fault.UNKNOWN_LANE:
            return  # a chunk that met the end of what had this lane before
        if fault.reason == Fault.DRAINING:
            self._is_draining = True  # another stream, perhaps to another server, will do
            self.refusal = fault.message
            self._reopen(lane)
        elif fault.reason == Fault.CONFLICT and fault.epoch != lane.expected_epoch:
            lane.expected_epoch = fault.epoch
            self._reopen(lane)
        elif lane.ended_by is not None and not lane.is_parking and fault.reason in _GONE:
            self._end(lane, None)
        elif lane.was_opened:
            error.message = f"it cannot be resumed after {error.step} steps: {error.message}"
            self._end(lane, error)
        else:
            self._end(lane, error)

    def _take_closed(self, closed: Closed) -> None:
        lane = self._lanes.get(closed.lane)
        if lane is None:
            return
        lane.is_occupied = False
        if closed.reason == Closed.DRAINING:
            self._is_draining = True
        if lane.status is Status.ENDED:
            self._free(lane)
        elif lane.status is Status.ENDING:
            is_parked = lane.is_parking and closed.reason not in (Closed.IDLE, Closed.EVICTED)
            if closed.reason == Closed.DRAINING and not lane.is_parking:
                self._reopen(lane)
            elif is_parked or not lane.is_parking:
                self._end(lane, None)
            else:
                self._end(lane, self._closed_error(lane, closed))
        elif lane.status is Status.ATTACHED:
            if closed.reason in (Closed.FENCED, Closed.DRAINING, Closed.PARKED):
                self._reopen(lane)  # only a refused RESUME is final
            else:
                self._end(lane, self._closed_error(lane, closed))

    def _closed_error(self, lane: Lane, closed: Closed) -> SluiceError:
        return errors.from_closed(
            closed.reason,
            sequence_id=lane.opening.sequence_id,
            step=self.ledger.received(lane.number),
        )

    def _postpone(self, lane: Lane, fault: Fault) -> None:
        """The store does not answer: the lane is not open, and nothing was changed."""
        self._suspend(lane)
        self._postponed.append(lane)
        lane.is_postponed = True
        self.refusal = fault.message

    # -- a lane's way -------------------------------------------------------------------

    def _reopen(self, lane: Lane) -> None:
        self._suspend(lane)
        self._opens.append(lane)

    def _suspend(self, lane: Lane) -> None:
        self.ledger.detach(lane.number)
        if lane.status is Status.ENDING:
            self._ends.append(lane)
        lane.status = Status.WAITING

    def _end(self, lane: Lane, error: SluiceError | None) -> None:
        """End a lane: with an error, or because its handle has wished so."""
        if lane.status is Status.ENDED:
            return
        lane.status, lane.is_postponed = Status.ENDED, False
        sequence_id, step = lane.opening.sequence_id, self.ledger.received(lane.number)
        reason = error or errors.SequenceClosed("its handle was closed")
        lane.error = reason.at(sequence_id, step)
        self.ledger.end(lane.number, lane.error)
        if not lane.was_opened:
            lane.was_opened = True
            lane.asked_by.settle(lane.asked_position, reason.at(sequence_id, None))
        if lane.ended_by is not None:
            lane.ended_by.settle(lane.ended_position, error and error.at(sequence_id, step))
        if lane.is_occupied:
            self._abandoned.append(lane.number)
        if self._resting:
            self._settle_resting()
        self._free(lane)

    def _free(self, lane: Lane) -> None:
        """Let the lane's number be used again once neither side uses it."""
        if lane.status is Status.ENDED and lane.is_released and not lane.is_occupied:
            del self._lanes[lane.number]
            self.ledger.give(lane.number)

    def _place(self, error: SluiceError, lane: Lane) -> SluiceError:
        return error.at(lane.opening.sequence_id, self.ledger.received(lane.number))
