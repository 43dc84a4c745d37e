"""What every store must do, rule by rule."""

import asyncio

import pytest

from sluice_service.errors import (
    ConflictError,
    FencedError,
    NotFoundError,
    SequenceClosedError,
    StaleError,
)
from sluice_service.store import Closing, Key, Packed, Store, Stored, Verdict, Write
from sluice_service.store.claims import Claim, OpenMode
from tests.service.store.places import (
    RECORD_SECONDS,
    TOMBSTONE_SECONDS,
    Place,
    ask,
    claim,
    key,
    refuse,
    write,
)

DONE, REFUSED = Verdict.DONE, Verdict.REFUSED


async def close(store: Store, claim_id: bytes, ending: str = "its client ended it") -> Verdict:
    (verdict,) = await store.close([Closing(key(), claim_id, ending)])
    return verdict


async def renew(store: Store, claim_id: bytes) -> Verdict:
    (verdict,) = await store.renew_leases([(key(), claim_id)])
    return verdict


async def data(store: Store) -> bytes:
    found = await store.read(key())
    assert found is not None
    return found.checkpoint.data


# A claim is one atomic operation, and returns the record.


async def test_a_new_sequence_begins_with_its_initial_checkpoint(store) -> None:
    request = ask()
    granted = await claim(store, request)
    assert granted.claim is Claim.CREATE
    assert granted.claim_id == request.claim_id
    assert granted.checkpoint == request.initial
    assert (granted.is_held, granted.previous) == (False, b"")
    assert await store.read(key()) == Stored(key(), granted.epoch, request.initial)


async def test_a_resume_returns_what_was_written_last(store) -> None:
    first = await claim(store, ask())
    assert await write(store, first.claim_id, 5, b"five") is DONE
    granted = await claim(store, ask(mode=OpenMode.RESUME))
    assert granted.claim is Claim.RESUME
    assert granted.checkpoint == Packed(5, b"five")
    assert granted.previous == first.claim_id


async def test_a_resume_leaves_the_initial_checkpoint_of_its_request_alone(store) -> None:
    await claim(store, ask())
    granted = await claim(store, ask(initial=Packed(9, b"another")))
    assert granted.claim is Claim.RESUME
    assert granted.checkpoint == Packed(0, b"initial")


async def test_many_sequences_are_claimed_in_one_call_and_answered_in_order(store) -> None:
    requests = [ask(f"s{number}", initial=Packed(number, b"%d" % number)) for number in range(600)]
    await claim(store, ask("s7", writer=b"another"))
    answers = await store.claim(requests)
    assert [type(answer).__name__ for answer in answers].count("Granted") == 599
    assert type(answers[7]).__name__ == "ExistsError"
    for number in (0, 6, 8, 599):
        assert answers[number].checkpoint == requests[number].initial
        assert answers[number].claim_id == requests[number].claim_id
    assert len({answer.epoch for answer in answers}) == 600


async def test_calls_about_nothing_answer_nothing(store) -> None:
    assert await store.claim([]) == []
    assert await store.write([]) == []
    assert await store.close([]) == []
    assert await store.renew_leases([]) == []
    assert await store.read(key()) is None
    assert [found async for found in store.stored("m")] == []


# Claim ids and epochs.


async def test_each_claim_has_a_name_of_its_own(store) -> None:
    names = {(await claim(store, ask())).claim_id for _ in range(10)}
    assert len(names) == 10


async def test_the_epoch_stays_while_the_same_process_and_writer_go_on(store) -> None:
    first = await claim(store, ask())
    again = await claim(store, ask(mode=OpenMode.RESUME, held=first.claim_id))
    assert again.is_held
    assert again.epoch == first.epoch


async def test_the_epoch_rises_when_another_process_owned_the_record(store) -> None:
    first = await claim(store, ask())
    other = await claim(store, ask(mode=OpenMode.RESUME))
    assert not other.is_held
    assert other.epoch > first.epoch
    # The first process still has it in memory, and has lost it all the same.
    back = await claim(store, ask(mode=OpenMode.RESUME, held=first.claim_id))
    assert not back.is_held
    assert back.epoch > other.epoch


async def test_the_epoch_rises_when_the_writer_changes_on_the_same_server(store) -> None:
    first = await claim(store, ask())
    taken = await claim(
        store, ask(mode=OpenMode.TAKEOVER, writer=b"you", epoch=first.epoch, held=first.claim_id)
    )
    assert taken.claim is Claim.TAKE
    assert taken.is_held
    assert taken.epoch > first.epoch
    assert isinstance(await refuse(store, ask(mode=OpenMode.RESUME)), FencedError)


async def test_the_epoch_rises_on_a_restart(store) -> None:
    first = await claim(store, ask())
    await write(store, first.claim_id, 5, b"five")
    wiped = await claim(
        store,
        ask(mode=OpenMode.RESTART, writer=b"you", epoch=first.epoch, held=first.claim_id),
    )
    assert wiped.claim is Claim.WIPE
    assert wiped.epoch > first.epoch
    assert wiped.checkpoint == Packed(0, b"initial")
    assert await write(store, wiped.claim_id, 1, b"one") is DONE
    assert await data(store) == b"one"


async def test_no_epoch_is_given_twice_across_sequences(store) -> None:
    epochs = [(await claim(store, ask(f"s{number}"))).epoch for number in range(5)]
    assert len(set(epochs)) == 5
    assert min(epochs) > 0


async def test_a_claim_that_is_asked_again_is_answered_the_same(store) -> None:
    first = await claim(store, ask())
    await write(store, first.claim_id, 5, b"five")
    for request in (
        ask(mode=OpenMode.RESUME, held=first.claim_id),
        ask(mode=OpenMode.RESUME),
        ask(mode=OpenMode.TAKEOVER, writer=b"you", epoch=(await store.read(key())).epoch + 1),
        ask("new", OpenMode.START_OR_RESUME),
    ):
        granted = await claim(store, request)
        assert await claim(store, request) == granted


async def test_a_claim_that_is_asked_again_too_late_is_decided_anew(store) -> None:
    request = ask(mode=OpenMode.START, writer=b"me")
    first = await claim(store, request)
    await claim(store, ask(mode=OpenMode.TAKEOVER, writer=b"you", epoch=first.epoch))
    (answer,) = await store.claim([request])
    assert type(answer).__name__ == "ExistsError"


# Who may write.


async def test_a_newer_checkpoint_is_written(store) -> None:
    granted = await claim(store, ask())
    assert await write(store, granted.claim_id, 3, b"three") is DONE
    assert await store.read(key()) == Stored(key(), granted.epoch, Packed(3, b"three"))


async def test_an_older_checkpoint_is_durable_already_and_changes_nothing(store) -> None:
    granted = await claim(store, ask())
    await write(store, granted.claim_id, 5, b"five")
    assert await write(store, granted.claim_id, 4, b"four") is DONE
    assert await data(store) == b"five"


async def test_a_checkpoint_at_the_same_step_replaces_the_one_there(store) -> None:
    granted = await claim(store, ask())
    await write(store, granted.claim_id, 5, b"with outputs held")
    assert await write(store, granted.claim_id, 5, b"clean") is DONE
    assert await data(store) == b"clean"


async def test_steps_are_compared_as_numbers(store) -> None:
    granted = await claim(store, ask())
    await write(store, granted.claim_id, 9, b"nine")
    await write(store, granted.claim_id, 10, b"ten")
    assert await data(store) == b"ten"
    await write(store, granted.claim_id, 2**52, b"many")
    await write(store, granted.claim_id, 2**52 - 1, b"one less")
    assert await data(store) == b"many"


async def test_a_write_under_an_earlier_claim_is_refused(store) -> None:
    first = await claim(store, ask())
    second = await claim(store, ask(mode=OpenMode.RESUME))
    assert await write(store, first.claim_id, 7, b"late") is REFUSED
    assert await write(store, second.claim_id, 1, b"one") is DONE
    assert await data(store) == b"one"


async def test_an_empty_claim_id_writes_nothing(store) -> None:
    await claim(store, ask())
    assert await write(store, b"", 7, b"whose") is REFUSED
    assert await data(store) == b"initial"


async def test_of_many_writes_each_has_its_own_verdict(store) -> None:
    granted = await store.claim([ask(f"s{number}") for number in range(700)])
    await store.claim([ask(f"s{number}", OpenMode.RESUME) for number in range(0, 700, 3)])
    writes = [
        Write(key(f"s{number}"), answer.claim_id, Packed(number + 1, b"%d" % number))
        for number, answer in enumerate(granted)
    ]
    verdicts = await store.write(writes)
    assert verdicts == [DONE if number % 3 else REFUSED for number in range(700)]
    for number in (0, 1, 698, 699):
        found = await store.read(key(f"s{number}"))
        assert found.checkpoint.data == (b"%d" % number if number % 3 else b"initial")


async def test_any_bytes_and_any_names_come_back_as_they_were(store) -> None:
    everything = bytes(range(256)) * 3
    for name in ("a:b", "a", "ö\x00☃", "%3A", "'; DROP TABLE sequences", "x" * 512):
        request = ask(name, writer=bytes(range(255, -1, -1)), initial=Packed(0, everything))
        granted = await claim(store, request)
        assert granted.checkpoint.data == everything
        assert await write(store, granted.claim_id, 1, everything[::-1], name) is DONE
        assert (
            await claim(store, ask(name, OpenMode.RESUME, request.open.writer))
        ).checkpoint == Packed(1, everything[::-1])


async def test_the_same_id_of_two_models_names_two_sequences(store) -> None:
    for model, name in (("a", "b:c"), ("a:b", "c"), ("a", "c"), ("b", "c")):
        request = ask(name)
        request = type(request)(Key(model, name), request.open, Packed(0, model.encode()))
        assert (await claim(store, request)).claim is Claim.CREATE
    assert (await store.read(Key("a:b", "c"))).checkpoint.data == b"a:b"
    assert {found.key.sequence_id async for found in store.stored("a")} == {"b:c", "c"}


async def test_an_attempt_of_64_bits_is_kept(store) -> None:
    last = 2**64 - 1
    await claim(store, ask(attempt=last))
    assert isinstance(await refuse(store, ask(mode=OpenMode.RESUME, attempt=last - 1)), StaleError)
    await claim(store, ask(mode=OpenMode.RESUME, attempt=last))


# Only claims create records.


async def test_a_write_never_brings_a_closed_sequence_back(store) -> None:
    granted = await claim(store, ask())
    await close(store, granted.claim_id)
    assert await write(store, granted.claim_id, 9, b"late") is REFUSED
    assert await renew(store, granted.claim_id) is REFUSED
    assert await store.read(key()) is None


async def test_a_write_never_makes_a_sequence(store) -> None:
    assert await write(store, b"0123456789abcdef", 9, b"never claimed") is REFUSED
    assert await store.read(key()) is None
    assert isinstance(await refuse(store, ask(mode=OpenMode.RESUME)), NotFoundError)


# The table of claims is tested in test_table.


# What a takeover continues from.


async def test_a_takeover_goes_on_from_the_memory_of_the_process_that_owns_it(store) -> None:
    first = await claim(store, ask())
    await write(store, first.claim_id, 5, b"five")
    taken = await claim(
        store,
        ask(
            mode=OpenMode.TAKEOVER,
            writer=b"you",
            epoch=first.epoch,
            held=first.claim_id,
            snapshot=Packed(7, b"seven"),
        ),
    )
    assert taken.is_held
    assert taken.checkpoint == Packed(7, b"seven")
    assert await data(store) == b"seven"


async def test_a_takeover_never_goes_on_from_memory_that_is_behind_the_record(store) -> None:
    first = await claim(store, ask())
    await write(store, first.claim_id, 5, b"five")
    taken = await claim(
        store,
        ask(
            mode=OpenMode.TAKEOVER,
            writer=b"you",
            epoch=first.epoch,
            held=first.claim_id,
            snapshot=Packed(4, b"four"),
        ),
    )
    assert not taken.is_held
    assert taken.checkpoint == Packed(5, b"five")
    assert await data(store) == b"five"


async def test_a_takeover_never_goes_on_from_the_memory_of_a_former_owner(store) -> None:
    first = await claim(store, ask())
    second = await claim(store, ask(mode=OpenMode.RESUME))
    await write(store, second.claim_id, 5, b"five")
    taken = await claim(
        store,
        ask(
            mode=OpenMode.TAKEOVER,
            writer=b"you",
            epoch=second.epoch,
            held=first.claim_id,
            snapshot=Packed(9, b"a fork"),
        ),
    )
    assert not taken.is_held
    assert taken.checkpoint == Packed(5, b"five")


async def test_a_resume_does_not_write_the_snapshot(store) -> None:
    first = await claim(store, ask())
    again = await claim(
        store, ask(mode=OpenMode.RESUME, held=first.claim_id, snapshot=Packed(3, b"in memory"))
    )
    assert again.is_held
    assert again.checkpoint == Packed(0, b"initial")


# Closing, and tombstones.


async def test_a_closed_sequence_leaves_a_tombstone_that_tells_why(store) -> None:
    granted = await claim(store, ask())
    assert await close(store, granted.claim_id, "it was idle for an hour") is DONE
    assert await store.read(key()) is None
    error = await refuse(store, ask(mode=OpenMode.RESUME))
    assert isinstance(error, SequenceClosedError)
    assert "it was idle for an hour" in str(error)
    error = await refuse(store, ask(writer=b"you"))
    assert isinstance(error, ConflictError)
    assert error.epoch == granted.epoch


async def test_a_close_under_an_earlier_claim_is_refused(store) -> None:
    first = await claim(store, ask())
    second = await claim(store, ask(mode=OpenMode.RESUME))
    assert await close(store, first.claim_id) is REFUSED
    assert await write(store, second.claim_id, 1, b"one") is DONE


async def test_an_operator_closes_a_sequence_whoever_owns_it(store) -> None:
    granted = await claim(store, ask())
    assert await close(store, b"") is DONE
    assert await write(store, granted.claim_id, 1, b"one") is REFUSED
    assert await close(store, b"") is REFUSED


async def test_a_close_that_is_asked_again_is_answered_the_same(store) -> None:
    granted = await claim(store, ask())
    assert await close(store, granted.claim_id) is DONE
    assert await close(store, granted.claim_id) is DONE
    assert await close(store, b"another claim ..") is REFUSED


async def test_a_sequence_that_never_was_cannot_be_closed(store) -> None:
    assert await close(store, b"") is REFUSED
    assert await close(store, b"0123456789abcdef") is REFUSED


async def test_a_sequence_begins_again_over_its_tombstone(store) -> None:
    first = await claim(store, ask())
    await write(store, first.claim_id, 5, b"five")
    await close(store, first.claim_id)
    again = await claim(store, ask(writer=b"you", epoch=first.epoch))
    assert again.claim is Claim.CREATE
    assert again.epoch > first.epoch
    assert again.previous == first.claim_id
    assert again.checkpoint == Packed(0, b"initial")
    assert await close(store, first.claim_id) is REFUSED
    assert await write(store, again.claim_id, 1, b"one") is DONE


async def test_the_same_id_begins_again_without_the_reason_of_its_former_end(store) -> None:
    first = await claim(store, ask())
    await close(store, first.claim_id, "the first reason")
    again = await claim(store, ask(writer=b"you", epoch=first.epoch))
    await close(store, again.claim_id, "")
    error = await refuse(store, ask(mode=OpenMode.RESUME, writer=b"you"))
    assert "the first reason" not in str(error)


# A record is read and written whole.


async def test_nobody_ever_reads_half_a_checkpoint(place: Place) -> None:
    """Step and bytes belong together, whatever is written meanwhile."""
    writer, reader = await place.open(), await place.open()
    granted = await claim(writer, ask())
    stop, seen = asyncio.Event(), set[int]()

    async def read() -> None:
        while not stop.is_set():
            found = await reader.read(key())
            assert found.checkpoint.data in (b"initial", b"%d" % found.checkpoint.step * 500)
            seen.add(found.checkpoint.step)
            await asyncio.sleep(0)

    reading, step = asyncio.create_task(read()), 0
    # However slow the reader is, it reads in the middle of it.
    while not reading.done() and (step < 150 or len(seen) < 2):
        step += 1
        assert await write(writer, granted.claim_id, step, b"%d" % step * 500) is DONE
        await asyncio.sleep(0)
    stop.set()
    await reading


async def test_all_live_sequences_of_a_model_are_listed(store) -> None:
    granted = await store.claim([ask(f"s{number}") for number in range(1500)])
    await store.close([Closing(key(f"s{n}"), granted[n].claim_id, "x") for n in range(100)])
    await write(store, granted[200].claim_id, 8, b"eight", "s200")
    found = {each.key.sequence_id: each async for each in store.stored("m")}
    assert set(found) == {f"s{number}" for number in range(100, 1500)}
    assert found["s200"] == Stored(key("s200"), granted[200].epoch, Packed(8, b""))
    assert [each async for each in store.stored("another")] == []


# How long things live.


async def test_a_tombstone_is_forgotten_in_the_end(place, store) -> None:
    granted = await claim(store, ask())
    await close(store, granted.claim_id)
    await place.pass_time(TOMBSTONE_SECONDS * 0.9)
    assert isinstance(await refuse(store, ask(mode=OpenMode.RESUME)), SequenceClosedError)
    await place.pass_time(TOMBSTONE_SECONDS * 0.2)
    assert isinstance(await refuse(store, ask(mode=OpenMode.RESUME)), NotFoundError)
    again = await claim(store, ask())
    assert again.claim is Claim.CREATE
    assert again.epoch > granted.epoch


async def test_each_tombstone_has_its_own_time(place, store) -> None:
    first, second = await claim(store, ask("first")), await claim(store, ask("second"))
    for name, granted in (("first", first), ("second", second)):
        await store.close([Closing(key(name), granted.claim_id, "done")])
    await place.pass_time(TOMBSTONE_SECONDS * 0.5)
    again = await claim(store, ask("first", writer=b"you", epoch=first.epoch))
    await store.close([Closing(key("first"), again.claim_id, "done again")])
    await place.pass_time(TOMBSTONE_SECONDS * 0.7)
    assert isinstance(await refuse(store, ask("second", OpenMode.RESUME)), NotFoundError)
    assert isinstance(
        await refuse(store, ask("first", OpenMode.RESUME, b"you")), SequenceClosedError
    )


async def test_what_has_ended_takes_no_room_in_the_end(shared_place) -> None:
    store = await shared_place.open(tombstone_seconds=0.2)
    granted = await claim(store, ask())
    await claim(store, ask("alive"))
    assert shared_place.count() == (2, 2)
    await close(store, granted.claim_id)
    # The tombstone may be gone already; the checkpoint is for sure.
    assert shared_place.count()[1] == 1
    await shared_place.pass_time(1)
    for _ in range(2000):  # the store clears away when it likes
        if shared_place.count() == (1, 1):
            break
        await asyncio.sleep(0.02)
    assert shared_place.count() == (1, 1)
    assert await store.read(key("alive")) is not None


async def test_a_sequence_that_nobody_renews_is_dropped(place, store) -> None:
    granted = await claim(store, ask())
    await place.pass_time(RECORD_SECONDS * 1.1)
    assert await store.read(key()) is None
    assert await write(store, granted.claim_id, 1, b"one") is REFUSED
    assert await renew(store, granted.claim_id) is REFUSED
    assert await close(store, granted.claim_id) is REFUSED
    assert [found async for found in store.stored("m")] == []
    assert isinstance(await refuse(store, ask(mode=OpenMode.RESUME)), NotFoundError)
    assert (await claim(store, ask())).epoch > granted.epoch


async def test_a_sequence_that_is_renewed_lives_on(place, store) -> None:
    granted = await claim(store, ask())
    await claim(store, ask("forgotten"))
    for _ in range(3):
        await place.pass_time(RECORD_SECONDS / 2)
        assert await renew(store, granted.claim_id) is DONE
    assert await data(store) == b"initial"
    assert await store.read(key("forgotten")) is None


async def test_a_claim_renews_and_a_stranger_does_not(place, store) -> None:
    await claim(store, ask())
    await place.pass_time(RECORD_SECONDS * 0.75)
    granted = await claim(store, ask(mode=OpenMode.RESUME))
    assert await renew(store, b"another claim ..") is REFUSED
    await place.pass_time(RECORD_SECONDS * 0.75)
    assert await write(store, granted.claim_id, 1, b"one") is DONE


@pytest.mark.parametrize("seconds", [1e9, -1e9])
async def test_a_clock_that_jumps_drops_no_live_sequence(place, store, seconds) -> None:
    granted = await claim(store, ask())
    await place.jump(seconds)
    assert await write(store, granted.claim_id, 1, b"one") is DONE
    assert await renew(store, granted.claim_id) is DONE
    # And time goes on from there.
    await place.pass_time(RECORD_SECONDS * 1.1)
    assert await store.read(key()) is None


async def test_a_clock_that_jumps_keeps_the_tombstones_too(place, store) -> None:
    granted = await claim(store, ask())
    await close(store, granted.claim_id)
    await place.jump(1e9)
    assert isinstance(await refuse(store, ask(mode=OpenMode.START)), SequenceClosedError)
