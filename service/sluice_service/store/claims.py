"""Decides who may open a sequence: one table as a pure function of the record and the request."""

from dataclasses import dataclass
from enum import Enum, IntEnum, auto

from sluice_service.errors import (
    ConflictError,
    ExistsError,
    FencedError,
    LaneError,
    NotFoundError,
    SequenceClosedError,
    StaleError,
)


class OpenMode(IntEnum):
    """What an open asks for. The numbers are those of sluice.v1.OpenMode."""

    START = 0  # start a new sequence; refused while the id is alive under another writer
    RESUME = 1  # continue a sequence of the same writer
    START_OR_RESUME = 2  # continue the sequence, of any writer, or start a new one
    RESTART = 3  # start from the initial state, whatever was there
    TAKEOVER = 4  # continue a sequence, also of another writer


class Durability(IntEnum):
    """What of a sequence outlives its server. The numbers are those of sluice.v1.Durability."""

    SERVER_DEFAULT = 0  # the setting of the server; only in requests
    OFF = 1  # nothing
    PERIODIC = 2  # the state, stored after a number of steps or seconds
    STRICT = 3  # every step: outputs leave only once their checkpoint is durable


@dataclass(slots=True)
class State:
    """The state of a sequence as a value; any server of the same model can continue from it."""

    model_digest: str
    step: int
    row: bytes  # float32, little-endian, [state_size]


@dataclass(slots=True)
class OpenRequest:
    """One open of a sequence by a client. The defaults are those of sluice.v1."""

    lane: int = 0
    sequence_id: str = ""  # empty: the server draws one
    mode: int = OpenMode.START
    # How many outputs have arrived; None if the client does not count them.
    received: int | None = None
    # A new sequence starts from this state instead of the model's initial one.
    state: State | None = None
    writer: bytes = b""  # empty: the caller never replays
    attempt: int = 0
    expected_epoch: int = 0
    durability: int = Durability.SERVER_DEFAULT


@dataclass(slots=True)
class Record:
    """Who owns a live sequence, or the tombstone of a closed one."""

    writer: bytes
    attempt: int
    epoch: int
    is_alive: bool
    # Of a tombstone: why the sequence ended, as its writer is told.
    ending: str = ""


class Situation(Enum):
    """What an open finds: whose the record is, and whether it is alive."""

    MINE = auto()  # alive, same writer
    THEIRS = auto()  # alive, another writer
    MINE_CLOSED = auto()
    THEIRS_CLOSED = auto()
    UNKNOWN = auto()


class Claim(Enum):
    """What is granted to an open."""

    RESUME = auto()  # continue with the same writer
    CREATE = auto()  # start a new sequence
    TAKE = auto()  # continue under a new writer and a raised epoch
    WIPE = auto()  # start again from the initial state, under a raised epoch


class Refusal(Enum):
    """Why an open is refused."""

    FENCED = auto()
    EXISTS = auto()
    CLOSED = auto()
    NOT_FOUND = auto()


@dataclass(frozen=True, slots=True)
class IfEpoch:
    """Grant the claim if the client names the epoch of the record; else refuse with CONFLICT."""

    claim: Claim


_AS_START: dict[Situation, Claim | Refusal | IfEpoch] = {
    Situation.MINE_CLOSED: Refusal.CLOSED,
    Situation.THEIRS_CLOSED: IfEpoch(Claim.CREATE),
    Situation.UNKNOWN: IfEpoch(Claim.CREATE),
}

TABLE: dict[int, dict[Situation, Claim | Refusal | IfEpoch]] = {
    OpenMode.RESUME: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: Refusal.FENCED,
        Situation.MINE_CLOSED: Refusal.CLOSED,
        Situation.THEIRS_CLOSED: Refusal.NOT_FOUND,
        Situation.UNKNOWN: Refusal.NOT_FOUND,
    },
    OpenMode.START: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: Refusal.EXISTS,
        **_AS_START,
    },
    OpenMode.TAKEOVER: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: IfEpoch(Claim.TAKE),
        Situation.MINE_CLOSED: Refusal.CLOSED,
        Situation.THEIRS_CLOSED: Refusal.NOT_FOUND,
        Situation.UNKNOWN: Refusal.NOT_FOUND,
    },
    OpenMode.START_OR_RESUME: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: IfEpoch(Claim.TAKE),
        **_AS_START,
    },
    OpenMode.RESTART: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: IfEpoch(Claim.WIPE),
        **_AS_START,
    },
}

# Callers without a writer cannot be told apart, and never retry an open. Where the table
# would answer a writer's retry, an anonymous caller gets what its mode says instead.
_ANONYMOUS: dict[tuple[int, Situation], Claim | Refusal | IfEpoch] = {
    (OpenMode.START, Situation.MINE): Refusal.EXISTS,
    (OpenMode.RESTART, Situation.MINE): Claim.WIPE,
    (OpenMode.START, Situation.MINE_CLOSED): Claim.CREATE,
    (OpenMode.START_OR_RESUME, Situation.MINE_CLOSED): Claim.CREATE,
    (OpenMode.RESTART, Situation.MINE_CLOSED): Claim.CREATE,
    (OpenMode.RESUME, Situation.MINE_CLOSED): Refusal.CLOSED,
}


def decide(record: Record | None, request: OpenRequest) -> Claim:
    """The claim that `request` is granted when the store holds `record`.

    Raises the LaneError that tells the client why it is refused.
    """
    situation = _situation(record, request.writer)
    is_same_writer = situation in (Situation.MINE, Situation.MINE_CLOSED)
    if record is not None and is_same_writer and request.attempt < record.attempt:
        raise StaleError(
            f"sequence {request.sequence_id!r}: attempt {request.attempt} comes after attempt "
            f"{record.attempt} of the same writer; raise the attempt with each open"
        )
    entry = TABLE[request.mode][situation]
    if not request.writer:
        entry = _ANONYMOUS.get((request.mode, situation), entry)
    if isinstance(entry, Refusal):
        raise _refuse(entry, request.sequence_id, record)
    if isinstance(entry, IfEpoch):
        epoch = record.epoch if record is not None else 0
        if request.expected_epoch != epoch and not _is_anonymous_restart(record, request):
            raise ConflictError(
                f"sequence {request.sequence_id!r} is at epoch {epoch}, not "
                f"{request.expected_epoch}; ask again with expected_epoch {epoch}",
                epoch=epoch,
            )
        return entry.claim
    return entry


def _situation(record: Record | None, writer: bytes) -> Situation:
    if record is None:
        return Situation.UNKNOWN
    if record.writer == writer:
        return Situation.MINE if record.is_alive else Situation.MINE_CLOSED
    return Situation.THEIRS if record.is_alive else Situation.THEIRS_CLOSED


def _is_anonymous_restart(record: Record | None, request: OpenRequest) -> bool:
    """True for a caller without a writer at a closed id: no late retry can be confused with it."""
    return not request.writer and record is not None and not record.is_alive


def _refuse(refusal: Refusal, sequence_id: str, record: Record | None) -> LaneError:
    match refusal:
        case Refusal.FENCED:
            return FencedError(
                f"sequence {sequence_id!r} belongs to another writer now; "
                "open it with TAKEOVER to go on with its state"
            )
        case Refusal.EXISTS:
            return ExistsError(
                f"sequence {sequence_id!r} is alive; choose another id, close it first, or open "
                "it with START_OR_RESUME, RESTART or TAKEOVER"
            )
        case Refusal.CLOSED:
            ending = record.ending if record is not None else ""
            return SequenceClosedError(
                f"sequence {sequence_id!r} has ended ({ending}); start it again with a new handle"
            )
        case Refusal.NOT_FOUND:
            return NotFoundError(f"sequence {sequence_id!r} is not alive here; open it with START")
