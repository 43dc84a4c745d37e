"""What every store does for a host: claim, write, close, renew leases, read.

A store keeps one record for each sequence: who owns it (claim_id, epoch, writer,
attempt) and its last checkpoint, as bytes that it does not read. It alone decides who
owns a sequence. Each call is atomic for each sequence it names. A host that has been
fenced learns so from the answer to its next call.

A live sequence has a lease: unless its owner claims it or renews the lease for
`record_seconds`, the store deletes it. A closed sequence leaves a tombstone for
`tombstone_seconds`, which refuses late retries of opens.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, Protocol

from sluice_service.errors import LaneError
from sluice_service.store.claims import Claim, OpenRequest


class Key(NamedTuple):
    """The name of a sequence."""

    model: str
    sequence_id: str


@dataclass(frozen=True, slots=True)
class Packed:
    """A checkpoint as a store keeps it."""

    step: int
    data: bytes  # of `pack`


def draw_claim_id() -> bytes:
    """A fresh name for one claim, never given twice."""
    return secrets.token_bytes(16)


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """One open, with what this process knows of the sequence.

    A claim is idempotent: after a StoreError the same request may be sent again, and gets
    the answer that it would have got the first time. Each open needs a request of its own.
    """

    key: Key
    # sequence_id, mode, writer, attempt, expected_epoch: what the table of claims reads.
    open: OpenRequest
    # The first checkpoint of the record, if the claim is CREATE or WIPE.
    initial: Packed
    # The claim under which this process has the sequence in memory; empty: it is not in memory.
    held: bytes = b""
    # With `held`: the sequence as it is in memory, from which a TAKE continues.
    snapshot: Packed | None = None
    # The claim's name if it is granted. Leave it out: each request draws its own.
    claim_id: bytes = field(default_factory=draw_claim_id)


@dataclass(frozen=True, slots=True)
class Granted:
    """The process that asked now owns the sequence, under a fresh claim."""

    claim: Claim
    claim_id: bytes
    epoch: int
    # True: the record was under the claim `held`, so memory is up to date.
    # False: another process has owned the sequence since, so memory is stale.
    is_held: bool
    # The claim that the record was under before; empty if there was no record.
    previous: bytes
    # The record's checkpoint after the claim.
    checkpoint: Packed


@dataclass(frozen=True, slots=True)
class Write:
    """A newer checkpoint of a claimed sequence."""

    key: Key
    claim_id: bytes
    checkpoint: Packed


@dataclass(frozen=True, slots=True)
class Closing:
    """The end of a sequence. An empty `claim_id` closes it whoever owns it."""

    key: Key
    claim_id: bytes
    ending: str  # why it ended, as its writer is told


class Verdict(Enum):
    """The result of a write, a close or the renewal of a lease."""

    # It is durable. Also where a newer checkpoint of the same claim is stored already, and
    # where a close is a retry.
    DONE = auto()
    # Another claim owns the sequence, or the store has no live record of it.
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class Stored:
    """A live sequence as it is in the store."""

    key: Key
    epoch: int
    checkpoint: Packed


class StoreError(Exception):
    """The store did not answer; the call may have taken effect or not. Retry it."""


class StoreSetupError(Exception):
    """The store cannot be used as it is set up; the message names the fix."""


class Store(Protocol):
    """One store, shared by all hosts of a process.

    Every call raises StoreError when the store does not answer. The requests of one call
    name different sequences, and are answered in their order.
    """

    async def start(self) -> list[str]:
        """Connect and check; return warnings for the operator.

        Raises StoreSetupError, StoreError.
        """
        ...

    async def stop(self) -> None:
        """Close connections and files."""
        ...

    async def claim(self, requests: Sequence[ClaimRequest]) -> list[Granted | LaneError]:
        """Read each record, decide by the table of claims, and write the new owner, atomically.

        A LaneError is the refusal that the client is told. A grant is durable. The epoch
        rises if the record was not under `held`, if the writer changes, and on a WIPE. A
        snapshot that is older than the record is ignored: the record's checkpoint stays,
        and `is_held` is false.
        """
        ...

    async def write(self, writes: Sequence[Write]) -> list[Verdict]:
        """Replace the checkpoints of live records that are under the same claim and not newer."""
        ...

    async def close(self, closings: Sequence[Closing]) -> list[Verdict]:
        """Delete checkpoints and leave tombstones (writer, attempt, epoch, ending)."""
        ...

    async def renew_leases(self, claims: Sequence[tuple[Key, bytes]]) -> list[Verdict]:
        """Renew the leases of live sequences, named by (key, claim_id).

        A claim renews the lease too; a write does not.
        """
        ...

    async def read(self, key: Key) -> Stored | None:
        """Read a live sequence without claiming it."""
        ...

    def stored(self, model: str) -> AsyncIterator[Stored]:
        """List the live sequences of a model, in no order, without checkpoint data."""
        ...
