"""Who may claim: the whole table of claims on each store, with what becomes of the record."""

import itertools

import pytest

from sluice_service.errors import (
    ConflictError,
    ExistsError,
    FencedError,
    LaneError,
    NotFoundError,
    SequenceClosedError,
)
from sluice_service.store import Closing, Granted, Packed, Stored
from sluice_service.store.claims import Claim
from tests.service.store.places import ask, claim, key, write
from tests.service.test_claims import FOUND, TABLE

REFUSALS: dict[str, type[LaneError]] = {
    "fenced": FencedError,
    "exists": ExistsError,
    "closed": SequenceClosedError,
    "not found": NotFoundError,
}
CLAIMS = {
    "resume": (Claim.RESUME, b"three"),
    "create": (Claim.CREATE, b"of the request"),
    "take": (Claim.TAKE, b"three"),
    "wipe": (Claim.WIPE, b"of the request"),
}


@pytest.mark.parametrize("mode", TABLE)
async def test_every_open_is_answered_as_the_table_says(store, mode) -> None:
    """All that an open may find, each with an epoch that is right and one that is not."""
    for found, is_right in itertools.product(FOUND, (True, False)):
        name = f"{found} {is_right}"
        epoch, claim_id = 0, b""
        if found != "unknown":
            whose, state = found.split()
            before = await claim(store, ask(name, writer=b"me" if whose == "mine" else b"you"))
            epoch, claim_id = before.epoch, before.claim_id
            await write(store, claim_id, 3, b"three", name)
            if state == "closed":
                await store.close([Closing(key(name), claim_id, "done")])
        stood = await store.read(key(name))
        request = ask(
            name, mode, epoch=epoch if is_right else epoch + 1, initial=Packed(0, b"of the request")
        )
        (answer,) = await store.claim([request])
        word, needs_epoch, _ = TABLE[mode][FOUND.index(found)].partition(" if")
        if word in REFUSALS:
            assert type(answer) is REFUSALS[word], name
        elif needs_epoch and not is_right:
            assert type(answer) is ConflictError, name
            assert answer.epoch == epoch
        else:
            assert isinstance(answer, Granted), name
            assert (answer.claim, answer.checkpoint.data) == CLAIMS[word], name
            assert answer.previous == claim_id
            assert answer.epoch > epoch  # nobody held it
            stood = Stored(key(name), answer.epoch, answer.checkpoint)
        assert await store.read(key(name)) == stood, name
