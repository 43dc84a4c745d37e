"""Lanes: what a connection knows of one sequence, beside its steps."""

from dataclasses import dataclass
from enum import Enum, auto

from sluice_client.errors import SluiceError
from sluice_client.protocol.calls import Call, LaneRequest
from sluice_client.protocol.openings import Opening
from sluice_client.protocol.tickets import Durability


class Status(Enum):
    """Where a lane is in its life."""

    WAITING = auto()  # its open must be sent (again)
    ASKED = auto()  # its open was sent on this stream
    ATTACHED = auto()  # Opened has arrived: chunks may be sent
    ENDING = auto()  # its close or park was sent
    ENDED = auto()  # finished, or refused for good


@dataclass(slots=True)
class Lane:
    """One sequence of a connection; it has the same number on all streams."""

    number: int
    opening: Opening
    # The request that opens it, and the lane's position in it.
    opened_by: LaneRequest
    opened_position: int
    status: Status = Status.WAITING
    # Of the last open that was sent; each open carries a higher one.
    attempt: int = 0
    expected_epoch: int = 0
    # What the server grants; None before it has opened the sequence.
    durability: Durability | None = None
    # The server's store does not answer: the open must be sent again after a while.
    is_postponed: bool = False
    # Steps that another handle submitted, and whose outputs come to this one.
    inherited: Call | None = None
    # The server is at this step, and lacks the inputs after it that another handle had.
    replays_from: int | None = None
    # Opened has arrived once: from then on the lane only asks to RESUME.
    was_opened: bool = False
    # The server has a sequence on this lane of the present stream.
    is_occupied: bool = False
    # The handle has closed or parked it.
    is_released: bool = False
    is_parking: bool = False
    # Why it has ended.
    error: SluiceError | None = None
    # The request that closes or parks it, and the lane's position in it.
    ended_by: LaneRequest | None = None
    ended_position: int = 0
