"""One request, and the lane of a sequence with the requests that want it."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from sluice_service.arrays import Array
from sluice_service.errors import ServiceError

NO_LANE = -1


class InferRequest:
    """What one ModelInferRequest asks for, and what has come of it so far."""

    __slots__ = (
        "_missing",
        "_parts",
        "_wake",
        "arrived",
        "batch",
        "error",
        "first_step",
        "has_time",
        "id",
        "inputs",
        "is_cancelled",
        "is_done",
        "is_end",
        "is_start",
        "outputs",
        "quoted_id",
        "sequence_id",
        "steps",
        "timeout_seconds",
        "version",
        "wanted",
        "wants_final_flag",
    )

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called when the request is done, with outputs or with an error."""
        self._wake = wake
        self.arrived = time.monotonic()
        self.id = ""
        self.version = ""  # the version asked for, later the one that it ran on
        self.sequence_id = ""  # as the host knows it; "" is none
        self.quoted_id = ""  # as messages quote it
        self.is_start = self.is_end = False
        self.first_step: int | None = None  # steps before it, where the client counts them
        self.timeout_seconds: float | None = None  # how long it may wait for a place
        self.batch = self.steps = 1
        self.has_time = False  # the shapes have a time axis
        self.inputs: list[Array] = []  # [batch × steps, …] each
        self.wanted: tuple[int, ...] = ()  # the outputs asked for
        self.wants_final_flag = False
        # What came of it.
        self.is_cancelled = False
        self.is_done = False
        self.error: ServiceError | None = None
        self.outputs: list[bytes] = []  # [batch × steps, …] each
        self._parts: list[list[list[bytes]]] = []
        self._missing = 0

    def expect_outputs(self) -> None:
        """Get ready to collect, once the shapes are known."""
        self._missing = self.batch * self.steps
        self._parts = [[] for _ in range(self.batch)]

    def collect(self, row: int, steps: int, outputs: list[bytes]) -> None:
        """Take the next outputs of one row of the batch; done with the last of them."""
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
        """Wake whoever waits: outputs or error are here."""
        self.is_done = True
        self._wake()

    def fail(self, error: ServiceError) -> None:
        """End with an error."""
        if not self.is_done:
            self.error = error
            self.finish()


class RequestLane:
    """A lane at the host with the requests that want it: of one sequence, or of none."""

    __slots__ = (
        "current",
        "holds_answer",
        "is_open",
        "missing",
        "number",
        "resumes_at",
        "row",
        "sequence_id",
        "step",
        "version",
        "waiting",
    )

    def __init__(self, sequence_id: str) -> None:
        self.sequence_id = sequence_id  # "": for requests without a sequence
        self.number = NO_LANE
        self.is_open = False
        self.holds_answer = False  # the host holds the outputs of the last request
        self.step = 0  # steps whose outputs have come
        self.version = ""  # on which it runs
        self.waiting: deque[InferRequest] = deque()
        self.current: InferRequest | None = None
        self.row = 0  # of the current request's batch
        self.missing = 0  # steps of the current request that have not come back
        self.resumes_at: int | None = None  # where a repeat is run on, after held outputs

    def requests(self) -> Iterator[InferRequest]:
        """All that have not been answered, in their order."""
        if self.current is not None:
            yield self.current
        yield from self.waiting

    @property
    def waiting_steps(self) -> int:
        """The steps of all that have not been answered."""
        return sum(request.steps for request in self.requests())

    @property
    def steps_before(self) -> int:
        """The steps of the sequence before the current request."""
        assert self.current is not None
        return self.step + self.missing - self.current.steps

    def begin(self, request: InferRequest, row: int) -> None:
        """Make one row of a request the current one."""
        self.current, self.row, self.missing = request, row, request.steps
        self.resumes_at = None

    def chunk(self) -> tuple[int, int, int, list[Array]]:
        """What is left to run of the current request: lane, steps, steps before, input rows."""
        request = self.current
        assert request is not None
        inputs = request.inputs
        if request.batch > 1 or self.missing < request.steps:
            end = (self.row + 1) * request.steps
            inputs = [array[end - self.missing : end] for array in inputs]
        return self.number, self.missing, self.step, inputs

    def take(self, first: int, steps: int, outputs: list[bytes]) -> bool:
        """Give outputs to the current request, where it is due them; True: it has them all."""
        request, is_next = self.current, first == self.step
        self.step = max(self.step, first + steps)
        if request is None or not is_next:
            return False
        self.missing -= steps
        request.version = self.version
        request.collect(self.row, steps, outputs)
        return not self.missing
