"""Says why a request of the Open Inference Protocol is refused, and how to go on.

Each function returns an error; its first line says when it is the right one.
"""

from sluice_service.errors import (
    BacklogError,
    FencedError,
    GapError,
    LaneError,
    LimitError,
    ModelNotFoundError,
    NotFoundError,
    OutOfRangeError,
    RequestError,
    SequenceClosedError,
    ServiceError,
    StoppingError,
)
from sluice_service.rpc.open_inference.requests import InferRequest, RequestLane
from sluice_service.sequences.events import EndReason

_NO_SEQUENCE = "a request without a sequence"


def stopping() -> ServiceError:
    """The server drains."""
    return StoppingError("this server is stopping; ask another")


def unloading(model: str) -> ServiceError:
    """The model takes no new sequences."""
    return StoppingError(f"model {model!r} is being unloaded")


def too_much_waits(steps: int) -> ServiceError:
    """More waits to be run than one client of the native stream may have waiting."""
    return LimitError(
        f"{steps} steps wait to be run, as many as stream_queue_steps_max allows; wait for "
        "answers before sending more"
    )


def wrong_version(request: InferRequest, model: str, newest: str) -> ServiceError | None:
    """The request begins at the initial state, and names a version where none begins; or None."""
    if request.version in ("", newest):
        return None
    return ModelNotFoundError(
        f"version {request.version} of model {model!r} takes no new sequences; leave it out, or "
        f"ask for {newest}"
    )


def wrong_turn(lane: RequestLane, request: InferRequest) -> ServiceError | None:
    """By its version or its steps, the request is not the next of its open lane; or None."""
    if request.version not in ("", lane.version):
        return ModelNotFoundError(
            f"sequence {request.quoted_id} runs on version {lane.version} until it ends, not on "
            f"{request.version}; leave the version out"
        )
    first = request.first_step
    if first is None or first == lane.step or request.is_start:
        return None
    if first > lane.step:
        return GapError(
            f"sequence {request.quoted_id} has {lane.step} steps applied, not {first}; send again "
            f"from sequence_step {lane.step}"
        )
    return _too_old(request, lane.step)


def not_opened(request: InferRequest, model: str, error: LaneError) -> ServiceError:
    """The host has refused to open the request's sequence with `error`."""
    if isinstance(error, OutOfRangeError):
        return _too_old(request, error.expected_step)
    if isinstance(error, NotFoundError | SequenceClosedError):
        return _not_started(request, model, error)
    return error


def _too_old(request: InferRequest, step: int) -> ServiceError:
    return OutOfRangeError(
        f"sequence {request.quoted_id} has {step} steps applied; only its last request, as it "
        f"was, can be repeated: go on with sequence_step {step}"
    )


def _not_started(request: InferRequest, model: str, error: LaneError) -> ServiceError:
    is_unknown = isinstance(error, NotFoundError)
    if is_unknown and error.expected_step:
        return NotFoundError(
            f"sequence {request.quoted_id} of model {model!r} was lost with its server; its last "
            f"durable step is {error.expected_step}: send again what follows, with sequence_step "
            "beginning there, or start it again with the START flag"
        )
    # Clients of the field know this error by these words.
    text = (
        f"inference request for sequence {request.quoted_id} to model {model!r} must specify the "
        "START flag on the first request of the sequence"
    )
    if is_unknown:
        return RequestError(f"{text}: send sequence_start with it")
    return NotFoundError(f"{text}; {error}")


def not_run(lane: RequestLane, error: LaneError) -> ServiceError:
    """The host has run the lane's current request in part or not at all, because of `error`."""
    done = lane.request.steps - lane.missing
    if not done or not lane.sequence_id:
        return error
    return type(error)(f"{error}; the request's first {done} steps were applied")


def ended(request: InferRequest, reason: EndReason) -> ServiceError:
    """The host has ended the sequence before the request was run."""
    if reason is EndReason.DRAINING:
        return stopping()
    if reason is EndReason.FENCED:
        return FencedError(
            f"sequence {request.quoted_id} was taken over by another stream or server before this "
            "request was run; it goes on there: stop the other, or ask again to take it back"
        )
    return NotFoundError(
        f"sequence {request.quoted_id} was ended ({reason.name}) before this request was run; "
        "start it again with the START flag"
    )


def overdue(lane: RequestLane) -> ServiceError:
    """No place became free in time for the lane."""
    # Clients of the field know this error by its first words.
    return BacklogError(
        f"timeout of the corresponding sequence has been expired: {_name(lane)} waited for a "
        "place and none became free; end some, ask another server, or serve with a higher "
        "--sequences-max or --backlog-seconds-max"
    )


def withdrawn(lane: RequestLane) -> ServiceError:
    """The request that starts the lane's sequence was cancelled while it waited for a place."""
    return NotFoundError(
        f"{_name(lane)} never began: the request that starts it was cancelled while it waited "
        "for a place; start it again with the START flag"
    )


def _name(lane: RequestLane) -> str:
    return f"sequence {lane.request.quoted_id}" if lane.sequence_id else _NO_SEQUENCE
