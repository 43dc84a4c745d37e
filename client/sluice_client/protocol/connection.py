"""The client's side of the stream: which message to send next, and what to do with a response.

No I/O, no threads, no clock. The transport calls `begin` when it has a stream, sends
the messages of `next_request`, passes responses to `receive`, and calls `lose` when
the stream has ended. docs/protocol.md has the rules: every step is applied once and
every output arrives once, however often the stream is lost.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from sluice_client import errors
from sluice_client.errors import ProtocolViolation, SluiceError
from sluice_client.protocol import notices, resume
from sluice_client.protocol.calls import Call, LaneRequest
from sluice_client.protocol.lane import Lane, Status
from sluice_client.protocol.lifecycle import Lanes
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
from sluice_client.protocol.openings import Opening
from sluice_client.protocol.replay_buffer import Bounds
from sluice_client.protocol.signature import Array, Signature
from sluice_client.protocol.steps import Steps
from sluice_client.protocol.tables import Numbers
from sluice_protos.sequences_pb2 import Durable, InferRequest, InferResponse, Limits

# The server has a sequence on the lane of the present stream, or soon may.
_ON_STREAM: Final = {Status.ASKED, Status.ATTACHED, Status.ENDING}


class Connection:
    """All sequences of one model that one client has, over one stream after another."""

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
        self.steps = Steps(bounds)
        self.lanes = Lanes(self.steps)
        self.limits = Limits()
        self._queue = self.steps.queue
        self._acknowledgements = self.steps.acknowledgements
        self._response_bytes_max = response_bytes_max
        self._is_streaming = False
        self._is_first = True
        self._is_acknowledgement_due = False
        # Responses of the present stream.
        self._responses = 0
        # Why nothing can be asked any more.
        self._failure: SluiceError | None = None

    # -- what callers ask ---------------------------------------------------------

    def received(self, lanes: Numbers) -> Numbers:
        """The outputs of each of `lanes` that have arrived: [lanes]."""
        received: Numbers = self.steps.lanes["received"][lanes]
        return received

    def durable(self, lanes: Numbers) -> Numbers:
        """The steps of each of `lanes` that survive the death of the server: [lanes]."""
        return np.array([self._durable(number) for number in lanes.tolist()], np.int64)

    def _durable(self, number: int) -> int:
        is_durable = self.lanes[number].durability not in ("off", None)
        return self.steps.replay_buffer.replay_floor(number) if is_durable else 0

    def acknowledged(self, number: int) -> int:
        """The outputs of a lane that its next open acknowledges."""
        return resume.acknowledged(self.lanes[number], self.steps)

    def open(self, openings: Sequence[Opening]) -> LaneRequest:
        """Ask for sequences; `lanes` of the request has their lanes, usable when it is done."""
        request = LaneRequest(self.steps.allocate(len(openings)))
        for position, opening in enumerate(openings):
            lane = self.lanes.add(opening, request, position)
            if self._failure is not None:
                self.lanes.end(lane, self._failure)
            else:
                self.lanes.to_open.append(lane)
        return request

    def submit(self, lanes: Numbers, counts: Numbers, inputs: list[Array]) -> Call:
        """The next steps of each of `lanes`: [chunks], [chunks], [sum(counts), …] each.

        Raises LimitReached when the server can never take one.
        """
        if not one_step_fits(self.limits, self.signature.step_bytes):
            raise self._too_large("one step", self.signature.step_bytes)
        held_max = self.limits.unacknowledged_steps_max or UNLIMITED
        if self._acknowledgements.longest_awaiting(lanes, counts) > held_max:
            raise errors.LimitReached(
                f"the server holds at most {held_max} outputs of a sequence, and the outputs of a "
                "longer chunk could not be confirmed before it is done; send smaller chunks"
            )
        call = Call(lanes, counts, inputs, self.signature.allocate(len(inputs[0])))
        self._queue.submit(call)
        if not self._is_streaming:
            self._queue.number_steps()
        return call

    def first_step(self, call: Call) -> int:
        """The number of the first step of a call, for its first lane."""
        self._queue.number_steps()
        return call.first_step

    def confirm(self, number: int, step: int) -> None:
        """The caller has stored the outputs before `step` of a lane that awaits confirm."""
        self._acknowledgements.confirm(number, step)
        steps_max = self.limits.unacknowledged_steps_max or UNLIMITED
        self._is_acknowledgement_due |= self._acknowledgements.is_due(np.array([number]), steps_max)

    def replay(self, number: int, inputs: list[Array]) -> None:
        """Send a lane the inputs that it lacks, [steps, …] each; their outputs are dropped.

        Raises InvalidInput when they are not as many as are needed.
        """
        lane, rows = self.lanes[number], len(inputs[0])
        first = self.steps.received(number) - rows
        if lane.replays_from is None or first != lane.replays_from:
            needed = "no" if lane.replays_from is None else first + rows - lane.replays_from
            raise errors.InvalidInput(f"{needed} steps must be replayed, not {rows}")
        lane.replays_from = None
        self.steps.restore_inputs(number, Call(np.array([number]), np.array([rows]), inputs, []))

    def close(self, lanes: Numbers) -> LaneRequest:
        """Drop the sequences once all their outputs have arrived, and free the lanes."""
        return self.lanes.request_end(lanes, is_parking=False)

    def park(self, lanes: Numbers) -> LaneRequest:
        """Free the lanes once all their outputs have arrived; the sequences stay alive."""
        return self.lanes.request_end(lanes, is_parking=True)

    # -- what the transport asks ----------------------------------------------------

    @property
    def wants_stream(self) -> bool:
        """Some sequence must be opened, or is open."""
        return any(lane.status is not Status.ENDED for lane in self.lanes.values())

    @property
    def is_spent(self) -> bool:
        """The server has let go of all lanes and opens none: another stream is needed."""
        lanes = self.lanes
        if not lanes.is_draining and (lanes.to_open or not lanes.postponed):
            return False
        return not any(lane.status in _ON_STREAM for lane in lanes.values())

    @property
    def has_something_to_send(self) -> bool:
        """`next_request` may return a message."""
        lanes = self.lanes
        return self._is_acknowledgement_due or bool(
            lanes.to_open or lanes.to_end or lanes.abandoned or self._queue.may_have_frame
        )

    def begin(self, signature: Signature) -> None:
        """A new stream was started, to a server whose model has this signature."""
        if not signature.is_like(self.signature):
            error = errors.WrongModel("the server now has another model of this name")
            for lane in list(self.lanes.values()):
                if lane.was_opened:
                    self.lanes.end(lane, error)
        # It may be a new version of the model: the old one may still serve its sequences.
        self.signature = signature
        self.lanes.begin()
        self._is_streaming, self._is_first = True, True
        self._is_acknowledgement_due = False
        self._responses = 0

    def lose(self) -> None:
        """The stream has ended: everything continues on the next one."""
        self._is_streaming = False
        # Every RESUME acknowledges what has arrived.
        self._acknowledgements.clear()
        self.lanes.lose()

    def fail(self, error: SluiceError) -> None:
        """There is no stream: end every sequence with `error`."""
        self.lose()
        for lane in list(self.lanes.values()):
            self.lanes.end(lane, error)

    def shut_down(self, error: SluiceError) -> None:
        """As `fail`, and for every later open as well."""
        self._failure = error
        self.fail(error)

    # -- what is sent -----------------------------------------------------------------

    def next_request(self) -> InferRequest | None:
        """The next message, as full as credit and limits allow; None if there is nothing to say."""
        if not self._is_streaming:
            return None
        request = InferRequest()
        bytes_used = self._put_opens(request)
        bytes_used += self._put_ends(request, bytes_used)
        self._put_chunks(request, bytes_used + self._acknowledgements.bytes_max)
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
        """Add the opens that fit into half of the message; the bytes that they take."""
        lanes = self.lanes
        size, size_max = 0, request_bytes_max(self.limits) // 2
        while lanes.to_open and not lanes.is_draining:
            lane = lanes.to_open.popleft()
            if lane.status is not Status.WAITING:
                continue
            lane.attempt += 1
            message = open_message(lane, resume.acknowledged(lane, self.steps))
            if not one_open_fits(self.limits, message):
                lanes.end(lane, self._too_large("its open", message.ByteSize()))
                continue
            size += message.ByteSize() + 8
            if size > size_max and request.open:
                lanes.to_open.appendleft(lane)
                break
            request.open.append(message)
            lane.status = Status.ASKED
        return size

    def _too_large(self, what: str, size: int) -> errors.LimitReached:
        return errors.LimitReached(
            f"{what} has {size} bytes, more than the server takes in a message "
            f"({self.limits.request_bytes_max}); serve with a higher --request-bytes-max"
        )

    def _put_ends(self, request: InferRequest, bytes_used: int) -> int:
        """Add closes and parks of idle lanes; the bytes that they take."""
        lanes = self.lanes
        if not lanes.to_end and not lanes.abandoned:
            return 0
        room = lanes_that_fit(self.limits, bytes_used)
        request.park.extend(lanes.abandoned[:room])
        del lanes.abandoned[:room]
        count = len(request.park)
        later: list[Lane] = []
        for lane in lanes.to_end:
            is_due = lane.status is Status.ATTACHED and self.steps.is_idle(lane.number)
            if is_due and count < room:
                (request.park if lane.is_parking else request.close).append(lane.number)
                self.steps.detach(lane.number)
                lane.status = Status.ENDING
                count += 1
            elif lane.status is not Status.ENDED:
                later.append(lane)
        lanes.to_end = later
        return count * LANE_BYTES

    def _put_chunks(self, request: InferRequest, bytes_used: int) -> None:
        limits, steps, step_bytes = self.limits, self.steps, self.signature.step_bytes
        is_alone = not (request.open or request.close or request.park)
        rows_max = rows_that_fit(limits, step_bytes, bytes_used, steps.in_flight, is_alone=is_alone)
        frame = steps.next_frame(rows_max, limits.chunk_steps_max or UNLIMITED, step_bytes)
        if frame is not None:
            put_frame(request, frame)

    def _put_acknowledgements(self, request: InferRequest) -> None:
        acknowledgements = self._acknowledgements
        if acknowledgements.count and acknowledgements.is_by_response:
            request.received_responses = self._responses
        elif acknowledgements.count:
            lanes, steps = acknowledgements.entries()
            for number, step in zip(lanes.tolist(), steps.tolist(), strict=True):
                request.received.add(lane=number, step=step)
        acknowledgements.clear()
        self._is_acknowledgement_due = False

    # -- what arrives -----------------------------------------------------------------

    def receive(self, response: InferResponse) -> None:
        """Process one response of the present stream. Raises ProtocolViolation."""
        self._responses += 1
        if response.HasField("limits"):
            self.limits = response.limits
        for opened in response.opened:
            notices.handle_opened(opened, self.lanes, self.signature)
        if response.lane:
            self._receive_outputs(response)
        if response.durable:
            self._receive_durable(response.durable)
        for fault in response.faults:
            notices.handle_fault(fault, self.lanes)
        for closed in response.closed:
            notices.handle_closed(closed, self.lanes)
        if self.lanes.waiting_for_idle:
            self.lanes.resolve_idle()

    def _receive_outputs(self, response: InferResponse) -> None:
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
        wrong = self.steps.deliver(lanes, first, counts, outputs)
        if wrong.size:
            self._end_violated(
                wrong, "an output leaves a gap, or answers a step that was never sent"
            )
        steps_max = self.limits.unacknowledged_steps_max or UNLIMITED
        credit = self.limits.credit_steps or UNLIMITED
        self._is_acknowledgement_due |= (
            self._acknowledgements.count >= credit
            or self._acknowledgements.is_due(lanes, steps_max)
        )

    def _receive_durable(self, durable: Sequence[Durable]) -> None:
        lanes = np.array([entry.lane for entry in durable], np.int64)
        steps = np.array([entry.step for entry in durable], np.int64)
        wrong = self.steps.mark_durable(lanes, steps)
        if wrong.size:
            self._end_violated(wrong, "the server calls steps durable that were never sent")

    def _end_violated(self, lanes: Numbers, message: str) -> None:
        for number in lanes.tolist():
            self.lanes.end(self.lanes[number], ProtocolViolation(message))
