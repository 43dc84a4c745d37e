"""Defines a request, and the lane of a sequence with its requests."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sluice_service.arrays import Array
from sluice_service.errors import ServiceError
from sluice_service.sequences.events import Opened

NO_LANE = -1


@dataclass(slots=True, eq=False)
class InferRequest:
    """One ModelInferRequest, with its results so far."""

    wake: Callable[[], None]  # called when it is done, with outputs or an error
    arrived: float = field(default_factory=time.monotonic)
    id: str = ""
    model_name: str = ""
    version: str = ""  # the requested version, later the one that it ran on
    sequence_id: str = ""  # as the host knows it; "" is none
    quoted_id: str = ""  # as messages quote it
    is_start: bool = False
    is_end: bool = False
    first_step: int | None = None  # steps before it, if the client counts them
    timeout_seconds: float | None = None  # how long it may wait for a place
    batch: int = 1
    steps: int = 1
    has_time: bool = False  # the shapes have a time axis
    inputs: Sequence[Array] = ()  # [batch × steps, …] each
    wanted: Sequence[int] = ()  # the requested outputs
    wants_final_flag: bool = False
    # Results.
    is_cancelled: bool = False
    is_done: bool = False
    error: ServiceError | None = None
    outputs: Sequence[bytes] = ()  # [batch × steps, …] each
    _missing: int = 0  # steps of all rows
    _parts: Sequence[list[Sequence[bytes]]] = ()  # of each row, the outputs so far

    def expect_outputs(self) -> None:
        """Prepare for the outputs, when the shapes are known."""
        self._missing = self.batch * self.steps
        self._parts = [[] for _ in range(self.batch)]

    def collect(self, row: int, steps: int, outputs: Sequence[bytes]) -> None:
        """Take the next outputs of one row of the batch. The last of them finish the request."""
        if self.is_done:
            return
        self._missing -= steps
        if not self._missing and self.batch == 1 and not self._parts[0]:
            self.outputs = outputs
        else:
            self._parts[row].append(outputs)
            if self._missing:
                return
            pieces = [piece for parts in self._parts for piece in parts]
            self.outputs = [b"".join(column) for column in zip(*pieces, strict=True)]
        self.finish()

    def finish(self) -> None:
        """Wake the caller: the request has its outputs or an error."""
        self.is_done = True
        self.wake()

    def fail(self, error: ServiceError) -> None:
        """End with an error."""
        if not self.is_done:
            self.error = error
            self.finish()


@dataclass(slots=True, eq=False)
class RequestLane:
    """A lane at the host and its requests: those of one sequence, or one without a sequence."""

    sequence_id: str  # "": for requests without a sequence
    number: int = NO_LANE
    is_open: bool = False
    holds_answer: bool = False  # the host holds the outputs of the last request
    version: str = ""  # on which it runs
    step: int = 0  # steps whose outputs have arrived
    waiting: deque[InferRequest] = field(default_factory=deque)
    current: InferRequest | None = None
    row: int = 0  # of the current request's batch
    missing: int = 0  # steps of the current request without outputs so far
    resumes_at: int | None = None  # from where a repeat is run, after held outputs

    @property
    def request(self) -> InferRequest:
        """The current request, of which there must be one."""
        assert self.current is not None
        return self.current

    def requests(self) -> Iterator[InferRequest]:
        """All unanswered requests, in order."""
        if self.current is not None:
            yield self.current
        yield from self.waiting

    @property
    def waiting_steps(self) -> int:
        """The steps of all unanswered requests."""
        return sum(request.steps for request in self.requests())

    @property
    def steps_before(self) -> int:
        """The steps of the sequence before the current request."""
        return self.step + self.missing - self.request.steps

    def begin(self, request: InferRequest, row: int) -> None:
        """Make one row of a request the current one."""
        self.current, self.row, self.missing = request, row, request.steps
        self.resumes_at = None

    def held_steps(self, opened: Opened) -> int:
        """How many steps of a repeated request were applied, with outputs that the host holds."""
        request = self.request
        first = request.first_step
        if first is None or request.is_start or request.version not in ("", self.version):
            return 0
        steps = opened.applied - first
        return steps if opened.held_from <= first and 0 < steps <= request.steps else 0

    def chunk(self) -> tuple[int, int, int, Sequence[Array]]:
        """The rest of the current request: lane, steps, steps before, input rows."""
        request = self.request
        inputs = request.inputs
        if request.batch > 1 or self.missing < request.steps:
            end = (self.row + 1) * request.steps
            inputs = [array[end - self.missing : end] for array in inputs]
        return self.number, self.missing, self.step, inputs

    def take(self, first: int, steps: int, outputs: Sequence[bytes]) -> bool:
        """Give the current request its outputs; True if it has all of them."""
        request, is_next = self.current, first == self.step
        self.step = max(self.step, first + steps)
        if request is None or not is_next:
            return False
        self.missing -= steps
        request.version = self.version
        request.collect(self.row, steps, outputs)
        return not self.missing
