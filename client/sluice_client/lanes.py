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

from sluice_client.calls import Opening, Request


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
    attempt: int = 0
    expected_epoch: int = 0
    # The first Opened has arrived: from then on only RESUME is asked.
    was_opened: bool = False
    # The server has a sequence on this lane of the present stream.
    is_occupied: bool = False
    # The handle has let it go.
    is_released: bool = False
    is_parking: bool = False
    ended_by: Request | None = None
    ended_position: int = 0
