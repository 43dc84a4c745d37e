"""What goes into a message to the server, and how much of it fits."""

from typing import Final

from sluice_client.protocol.frames import Frame
from sluice_client.protocol.lane import Lane
from sluice_client.protocol.tickets import WIRE_DURABILITY
from sluice_protos.sequences_pb2 import RESUME, InferRequest, Limits, OpenSequence, SequenceState

UNLIMITED: Final = 2**31 - 1
# What a server takes that has said nothing: gRPC's default.
_REQUEST_BYTES_DEFAULT: Final = 2**22
# What the number of a lane costs on the wire at its largest.
LANE_BYTES: Final = 5
# What a chunk costs on the wire beside its rows: lane, steps and first_step at their largest.
_CHUNK_BYTES: Final = LANE_BYTES + 5 + 10
# What a message with one open costs beside it, but for the name of the model.
_OPEN_BYTES: Final = 64
# What a message costs beside its chunks and opens.
_MESSAGE_BYTES: Final = 4096


def open_message(lane: Lane, received: int) -> OpenSequence:
    """The open of a lane: as its handle asked at first, RESUME once it has been opened.

    `received` is what a RESUME says has arrived.
    """
    opening = lane.opening
    message = OpenSequence(
        lane=lane.number,
        sequence_id=opening.sequence_id,
        writer=opening.writer,
        attempt=lane.attempt,
        expected_epoch=lane.expected_epoch,
        durability=WIRE_DURABILITY[opening.durability],
    )
    if lane.was_opened or opening.ticket is not None:
        message.mode = RESUME
        message.received = received
        return message
    message.mode = opening.mode.value
    if opening.state is not None:
        state = SequenceState(
            model_digest=opening.state.model_digest,
            step=opening.state.step,
            row=opening.state.row.astype("<f4").tobytes(),
        )
        message.state.CopyFrom(state)
    return message


def request_bytes_max(limits: Limits) -> int:
    """The largest message the server takes."""
    return limits.request_bytes_max or _REQUEST_BYTES_DEFAULT


def lanes_that_fit(limits: Limits, bytes_used: int) -> int:
    """The lanes that may be let go of in one message: a quarter is theirs, where it is free."""
    size = request_bytes_max(limits)
    return max(0, min(size // 4, size * 3 // 4 - bytes_used)) // LANE_BYTES


def rows_that_fit(
    limits: Limits, step_bytes: int, bytes_used: int, in_flight: int, *, is_alone: bool
) -> int:
    """The steps that may be sent now in one message: by its size, and by credit.

    One at least where they are alone in it: no message has more room.
    """
    room = request_bytes_max(limits) - _MESSAGE_BYTES - bytes_used
    credit = limits.credit_steps or UNLIMITED
    if limits.credit_bytes:
        credit = min(credit, max(1, limits.credit_bytes // max(1, step_bytes)))
    return min(max(int(is_alone), room // (step_bytes + _CHUNK_BYTES)), credit - in_flight)


def one_open_fits(limits: Limits, message: OpenSequence) -> bool:
    """False when no message could ever hold this open; True while the limit is not known."""
    size_max = limits.request_bytes_max
    return not size_max or message.ByteSize() + _OPEN_BYTES <= size_max


def one_step_fits(limits: Limits, step_bytes: int) -> bool:
    """False when no message could ever hold a step."""
    return step_bytes + _CHUNK_BYTES + _MESSAGE_BYTES <= request_bytes_max(limits)


def put_frame(request: InferRequest, frame: Frame) -> None:
    """Write chunks into a message; `steps` is left out where each has one."""
    request.lane.extend(frame.lanes.tolist())
    request.first_step.extend(frame.first_steps.tolist())
    if len(frame.inputs[0]) != len(frame.lanes):
        request.steps.extend(frame.counts.tolist())
    for array in frame.inputs:
        request.inputs.add(data=array.tobytes())
