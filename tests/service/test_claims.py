"""Who may open a sequence: the table of the protocol, written here once more."""

import itertools

import pytest

from sluice_protos import sequences_pb2 as wire
from sluice_service.errors import (
    ConflictError,
    ExistsError,
    FencedError,
    NotFoundError,
    SequenceClosedError,
    StaleError,
)
from sluice_service.store.claims import Claim, Durability, OpenMode, OpenRequest, Record, decide

EPOCH = 7

# What the opener finds: a record of its own or another's, alive or closed, or none.
FOUND = ("mine alive", "theirs alive", "mine closed", "theirs closed", "unknown")

# The words of docs/protocol.md, row by row. "if" asks for the epoch of the record.
TABLE = {
    OpenMode.RESUME: ("resume", "fenced", "closed", "not found", "not found"),
    OpenMode.START: ("resume", "exists", "closed", "create if", "create if"),
    OpenMode.TAKEOVER: ("resume", "take if", "closed", "not found", "not found"),
    OpenMode.START_OR_RESUME: ("resume", "take if", "closed", "create if", "create if"),
    OpenMode.RESTART: ("resume", "wipe if", "closed", "create if", "create if"),
}
# Where an opener without a writer is answered otherwise, when the record has none either.
ANONYMOUS = {
    (OpenMode.START, "mine alive"): "exists",
    (OpenMode.RESTART, "mine alive"): "wipe",
    (OpenMode.START, "mine closed"): "create",
    (OpenMode.START_OR_RESUME, "mine closed"): "create",
    (OpenMode.RESTART, "mine closed"): "create",
}
# Over an id that another has closed, an opener without a writer needs no epoch.
FREE = {
    (mode, "theirs closed"): "create"
    for mode in (OpenMode.START, OpenMode.START_OR_RESUME, OpenMode.RESTART)
}

CLAIMS = {
    "resume": Claim.RESUME,
    "create": Claim.CREATE,
    "take": Claim.TAKE,
    "wipe": Claim.WIPE,
}
REFUSALS = {
    "fenced": FencedError,
    "exists": ExistsError,
    "closed": SequenceClosedError,
    "not found": NotFoundError,
}


def _record(found: str, writer: bytes) -> Record | None:
    if found == "unknown":
        return None
    whose, state = found.split()
    owner = writer if whose == "mine" else b"somebody else"
    return Record(owner, 3, EPOCH, is_alive=state == "alive", ending="it was idle")


def _expect(answer: str, record: Record | None, request: OpenRequest) -> None:
    before = repr(record)
    word, needs_epoch, _ = answer.partition(" if")
    epoch = record.epoch if record is not None else 0
    if answer in REFUSALS:
        with pytest.raises(REFUSALS[answer]):
            decide(record, request)
    elif needs_epoch and request.expected_epoch != epoch:
        with pytest.raises(ConflictError, match=f"expected_epoch {epoch}") as caught:
            decide(record, request)
        assert caught.value.epoch == epoch
    else:
        assert decide(record, request) is CLAIMS[word]
    assert repr(record) == before  # to decide is not to do


CASES = list(itertools.product(TABLE, FOUND))
EPOCHS = (0, EPOCH - 1, EPOCH, EPOCH + 1)


@pytest.mark.parametrize("expected_epoch", EPOCHS)
@pytest.mark.parametrize(("mode", "found"), CASES)
def test_an_open_of_a_writer_is_answered_as_the_table_says(mode, found, expected_epoch) -> None:
    request = OpenRequest(
        sequence_id="s", mode=mode, writer=b"me", attempt=3, expected_epoch=expected_epoch
    )
    _expect(TABLE[mode][FOUND.index(found)], _record(found, b"me"), request)


@pytest.mark.parametrize("expected_epoch", EPOCHS)
@pytest.mark.parametrize(("mode", "found"), CASES)
def test_an_open_without_a_writer_is_answered_as_the_table_says(
    mode, found, expected_epoch
) -> None:
    request = OpenRequest(sequence_id="s", mode=mode, attempt=3, expected_epoch=expected_epoch)
    answer = {**ANONYMOUS, **FREE}.get((mode, found), TABLE[mode][FOUND.index(found)])
    _expect(answer, _record(found, b""), request)


def test_the_table_has_every_mode_there_is() -> None:
    assert set(TABLE) == set(OpenMode)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(OpenMode, wire.OpenMode), (Durability, wire.Durability)]
)
def test_names_and_numbers_are_those_of_the_wire(ours, theirs) -> None:
    assert {one.name: one.value for one in ours} == dict(theirs.items())


@pytest.mark.parametrize("mode", TABLE)
@pytest.mark.parametrize("found", ["mine alive", "mine closed"])
def test_a_lower_attempt_of_the_same_writer_is_stale_whatever_it_asks(mode, found) -> None:
    request = OpenRequest(sequence_id="s", mode=mode, writer=b"me", attempt=2)
    with pytest.raises(StaleError, match="attempt 2 comes after attempt 3"):
        decide(_record(found, b"me"), request)


@pytest.mark.parametrize("attempt", [3, 4])
def test_an_attempt_may_come_twice_and_rise(attempt) -> None:
    request = OpenRequest(sequence_id="s", mode=OpenMode.RESUME, writer=b"me", attempt=attempt)
    assert decide(_record("mine alive", b"me"), request) is Claim.RESUME


def test_attempts_of_another_writer_do_not_count() -> None:
    request = OpenRequest(
        sequence_id="s", mode=OpenMode.TAKEOVER, writer=b"me", expected_epoch=EPOCH
    )
    assert decide(_record("theirs alive", b"me"), request) is Claim.TAKE


def test_a_closed_sequence_tells_its_writer_why() -> None:
    request = OpenRequest(sequence_id="s", mode=OpenMode.RESUME, writer=b"me", attempt=3)
    with pytest.raises(SequenceClosedError, match="it was idle"):
        decide(_record("mine closed", b"me"), request)
