"""How a caller asks for a sequence: the mode, the state and the durability to open it with."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from secrets import token_bytes

import numpy as np
from numpy.typing import NDArray

from sluice_client.arguments import check_count, check_kind, check_row, check_text
from sluice_client.protocol.tickets import Durability, Ticket, check_durability
from sluice_protos import sequences_pb2 as wire


class Mode(Enum):
    """What to do when the id of a sequence is in use, and when it is not."""

    # A new sequence; refused if the id is in use.
    START = wire.START
    # Continue if the id is in use, start otherwise.
    START_OR_RESUME = wire.START_OR_RESUME
    # A new sequence, in place of one that uses the id.
    RESTART = wire.RESTART
    # Continue a live sequence, whoever has it; refused if there is none.
    TAKEOVER = wire.TAKEOVER


@dataclass(frozen=True, slots=True)
class SequenceState:
    """The state of a sequence after `step` steps, as a value: [state_size] float32.

    Every server of the same model accepts it: `client.sequence(model, state=…)`
    continues from it.
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
    # Acknowledge outputs when the caller confirms them, not when they arrive.
    holds_outputs: bool = False
    # Identifies the handle; only a handle resumed from its ticket uses it again.
    writer: bytes = field(default_factory=lambda: token_bytes(16))
    # Continue in place of the handle with this ticket; `mode` and `state` are ignored.
    ticket: Ticket | None = None

    def __post_init__(self) -> None:
        check_text("sequence_id", self.sequence_id)
        check_kind("mode", self.mode, Mode, "a Mode, such as Mode.TAKEOVER")
        if self.state is not None:
            check_kind("state", self.state, SequenceState, "a SequenceState")
        check_durability(self.durability)
        check_kind("holds_outputs", self.holds_outputs, bool, "True or False")


def ticket_opening(ticket: Ticket) -> Opening:
    """The opening of a handle that continues the sequence of a ticket."""
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
