"""The life of one sequence: its phases, what may happen in each, and what is known of it."""

from enum import Enum, auto

from sluice_service.store.claims import Durability, Record


class Phase(Enum):
    """Where a sequence is in its life."""

    PARKED = auto()  # alive, no stream attached
    ATTACHED = auto()  # alive, on a lane of a stream
    ENDED = auto()  # its state is gone; a tombstone may remain


class Event(Enum):
    """What can happen to a sequence."""

    ATTACH = auto()  # a lane opens it; a new lane ends the old one
    DETACH = auto()  # its lane is parked, or its stream ends
    END = auto()  # closed, expired, or owned by another process now


LIFECYCLE: dict[tuple[Phase, Event], Phase] = {
    (Phase.PARKED, Event.ATTACH): Phase.ATTACHED,
    (Phase.ATTACHED, Event.ATTACH): Phase.ATTACHED,
    (Phase.ATTACHED, Event.DETACH): Phase.PARKED,
    (Phase.PARKED, Event.END): Phase.ENDED,
    (Phase.ATTACHED, Event.END): Phase.ENDED,
}


class IllegalTransitionError(Exception):
    """An event that the sequence's phase does not allow; nothing has changed."""


class Held:
    """Outputs that a client has not acknowledged, and that no stream holds."""

    __slots__ = ("first", "outputs", "steps")

    def __init__(self, first: int, steps: int, outputs: list[bytes]) -> None:
        self.first = first
        self.steps = steps
        self.outputs = outputs


class Sequence:
    """What is known of one live sequence beside its state and its columns."""

    __slots__ = (
        "claim_id",
        "durability",
        "held",
        "is_counted",
        "phase",
        "record",
        "sequence_id",
        "slot",
    )

    def __init__(self, sequence_id: str, slot: int, record: Record) -> None:
        self.sequence_id = sequence_id
        self.slot = slot
        self.record = record
        self.phase = Phase.PARKED
        self.held: list[Held] = []
        self.durability = Durability.OFF
        # True where its client has no writer but counts its steps: its unacknowledged outputs
        # are held all the same.
        self.is_counted = False
        # The claim under which this process owns it in the store; empty where durability is off.
        self.claim_id = b""

    def move(self, event: Event) -> None:
        """Go where LIFECYCLE says. Raises IllegalTransitionError, and changes nothing then."""
        phase = LIFECYCLE.get((self.phase, event))
        if phase is None:
            raise IllegalTransitionError(
                f"{self.sequence_id!r}: {event.name} is not allowed in {self.phase.name}"
            )
        self.phase = phase

    @property
    def is_anonymous(self) -> bool:
        """True when its client has no writer: it cannot replay, so nothing is held for it."""
        return not self.record.writer

    @property
    def is_durable(self) -> bool:
        """True when a store has it too, which then decides who may open it."""
        return self.durability is not Durability.OFF

    def is_under(self, claim_id: bytes) -> bool:
        """True while it is alive here under that claim."""
        return self.phase is not Phase.ENDED and self.claim_id == claim_id
