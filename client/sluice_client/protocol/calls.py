"""What a caller waits for: the values that pass between the faces and the core."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from secrets import token_bytes

import numpy as np
from numpy.typing import NDArray

from sluice_client.arguments import check_count, check_kind, check_row, check_text
from sluice_client.errors import SluiceError
from sluice_client.protocol.signature import Array
from sluice_client.protocol.tables import Numbers
from sluice_client.protocol.tickets import WIRE_DURABILITY, Durability, Ticket, check_durability
from sluice_protos import sequences_pb2 as wire


class Mode(Enum):
    """What opening a sequence means when its id is alive, or has been."""

    # A new sequence; refused when the id is alive.
    START = wire.START
    # Whichever fits.
    START_OR_RESUME = wire.START_OR_RESUME
    # From the initial state, whatever was there.
    RESTART = wire.RESTART
    # Go on with a sequence that is alive, whoever began it.
    TAKEOVER = wire.TAKEOVER


@dataclass(frozen=True, slots=True)
class SequenceState:
    """The state of a sequence after `step` steps, as a value: [state_size] float32.

    Portable to every server of the same model: `client.sequence(model, state=…)`
    goes on from it.
    """

    model_digest: str
    step: int
    row: NDArray[np.float32]

    def __post_init__(self) -> None:
        check_text("model_digest", self.model_digest)
        check_count("step", self.step)
        check_row("row", self.row)


@dataclass(frozen=True, slots=True)
class Opening:
    """One sequence as its handle asks for it."""

    sequence_id: str
    mode: Mode = Mode.START
    state: SequenceState | None = None
    durability: Durability | None = None
    # Outputs are acknowledged when the caller confirms them, not when they have arrived.
    holds_outputs: bool = False
    # Names the handle: never used by another one, but by one with its ticket.
    writer: bytes = field(default_factory=lambda: token_bytes(16))
    # Goes on where the handle with this ticket stood; `mode` and `state` say nothing then.
    ticket: Ticket | None = None

    def __post_init__(self) -> None:
        check_text("sequence_id", self.sequence_id)
        check_kind("mode", self.mode, Mode, "a Mode, such as Mode.TAKEOVER")
        if self.state is not None:
            check_kind("state", self.state, SequenceState, "a SequenceState")
        check_durability(self.durability)
        check_kind("holds_outputs", self.holds_outputs, bool, "True or False")


def read_state(answer: wire.SequenceState) -> SequenceState:
    """A state as the server gives it."""
    row = np.frombuffer(answer.row, "<f4").astype(np.float32)
    return SequenceState(answer.model_digest, answer.step, row)


def fork_request(
    model: str,
    sequence_id: str,
    fork_id: str | None,
    writer: bytes,
    durability: Durability | None,
) -> wire.ForkRequest:
    """The question for a copy that `writer` will open."""
    return wire.ForkRequest(
        model=model,
        sequence_id=sequence_id,
        fork_id=fork_id or "",
        writer=writer,
        durability=WIRE_DURABILITY[check_durability(durability)],
    )


def ticket_opening(ticket: Ticket) -> Opening:
    """What a handle asks for that goes on with the sequence of a ticket."""
    return Opening(
        ticket.sequence_id,
        durability=ticket.durability,
        holds_outputs=ticket.holds_outputs,
        writer=ticket.writer,
        ticket=ticket,
    )


def group_openings(
    sequence_ids: Iterable[str], mode: Mode, durability: Durability | None
) -> list[Opening]:
    """The openings of a group. Raises ValueError when it is empty or names an id twice."""
    openings = [Opening(sequence_id, mode, durability=durability) for sequence_id in sequence_ids]
    if not openings:
        raise ValueError("a group has at least one sequence")
    if len({opening.sequence_id for opening in openings}) < len(openings):
        raise ValueError("a group has each sequence once; an id is named twice")
    return openings


class Pending:
    """Something asked for, for one or several lanes, that is done when all of them are.

    `errors` has what went wrong, by position in `lanes`.
    """

    __slots__ = ("errors", "is_done", "lanes", "wake")

    def __init__(self, lanes: Numbers) -> None:
        self.lanes = lanes
        self.errors: dict[int, SluiceError] = {}
        self.is_done = False
        # Called once, when done; set by whoever waits.
        self.wake: Callable[[], None] = _nobody_waits

    def finish(self) -> None:
        """Say that it is done, to whoever waits."""
        self.is_done = True
        self.wake()


class Request(Pending):
    """An open, a close or a park: done when the answer for each lane has come."""

    __slots__ = ("_left",)

    def __init__(self, lanes: Numbers) -> None:
        super().__init__(lanes)
        self._left = len(lanes)

    def settle(self, position: int, error: SluiceError | None = None) -> None:
        """Note the answer for one lane."""
        if error is not None:
            self.errors[position] = error
        self._left -= 1
        if not self._left:
            self.finish()


class Call(Pending):
    """The chunks that one caller gives together: one chunk for each of `lanes`.

    lanes    [chunks], each lane once
    counts   [chunks], the steps of each chunk
    inputs   [sum(counts), …] for each input of the model
    outputs  [sum(counts), …] for each output; rows whose step failed have no meaning
    """

    __slots__ = ("counts", "first_step", "inputs", "number", "outputs", "rows_left")

    _numbers = count()

    def __init__(
        self, lanes: Numbers, counts: Numbers, inputs: Sequence[Array], outputs: list[Array]
    ) -> None:
        super().__init__(lanes)
        self.counts = counts
        self.inputs = inputs
        self.outputs = outputs
        self.number = next(self._numbers)
        self.rows_left = len(inputs[0])
        # Of the first lane; known once the ledger has admitted the call.
        self.first_step = -1


def _nobody_waits() -> None:
    pass
