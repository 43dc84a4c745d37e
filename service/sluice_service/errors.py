"""Defines every error that clients get, each with its gRPC status.

    ServiceError
    ├── ModelNotFoundError        NOT_FOUND            ends the call
    ├── RequestError              INVALID_ARGUMENT     ends the call
    ├── StoppingError             UNAVAILABLE          ends the call
    ├── BacklogError              UNAVAILABLE          ends the call
    ├── RepositoryError           FAILED_PRECONDITION  ends the call
    └── LaneError                                      a Fault of one lane; the others go on
        ├── InvalidInputError     INVALID_ARGUMENT
        ├── UnknownLaneError      NOT_FOUND
        ├── LaneInUseError        ALREADY_EXISTS
        ├── GapError              FAILED_PRECONDITION
        ├── RunFailedError        INTERNAL
        ├── NonFiniteError        INVALID_ARGUMENT
        ├── ExistsError           ALREADY_EXISTS
        ├── NotFoundError         NOT_FOUND
        ├── SequenceClosedError   FAILED_PRECONDITION
        ├── FencedError           FAILED_PRECONDITION
        ├── StaleError            ABORTED
        ├── ConflictError         ABORTED
        ├── OutOfRangeError       OUT_OF_RANGE
        ├── WrongModelError       FAILED_PRECONDITION
        ├── LimitError            RESOURCE_EXHAUSTED
        ├── DrainingError         UNAVAILABLE
        ├── StoreDownError        UNAVAILABLE
        └── DataLossError         DATA_LOSS

Any other exception becomes INTERNAL with a fixed text. Its traceback is only in the
log.
"""

from typing import ClassVar

from grpc import StatusCode

_MESSAGE_CHARACTERS_MAX = 1000


class ServiceError(Exception):
    """An error for the client; the message names the fix."""

    status: ClassVar[StatusCode] = StatusCode.INTERNAL

    def __init__(self, message: str) -> None:
        # A message may quote megabytes that a client sent.
        is_long = len(message) > _MESSAGE_CHARACTERS_MAX
        super().__init__(message[:_MESSAGE_CHARACTERS_MAX] + " …" if is_long else message)


class ModelNotFoundError(ServiceError):
    """No model of that name is served here."""

    status = StatusCode.NOT_FOUND


class RequestError(ServiceError):
    """A message that is not what the call expects."""

    status = StatusCode.INVALID_ARGUMENT


class StoppingError(ServiceError):
    """The server stops; another may take the call."""

    status = StatusCode.UNAVAILABLE


class BacklogError(ServiceError):
    """No place became free for a sequence while it waited; another server may have one."""

    status = StatusCode.UNAVAILABLE


class RepositoryError(ServiceError):
    """A model that cannot be loaded or unloaded."""

    status = StatusCode.FAILED_PRECONDITION


class LaneError(ServiceError):
    """A fault of one lane. CONFLICT has the `epoch`, a loss has the last durable step."""

    # The name that clients and metrics know the error by: of sluice.v1.Fault.Reason.
    reason: ClassVar[str] = "UNSPECIFIED"

    def __init__(self, message: str, *, epoch: int = 0, expected_step: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.expected_step = expected_step


class InvalidInputError(LaneError):
    """Wrong datatype, shape, name, size or value."""

    status = StatusCode.INVALID_ARGUMENT
    reason = "INVALID_INPUT"


class UnknownLaneError(LaneError):
    """No open has named this lane on this stream."""

    status = StatusCode.NOT_FOUND
    reason = "UNKNOWN_LANE"


class LaneInUseError(LaneError):
    """An open named a lane that has a sequence."""

    status = StatusCode.ALREADY_EXISTS
    reason = "LANE_IN_USE"


class GapError(LaneError):
    """A chunk follows more steps than were applied."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "GAP"


class RunFailedError(LaneError):
    """The model's run failed on this chunk."""

    status = StatusCode.INTERNAL
    reason = "RUN_FAILED"


class NonFiniteError(LaneError):
    """The run gave a state with NaN or infinity."""

    status = StatusCode.INVALID_ARGUMENT
    reason = "NON_FINITE"


class ExistsError(LaneError):
    """START of an id that is alive under another writer."""

    status = StatusCode.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class NotFoundError(LaneError):
    """No such sequence."""

    status = StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class SequenceClosedError(LaneError):
    """This writer's sequence has ended."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "SEQUENCE_CLOSED"


class FencedError(LaneError):
    """Another writer has taken the sequence over."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "FENCED"


class StaleError(LaneError):
    """A later attempt of this writer has already arrived."""

    status = StatusCode.ABORTED
    reason = "STALE"


class ConflictError(LaneError):
    """Open again with the epoch of this error."""

    status = StatusCode.ABORTED
    reason = "CONFLICT"


class OutOfRangeError(LaneError):
    """The outputs that the client asks for are no longer held."""

    status = StatusCode.OUT_OF_RANGE
    reason = "OUT_OF_RANGE"


class WrongModelError(LaneError):
    """A state made by another model."""

    status = StatusCode.FAILED_PRECONDITION
    reason = "WRONG_MODEL"


class LimitError(LaneError):
    """A limit of the server is reached."""

    status = StatusCode.RESOURCE_EXHAUSTED
    reason = "LIMIT"


class DrainingError(LaneError):
    """The server stops and opens nothing new."""

    status = StatusCode.UNAVAILABLE
    reason = "DRAINING"


class StoreDownError(LaneError):
    """The store does not answer; nothing was changed."""

    status = StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class DataLossError(LaneError):
    """What the store has of a sequence cannot be used."""

    status = StatusCode.DATA_LOSS
    reason = "DATA_LOSS"
