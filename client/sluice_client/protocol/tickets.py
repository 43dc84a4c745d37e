"""Which handle of which sequence one is: enough to go on as it in another process."""

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, Self

from sluice_client.arguments import check_count, check_kind, check_text
from sluice_protos import sequences_pb2 as wire

# What survives the death of the server; protos/sluice_protos/sequences.proto has the meaning.
Durability = Literal["off", "periodic", "strict"]

WIRE_DURABILITY: Final[dict[Durability | None, "wire.Durability.ValueType"]] = {
    None: wire.SERVER_DEFAULT,
    "off": wire.OFF,
    "periodic": wire.PERIODIC,
    "strict": wire.STRICT,
}

# A handle that goes on from a ticket begins its attempts so far above those of the ticket.
_ATTEMPTS_APART: Final = 2**20


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a journal must have of a handle so that `client.resume` can go on as it.

    Of all handles that go on from one ticket only the latest has the sequence: the
    others get Fenced.
    """

    model: str
    sequence_id: str
    # Names the handle; see docs/protocol.md.
    writer: bytes
    # No open of the ticket's handle has carried a lower one.
    attempt: int
    # Outputs that are safe with the caller.
    received: int
    # Steps that were known to be durable.
    durable: int = 0
    # What was asked for when the sequence was opened.
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
        """The ticket of a handle that goes on from this one.

        Its attempts begin at the present microsecond: above all attempts of handles
        that were made before, this ticket's or another's of the same sequence, and
        below all of those that will be. Should the clock have gone back, they are
        still above those of this ticket.
        """
        now = time.time_ns() // 1000
        return replace(
            self,
            attempt=max(self.attempt + _ATTEMPTS_APART, now),
            received=self.received if received is None else received,
        )


def check_durability(durability: Durability | None) -> Durability | None:
    """What was asked for, as it is. Raises ValueError for what there is not."""
    if durability not in WIRE_DURABILITY:
        raise ValueError(
            f"durability is off, periodic, strict or None (the server's), not {durability!r}"
        )
    return durability
