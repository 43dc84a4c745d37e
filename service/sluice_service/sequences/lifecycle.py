"""Defines the phases of a sequence, the events allowed in each, and a sequence's data."""

from enum import Enum, auto

from sluice_service.store.claims import Durability, Record


class Phase(Enum):
    """The phases of a sequence."""

    PARKED = auto()  # live, on no stream
    ATTACHED = auto()  # live, on a lane of a stream
    ENDED = auto()  # its state is dropped; a tombstone may remain


class Event(Enum):
    """The events of a sequence."""

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
    """The sequence's phase does not allow an event. Nothing has changed."""


class Held:
    """Outputs that a client has not acknowledged, and that no stream holds."""

    __slots__ = ("first", "outputs", "steps")

    def __init__(self, first: int, steps: int, outputs: list[bytes]) -> None:
        self.first = first
        self.steps = steps
        self.outputs = outputs


class Sequence:
    """The data of one live sequence, except its state and its columns."""

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
        # True if its client has no writer but counts its steps: its unacknowledged outputs
        # are held nevertheless.
        self.is_counted = False
        # The claim under which this process owns it in the store; empty if durability is off.
        self.claim_id = b""

    def move(self, event: Event) -> None:
        """Change the phase. Raises IllegalTransitionError and changes nothing if it may not."""
        phase = LIFECYCLE.get((self.phase, event))
        if phase is None:
            raise IllegalTransitionError(
                f"{self.sequence_id!r}: {event.name} is not allowed in {self.phase.name}"
            )
        self.phase = phase

    @property
    def is_anonymous(self) -> bool:
        """True if its client has no writer: it cannot replay, so nothing is held for it."""
        return not self.record.writer

    @property
    def is_durable(self) -> bool:
        """True if it is in a store, which then decides who may open it."""
        return self.durability is not Durability.OFF

    def is_under(self, claim_id: bytes) -> bool:
        """True while it is alive here under that claim."""
        return self.phase is not Phase.ENDED and self.claim_id == claim_id
