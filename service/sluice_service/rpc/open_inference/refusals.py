"""What requests of the Open Inference Protocol wait on: lanes, their frames, their errors."""

import time
from collections import deque
from collections.abc import Iterator

from sluice_service.arrays import Array
from sluice_service.errors import (
    BacklogError,
    FencedError,
    GapError,
    LaneError,
    ModelNotFoundError,
    NotFoundError,
    OutOfRangeError,
    RequestError,
    ServiceError,
    StoppingError,
)
from sluice_service.rpc.open_inference.messages import Request
from sluice_service.sequences.events import EndReason, Opened

NONE = -1


class Tally:
    """How many requests there were, and how long they took."""

    def __init__(self) -> None:
        self.succeeded = self.failed = 0
        self.succeeded_seconds = self.failed_seconds = 0.0
        self.last_time = 0.0  # seconds since 1970

    def count(self, request: Request) -> None:
        """Count a request that is done."""
        seconds = time.monotonic() - request.arrived
        if request.error is None:
            self.succeeded += 1
            self.succeeded_seconds += seconds
            self.last_time = time.time()
        else:
            self.failed += 1
            self.failed_seconds += seconds


class Lane:
    """A sequence, or a place for requests without one."""

    __slots__ = (
        "current",
        "is_counted",
        "is_open",
        "key",
        "missing",
        "number",
        "queue",
        "resumes_at",
        "row",
        "step",
        "version",
    )

    def __init__(self, key: str) -> None:
        self.key = key  # "": no sequence
        self.number = NONE
        self.is_open = False
        self.is_counted = False  # the host holds the answer to its last request
        self.step = 0  # whose outputs have come
        self.version = ""  # on which it runs
        self.queue: deque[Request] = deque()
        self.current: Request | None = None
        self.row = 0  # of the current request's batch
        self.missing = 0  # steps of the current request that have not come back
        self.resumes_at = NONE  # the step from which a repeat is run: before it outputs are held

    @property
    def first(self) -> int:
        """The steps before the current request."""
        assert self.current is not None
        return self.step + self.missing - self.current.steps

    def requests(self) -> Iterator[Request]:
        """All that have not been answered, in their order."""
        if self.current is not None:
            yield self.current
        yield from self.queue

    @property
    def steps_asked(self) -> int:
        """The steps of those."""
        return sum(request.steps for request in self.requests())


def applied_before(lane: Lane, request: Request, opened: Opened) -> int:
    """How many steps of a repeated request were applied, whose outputs the host holds."""
    first = request.first
    if first is None or request.is_start or request.version not in ("", lane.version):
        return 0
    steps = opened.applied - first
    return steps if opened.held_from <= first and 0 < steps <= request.steps else 0


def misplaced(lane: Lane, request: Request) -> ServiceError | None:
    """Why a request is not the next one of its sequence, by its version or its steps."""
    if request.version not in ("", lane.version):
        return ModelNotFoundError(
            f"sequence {request.sequence} runs on version {lane.version} until it ends, not on "
            f"{request.version}; leave the version out"
        )
    first = request.first
    if first is None or first == lane.step or request.is_start:
        return None
    if first > lane.step:
        return GapError(
            f"sequence {request.sequence} has {lane.step} steps applied, not {first}; send again "
            f"from sequence_step {lane.step}"
        )
    return passed(request, lane.step)


def passed(request: Request, step: int) -> ServiceError:
    """What a request is told that is older than the last one of its sequence, or another."""
    return OutOfRangeError(
        f"sequence {request.sequence} has {step} steps applied; only its last request, as it was, "
        f"can be repeated: go on with sequence_step {step}"
    )


def not_started(request: Request, model: str, error: LaneError) -> ServiceError:
    """What a request is told whose sequence is not there."""
    is_unknown = isinstance(error, NotFoundError)
    if is_unknown and error.expected_step:
        return NotFoundError(
            f"sequence {request.sequence} of model {model!r} was lost with its server; its last "
            f"durable step is {error.expected_step}: send again what follows, with sequence_step "
            "beginning there, or start it again with the START flag"
        )
    text = (
        f"inference request for sequence {request.sequence} to model {model!r} must specify the "
        "START flag on the first request of the sequence"
    )
    if is_unknown:
        return RequestError(f"{text}: send sequence_start with it")
    return NotFoundError(f"{text}; {error}")


def ended(request: Request, reason: EndReason) -> ServiceError:
    """What a request is told whose sequence ended before its turn."""
    if reason is EndReason.DRAINING:
        return StoppingError("this server is stopping; ask another")
    if reason is EndReason.FENCED:
        return FencedError(
            f"sequence {request.sequence} was taken over by another stream or server before this "
            "request was run; it goes on there: stop the other, or ask again to take it back"
        )
    return NotFoundError(
        f"sequence {request.sequence} was ended ({reason.name}) before this "
        "request was run; start it again with the START flag"
    )


def overdue(request: Request) -> ServiceError:
    """What the requests of a sequence are told for which no place became free in time."""
    # The first words are those by which clients of the field know it.
    return BacklogError(
        f"timeout of the corresponding sequence has been expired: {_name(request)} waited for a "
        "place and none became free; end some, ask another server, or serve with a higher "
        "--sequences-max or --backlog-seconds-max"
    )


def withdrawn(request: Request) -> ServiceError:
    """What the other requests of a sequence are told whose first was cancelled while it waited."""
    return NotFoundError(
        f"{_name(request)} never began: the request that starts it was cancelled while it waited "
        "for a place; start it again with the START flag"
    )


def _name(request: Request) -> str:
    return f"sequence {request.sequence}" if request.key else "a request without a sequence"


def as_chunk(lane: Lane) -> tuple[int, int, int, list[Array]]:
    """What is to be run of a lane's request: lane, steps, steps before it, rows of each input."""
    request = lane.current
    assert request is not None
    inputs = request.inputs
    if request.batch > 1 or lane.missing < request.steps:
        end = (lane.row + 1) * request.steps
        inputs = [array[end - lane.missing : end] for array in inputs]
    return lane.number, lane.missing, lane.step, inputs
