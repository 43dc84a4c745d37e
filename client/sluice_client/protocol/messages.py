"""What a message to the server contains, and how much fits into it."""

from typing import Final

from sluice_client.protocol.frames import Frame
from sluice_client.protocol.lane import Lane
from sluice_client.protocol.tickets import WIRE_DURABILITY
from sluice_protos.sequences_pb2 import RESUME, InferRequest, Limits, OpenSequence, SequenceState

UNLIMITED: Final = 2**31 - 1
# The limit of a server that has not sent its limits yet: gRPC's default.
_REQUEST_BYTES_DEFAULT: Final = 2**22
# The size of the largest lane number on the wire.
LANE_BYTES: Final = 5
# The size of a chunk without its rows: lane, steps and first_step at their largest.
_CHUNK_BYTES: Final = LANE_BYTES + 5 + 10
# The size of a message with one open, without the open and the model's name.
_OPEN_BYTES: Final = 64
# The size of a message without its chunks and opens, at most.
_MESSAGE_BYTES: Final = 4096


def open_message(lane: Lane, received: int) -> OpenSequence:
    """The open of a lane: in its handle's mode at first, RESUME once it has been opened.

    `received` is the number of outputs that a RESUME acknowledges.
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
    """The size of the largest message that the server takes."""
    return limits.request_bytes_max or _REQUEST_BYTES_DEFAULT


def lanes_that_fit(limits: Limits, bytes_used: int) -> int:
    """The number of lanes that one message may close or park: up to a quarter of its size."""
    size = request_bytes_max(limits)
    return max(0, min(size // 4, size * 3 // 4 - bytes_used)) // LANE_BYTES


def rows_that_fit(
    limits: Limits, step_bytes: int, bytes_used: int, in_flight: int, *, is_alone: bool
) -> int:
    """The number of steps that may be sent now in one message, by its size and by credit.

    At least one if the message has only steps: no message has more room.
    """
    room = request_bytes_max(limits) - _MESSAGE_BYTES - bytes_used
    credit = limits.credit_steps or UNLIMITED
    if limits.credit_bytes:
        credit = min(credit, max(1, limits.credit_bytes // max(1, step_bytes)))
    return min(max(int(is_alone), room // (step_bytes + _CHUNK_BYTES)), credit - in_flight)


def one_open_fits(limits: Limits, message: OpenSequence) -> bool:
    """Some message can hold this open; assumed while the server's limit is unknown."""
    size_max = limits.request_bytes_max
    return not size_max or message.ByteSize() + _OPEN_BYTES <= size_max


def one_step_fits(limits: Limits, step_bytes: int) -> bool:
    """Some message can hold a step."""
    return step_bytes + _CHUNK_BYTES + _MESSAGE_BYTES <= request_bytes_max(limits)


def put_frame(request: InferRequest, frame: Frame) -> None:
    """Write chunks into a message; `steps` is left out if each has one."""
    request.lane.extend(frame.lanes.tolist())
    request.first_step.extend(frame.first_steps.tolist())
    if len(frame.inputs[0]) != len(frame.lanes):
        request.steps.extend(frame.counts.tolist())
    for array in frame.inputs:
        request.inputs.add(data=array.tobytes())
