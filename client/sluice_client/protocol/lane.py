"""What a connection knows of one sequence, beside its steps.

A lane goes through these, keeping its number over all streams:

    WAITING   its open has to be sent (again)
    ASKED     its open was sent on this stream
    ATTACHED  Opened has arrived: chunks flow
    ENDING    its close or park was sent
    ENDED     finished, or refused for good
"""

from dataclasses import dataclass
from enum import Enum, auto

from sluice_client.errors import SluiceError
from sluice_client.protocol.calls import Call, Opening, Request
from sluice_client.protocol.tickets import Durability


class Status(Enum):
    """Where a lane is in its life; the module's docstring says what each means."""

    WAITING = auto()
    ASKED = auto()
    ATTACHED = auto()
    ENDING = auto()
    ENDED = auto()


@dataclass(slots=True)
class Lane:
    """What a connection knows of one sequence, beside its steps."""

    number: int
    opening: Opening
    asked_by: Request
    asked_position: int
    status: Status = Status.WAITING
    # Of the last open that was sent; each carries a higher one.
    attempt: int = 0
    expected_epoch: int = 0
    # What the server has given; None before it has opened the sequence.
    durability: Durability | None = None
    # The store has not answered since it was asked about this lane.
    is_postponed: bool = False
    # Of a lane that goes on from a ticket: outputs to steps that another handle has given.
    restored: Call | None = None
    # The server is at this step, and needs the inputs from it on again that another handle had.
    replays_from: int | None = None
    # The first Opened has arrived: from then on only RESUME is asked.
    was_opened: bool = False
    # The server has a sequence on this lane of the present stream.
    is_occupied: bool = False
    # The handle has let it go.
    is_released: bool = False
    is_parking: bool = False
    # Why it has ended.
    error: SluiceError | None = None
    ended_by: Request | None = None
    ended_position: int = 0
