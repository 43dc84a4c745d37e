"""Who may open a sequence: one table, without memory, clock or I/O of its own."""

from dataclasses import dataclass
from enum import Enum, auto

from sluice_protos.sequences_pb2 import (
    RESTART,
    RESUME,
    START,
    START_OR_RESUME,
    TAKEOVER,
    OpenSequence,
)
from sluice_service.errors import (
    ConflictError,
    ExistsError,
    FencedError,
    LaneError,
    NotFoundError,
    SequenceClosedError,
    StaleError,
)


@dataclass(slots=True)
class Record:
    """What is known of a sequence's owner: alive, or a tombstone of a closed one."""

    writer: bytes
    attempt: int
    epoch: int
    is_alive: bool
    # Of a tombstone: why the sequence ended, in words for its writer.
    ending: str = ""


class Situation(Enum):
    """What an open finds."""

    MINE = auto()  # alive, same writer
    THEIRS = auto()  # alive, other writer
    MINE_CLOSED = auto()
    THEIRS_CLOSED = auto()
    UNKNOWN = auto()


class Claim(Enum):
    """What an open is given."""

    RESUME = auto()  # go on; epoch unchanged
    CREATE = auto()  # a new sequence
    TAKE = auto()  # go on under a new writer and a raised epoch
    WIPE = auto()  # from the initial state, under a raised epoch


class Refusal(Enum):
    """Why an open is given nothing."""

    FENCED = auto()
    EXISTS = auto()
    CLOSED = auto()
    NOT_FOUND = auto()


@dataclass(frozen=True, slots=True)
class IfEpoch:
    """The claim, if the client expects the epoch the record has; else CONFLICT."""

    claim: Claim


_AS_START: dict[Situation, Claim | Refusal | IfEpoch] = {
    Situation.MINE_CLOSED: Refusal.CLOSED,
    Situation.THEIRS_CLOSED: IfEpoch(Claim.CREATE),
    Situation.UNKNOWN: IfEpoch(Claim.CREATE),
}

TABLE: dict[int, dict[Situation, Claim | Refusal | IfEpoch]] = {
    RESUME: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: Refusal.FENCED,
        Situation.MINE_CLOSED: Refusal.CLOSED,
        Situation.THEIRS_CLOSED: Refusal.NOT_FOUND,
        Situation.UNKNOWN: Refusal.NOT_FOUND,
    },
    START: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: Refusal.EXISTS,
        **_AS_START,
    },
    TAKEOVER: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: IfEpoch(Claim.TAKE),
        Situation.MINE_CLOSED: Refusal.CLOSED,
        Situation.THEIRS_CLOSED: Refusal.NOT_FOUND,
        Situation.UNKNOWN: Refusal.NOT_FOUND,
    },
    START_OR_RESUME: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: IfEpoch(Claim.TAKE),
        **_AS_START,
    },
    RESTART: {
        Situation.MINE: Claim.RESUME,
        Situation.THEIRS: IfEpoch(Claim.WIPE),
        **_AS_START,
    },
}

# A caller without a writer cannot be told from another one, and never repeats an
# open: where a writer's repeat is answered, it gets what its mode says instead.
_ANONYMOUS: dict[tuple[int, Situation], Claim | Refusal | IfEpoch] = {
    (START, Situation.MINE): Refusal.EXISTS,
    (RESTART, Situation.MINE): Claim.WIPE,
    (START, Situation.MINE_CLOSED): Claim.CREATE,
    (START_OR_RESUME, Situation.MINE_CLOSED): Claim.CREATE,
    (RESTART, Situation.MINE_CLOSED): Claim.CREATE,
    (RESUME, Situation.MINE_CLOSED): Refusal.CLOSED,
}


def decide(record: Record | None, request: OpenSequence) -> Claim:
    """What `request` is given, when the store holds `record`.

    Raises the LaneError that tells the client why it is given nothing.
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
        if request.expected_epoch != epoch and not _is_free(record, request):
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


def _is_free(record: Record | None, request: OpenSequence) -> bool:
    """True for a caller without a writer at a closed id: it has no repeats to fear."""
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
