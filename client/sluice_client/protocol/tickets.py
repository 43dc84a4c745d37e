"""Tickets: the identity of a handle, for a process that continues in its place."""

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, Self

from sluice_client.arguments import check_count, check_kind, check_text
from sluice_protos import sequences_pb2 as wire

# What survives the death of the server; see protos/sluice_protos/sequences.proto.
Durability = Literal["off", "periodic", "strict"]

WIRE_DURABILITY: Final[dict[Durability | None, "wire.Durability.ValueType"]] = {
    None: wire.SERVER_DEFAULT,
    "off": wire.OFF,
    "periodic": wire.PERIODIC,
    "strict": wire.STRICT,
}

# A renewed ticket's attempts begin at least so far above those of the original.
_ATTEMPTS_APART: Final = 2**20


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a journal must store of a handle, so that `client.resume` can continue in its place.

    Of all handles that were resumed from one ticket only the latest has the sequence:
    the others get Fenced.
    """

    model: str
    sequence_id: str
    # Identifies the handle; see docs/protocol.md.
    writer: bytes
    # A lower bound of the attempts that the ticket's handle has used.
    attempt: int
    # Outputs that the caller has stored.
    received: int
    # Steps that were known to be durable.
    durable: int = 0
    # As requested when the sequence was opened.
    durability: Durability | None = None
    holds_outputs: bool = False

    def __post_init__(self) -> None:
        check_text("sequence_id", self.sequence_id)
        check_kind("writer", self.writer, bytes, "bytes")
        check_count("attempt", self.attempt)
        check_count("received", self.received)
        check_count("durable", self.durable)

    def to_json(self) -> str:
        """The ticket as one line of text; the inverse of `from_json`."""
        return json.dumps({**asdict(self), "writer": self.writer.hex()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        fields["writer"] = bytes.fromhex(fields["writer"])
        return cls(**fields)

    def renew(self, received: int | None = None) -> Self:
        """The ticket of a handle that continues in place of this one's.

        Its attempts begin at the current time in microseconds: above those of every
        handle of this sequence that was made before, and below those of every later
        one. If the clock was set back they are still above those of this ticket.
        """
        now = time.time_ns() // 1000
        return replace(
            self,
            attempt=max(self.attempt + _ATTEMPTS_APART, now),
            received=self.received if received is None else received,
        )


def check_durability(durability: Durability | None) -> Durability | None:
    """Returns its argument. Raises ValueError for an unknown durability."""
    if durability not in WIRE_DURABILITY:
        raise ValueError(
            f"durability is off, periodic, strict or None (the server's), not {durability!r}"
        )
    return durability
