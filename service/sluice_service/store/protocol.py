"""What every store does for a host: claim, write, close, renew, read; nothing is ever half done.

A store keeps one record a sequence: who owns it (claim_id, epoch, writer, attempt)
and its last checkpoint, which it does not look into. It is the only arbiter of
ownership: each call is atomic for each sequence it names, and a host that has been
fenced learns it from the answer to its next call.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, Protocol

from sluice_service.errors import LaneError
from sluice_service.store.claims import Claim, OpenRequest


class Key(NamedTuple):
    """Which sequence."""

    model: str
    sequence_id: str


@dataclass(frozen=True, slots=True)
class Packed:
    """A checkpoint as a store keeps it."""

    step: int
    data: bytes  # of `pack`


def draw_claim_id() -> bytes:
    """A name for one claim that no other claim ever has."""
    return secrets.token_bytes(16)


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """One open, with what this process knows of the sequence.

    One request is one claim however often it is asked: after a StoreError the same
    request may be asked again, and is answered as it would have been the first time.
    Another open is another request.
    """

    key: Key
    # sequence_id, mode, writer, attempt, expected_epoch: what the table of claims reads.
    open: OpenRequest
    # What the record begins with where the claim is CREATE or WIPE.
    initial: Packed
    # The claim under which this process has the sequence in memory; empty: it has not.
    held: bytes = b""
    # With `held`: the sequence as it stands in memory, what a TAKE goes on from.
    snapshot: Packed | None = None
    # The claim's name if it is granted. Never given: each request draws its own.
    claim_id: bytes = field(default_factory=draw_claim_id)


@dataclass(frozen=True, slots=True)
class Granted:
    """The sequence is this process's, under a fresh claim."""

    claim: Claim
    claim_id: bytes
    epoch: int
    # True when the record was under the claim `held`: what is in memory is the
    # newest there is. False: another process has had it, and memory is stale.
    is_held: bool
    # The claim the record was under before; empty where there was none.
    previous: bytes
    # The record's checkpoint now.
    checkpoint: Packed


@dataclass(frozen=True, slots=True)
class Write:
    """A newer checkpoint of a claimed sequence."""

    key: Key
    claim_id: bytes
    checkpoint: Packed


@dataclass(frozen=True, slots=True)
class Closing:
    """The end of a sequence; an empty `claim_id` closes it whoever owns it."""

    key: Key
    claim_id: bytes
    ending: str  # why, in words for its writer


class Verdict(Enum):
    """What became of a write, a close or a renewal."""

    DONE = auto()  # durable; or a newer one under the same claim is; or closed under it before
    REFUSED = auto()  # the claim is not this process's any more, or there is no live record


@dataclass(frozen=True, slots=True)
class Stored:
    """A live sequence as the store knows it."""

    key: Key
    epoch: int
    checkpoint: Packed


class StoreError(Exception):
    """The store did not answer: what was asked may have happened or not. Ask again."""


class StoreSetupError(Exception):
    """The store cannot keep what it would have to promise; the message names the fix."""


class Store(Protocol):
    """One store, shared by all hosts of a process; every call raises StoreError when it is down.

    Requests of one call name different sequences. Answers come in their order.
    """

    async def start(self) -> list[str]:
        """Connect and check; warnings for the operator. Raises StoreSetupError, StoreError."""
        ...

    async def stop(self) -> None:
        """Let go of connections and files."""
        ...

    async def claim(self, requests: Sequence[ClaimRequest]) -> list[Granted | LaneError]:
        """Read, decide by the table of claims, raise the epoch, return the record: one step each.

        A LaneError is the refusal the client is told. A claim draws a fresh claim_id.
        The epoch rises where the record was not under `held`, where the writer
        changes, and on a WIPE. A snapshot older than the record is not taken: the
        record stands, and `is_held` is false. What is granted is durable.
        """
        ...

    async def write(self, writes: Sequence[Write]) -> list[Verdict]:
        """Replace checkpoints whose record is alive under their claim and not newer."""
        ...

    async def close(self, closings: Sequence[Closing]) -> list[Verdict]:
        """Drop checkpoints; a tombstone (writer, attempt, epoch, ending) stays for a while."""
        ...

    async def renew(self, claims: Sequence[tuple[Key, bytes]]) -> list[Verdict]:
        """Say that these (key, claim_id) are alive: others are dropped in the end.

        A claim does so too; a write does not.
        """
        ...

    async def read(self, key: Key) -> Stored | None:
        """What is stored of a live sequence, without claiming it."""
        ...

    def stored(self, model: str) -> AsyncIterator[Stored]:
        """Every live sequence of a model, in no order; checkpoints left empty."""
        ...
