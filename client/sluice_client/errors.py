"""The exceptions that a caller of the client can get.

SluiceError
├── StepFailed              this step was not applied; the sequence can continue
│   ├── InvalidInput        a wrong name, dtype, shape, size or value
│   ├── RunFailed           the model's run failed
│   │   └── NonFinite       the run gave NaN or infinity
│   └── StepDiscarded       an earlier step of the same sequence failed
├── StepPending             this step may have been applied; `settle()` returns its output
│   ├── StepTimedOut        no output within the timeout
│   └── StepUnsettled       an earlier step was cancelled or timed out; settle() first
├── SequenceError           the sequence is not available; final for its handle
│   ├── SequenceNotFound    the server does not have this sequence
│   ├── SequenceExists      START of an id that is in use
│   ├── SequenceClosed      it has ended, or its handle has been closed
│   │   └── SequenceExpired it was idle for too long
│   ├── Fenced              another client took it over
│   ├── WrongModel          a state made by another model
│   ├── ReplayNeeded        the server needs inputs again that another handle had
│   └── DataLoss            the server or its store lost what it had confirmed
├── ModelNotFound           the server serves no model of that name
├── LimitReached            a limit of the server was reached; the message names it
├── AccessDenied            the server requires (other) credentials
├── Unavailable             no server answers
├── ClientClosed            the client was closed
├── ServerFailed            any other status
└── ProtocolViolation       the server broke the protocol
"""

from typing import Any, Self

from sluice_protos.sequences_pb2 import Closed, Fault


class SluiceError(Exception):
    """The root of all errors; the message names the fix.

    `sequence_id` and `step` say where it happened (None: unknown). `reason` is the
    server's code: the name of a Fault.Reason, a Closed.Reason or a gRPC status.
    """

    def __init__(
        self,
        message: str,
        *,
        sequence_id: str | None = None,
        step: int | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.sequence_id = sequence_id
        self.step = step
        self.reason = reason

    def __str__(self) -> str:
        place = [] if self.sequence_id is None else [f"sequence {self.sequence_id!r}"]
        place += [] if self.step is None else [f"step {self.step}"]
        return f"{', '.join(place)}: {self.message}" if place else self.message

    def at(self, sequence_id: str | None, step: int | None) -> Self:
        """A copy of this error for another place, so that no exception is raised twice."""
        return type(self)(self.message, sequence_id=sequence_id, step=step, reason=self.reason)


class StepFailed(SluiceError):
    """A step was not applied: the sequence's state is as before it.

    `outputs` has the outputs of the earlier steps of the chunk, which were applied.
    """

    outputs: Any = None


class InvalidInput(StepFailed, ValueError):
    """An input has a wrong name, dtype, shape, size or value."""


class RunFailed(StepFailed):
    """The model's run failed."""


class NonFinite(RunFailed):
    """The model's run gave NaN or infinity."""


class StepDiscarded(StepFailed):
    """An earlier step of the same sequence failed, so this one was not applied."""


class StepPending(SluiceError):
    """A step may have been applied; `settle()` waits for its output and returns it."""


class StepTimedOut(StepPending, TimeoutError):
    """A step's output did not arrive within the timeout."""


class StepUnsettled(StepPending):
    """An earlier step was cancelled or timed out; call `settle()` before the next step."""


class SequenceError(SluiceError):
    """The sequence is not available, or no longer. Final for its handle."""


class SequenceNotFound(SequenceError, LookupError):
    """The server has no such sequence."""


class SequenceExists(SequenceError):
    """START of an id that is in use."""


class SequenceClosed(SequenceError):
    """The sequence has ended."""


class SequenceExpired(SequenceClosed):
    """The server dropped the sequence because it was idle for too long."""


class Fenced(SequenceError):
    """Another client took the sequence over."""


class WrongModel(SequenceError):
    """The state was made by another model."""


class ReplayNeeded(SequenceError):
    """The server needs inputs again, from `step` on, that another handle had sent.

    Raised only for a sequence that was resumed from a ticket: call `client.resume`
    again and pass the inputs to `replay`.
    """


class DataLoss(SequenceError):
    """The server or its store lost steps or outputs that it had confirmed.

    `step` is the number of steps whose outputs have arrived.
    """


class ModelNotFound(SluiceError, LookupError):
    """The server serves no model of that name."""


class LimitReached(SluiceError):
    """A limit of the server was reached."""


class AccessDenied(SluiceError):
    """The server requires credentials, or other ones."""


class Unavailable(SluiceError, ConnectionError):
    """No server answers."""


class ClientClosed(SluiceError):
    """The client was closed before or during the call."""


class ServerFailed(SluiceError):
    """The server failed with a code that has no class of its own."""


class ProtocolViolation(SluiceError):
    """The server sent something that the protocol does not allow."""


_OF_FAULT: dict["Fault.Reason.ValueType", type[SluiceError]] = {
    Fault.INVALID_INPUT: InvalidInput,
    Fault.RUN_FAILED: RunFailed,
    Fault.NON_FINITE: NonFinite,
    Fault.ALREADY_EXISTS: SequenceExists,
    Fault.NOT_FOUND: SequenceNotFound,
    Fault.SEQUENCE_CLOSED: SequenceClosed,
    Fault.FENCED: Fenced,
    Fault.LIMIT: LimitReached,
    Fault.OUT_OF_RANGE: DataLoss,
    Fault.WRONG_MODEL: WrongModel,
    Fault.UNKNOWN_LANE: ProtocolViolation,
    Fault.GAP: ProtocolViolation,
    # Only another handle with the same ticket can have a higher attempt of this writer.
    Fault.STALE: Fenced,
    Fault.CONFLICT: ProtocolViolation,
    Fault.LANE_IN_USE: ProtocolViolation,
    Fault.UNAVAILABLE: Unavailable,
    Fault.DATA_LOSS: DataLoss,
}

_OF_CLOSED: dict["Closed.Reason.ValueType", tuple[type[SluiceError], str]] = {
    Closed.CLIENT: (SequenceClosed, "a client closed it"),
    Closed.IDLE: (SequenceExpired, "it was idle for longer than the server allows"),
    Closed.FENCED: (Fenced, "another client took it over"),
}

_OF_STATUS: dict[str, type[SluiceError]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "NOT_FOUND": ModelNotFound,
    "ALREADY_EXISTS": SequenceExists,
    "RESOURCE_EXHAUSTED": LimitReached,
    "PERMISSION_DENIED": AccessDenied,
    "UNAUTHENTICATED": AccessDenied,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": Unavailable,
    "CANCELLED": Unavailable,
    "DATA_LOSS": DataLoss,
}


def from_fault(fault: Fault, *, sequence_id: str, step: int) -> SluiceError:
    """The exception for a fault."""
    reason = Fault.Reason.Name(fault.reason)
    kind = _OF_FAULT.get(fault.reason, ServerFailed)
    message = fault.message or reason
    return kind(message, sequence_id=sequence_id, step=step, reason=reason)


def from_closed(reason: "Closed.Reason.ValueType", *, sequence_id: str, step: int) -> SluiceError:
    """The exception for the end of a sequence that its handle did not ask for."""
    kind, why = _OF_CLOSED.get(reason, (SequenceClosed, "it has ended"))
    message = f"{why}; it had {step} steps, and later ones were not applied"
    return kind(message, sequence_id=sequence_id, step=step, reason=Closed.Reason.Name(reason))


def from_status(
    code: str,
    details: str,
    *,
    sequence_id: str | None = None,
    not_found: type[SluiceError] = ModelNotFound,
) -> SluiceError:
    """The exception for a gRPC status; `not_found` is the class for NOT_FOUND."""
    kind = not_found if code == "NOT_FOUND" else _OF_STATUS.get(code, ServerFailed)
    return kind(details or code, sequence_id=sequence_id, reason=code)
