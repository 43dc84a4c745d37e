"""Several processes with one store: the store alone decides whose a sequence is."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence

from sluice_service.errors import SequenceClosedError
from sluice_service.store import Closing, Granted, Packed, Verdict
from sluice_service.store.claims import OpenMode
from tests.service.store.child import SEQUENCES
from tests.service.store.places import (
    Place,
    RedisPlace,
    SqlitePlace,
    ask,
    claim,
    key,
    take_over,
    write,
)

WAIT_SECONDS = 100


def url_of(place: Place) -> str:
    if isinstance(place, SqlitePlace):
        return f"sqlite:///{place.path}"
    assert isinstance(place, RedisPlace)
    return place.url


def start(command: str, url: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.service.store.child", command, url, *words],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def test_what_one_handle_writes_another_reads(shared_place) -> None:
    first, second = await shared_place.open(), await shared_place.open()
    granted = await claim(first, ask())
    await write(first, granted.claim_id, 5, b"five")
    assert (await second.read(key())).checkpoint.data == b"five"
    moved = await claim(second, ask(mode=OpenMode.RESUME))
    assert moved.checkpoint.data == b"five"
    assert moved.epoch > granted.epoch
    assert await write(first, granted.claim_id, 6, b"six") is Verdict.REFUSED
    assert await write(second, moved.claim_id, 6, b"six") is Verdict.DONE


async def test_of_many_that_start_one_id_at_once_exactly_one_is_granted(shared_place) -> None:
    handles = [await shared_place.open() for _ in range(4)]
    answers: Sequence = await asyncio.gather(
        *(
            handle.claim([ask("s", OpenMode.START, b"%d of %d" % (turn, number))])
            for turn in range(5)
            for number, handle in enumerate(handles)
        )
    )
    granted = [answer for (answer,) in answers if isinstance(answer, Granted)]
    assert len(granted) == 1
    assert await write(handles[0], granted[0].claim_id, 1, b"one") is Verdict.DONE


async def test_of_many_that_take_one_sequence_over_the_last_one_owns_it(shared_place) -> None:
    handles = [await shared_place.open() for _ in range(3)]
    await claim(handles[0], ask())
    granted = await asyncio.gather(
        *(
            take_over(handle, "s", b"%d of %d" % (turn, number))
            for turn in range(8)
            for number, handle in enumerate(handles)
        )
    )
    assert len({each.epoch for each in granted}) == 24
    last = max(granted, key=lambda each: each.epoch)
    assert (await handles[0].read(key())).epoch == last.epoch
    verdicts = [await write(handles[1], each.claim_id, 1, b"one") for each in granted]
    assert verdicts == [Verdict.DONE if each is last else Verdict.REFUSED for each in granted]
    # Each went on from the one before: nobody was forgotten on the way.
    order = sorted(granted, key=lambda each: each.epoch)
    assert [each.previous for each in order[1:]] == [each.claim_id for each in order[:-1]]


async def test_a_close_that_comes_between_is_not_undone_by_a_claim(shared_place) -> None:
    first, second = await shared_place.open(), await shared_place.open()
    for turn in range(20):
        name = f"s{turn}"
        await claim(first, ask(name))
        closing = Closing(key(name), b"", "closed from outside")
        (answer,), closed = await asyncio.gather(
            first.claim([ask(name, OpenMode.RESUME)]), second.close([closing])
        )
        assert closed == [Verdict.DONE]
        assert isinstance(answer, Granted | SequenceClosedError)
        assert await first.read(key(name)) is None


async def test_a_write_that_comes_between_is_not_undone_by_a_takeover(shared_place) -> None:
    store = await shared_place.open()
    for turn in range(20):
        name = f"s{turn}"
        owned = await claim(store, ask(name))
        request = ask(
            *(name, OpenMode.TAKEOVER, b"you"),
            epoch=owned.epoch,
            held=owned.claim_id,
            snapshot=Packed(5, b"five"),
        )
        taken, verdict = await asyncio.gather(
            claim(store, request), write(store, owned.claim_id, 7, b"seven", name)
        )
        seen = (taken.checkpoint.step, taken.is_held, verdict)
        assert seen in ((7, False, Verdict.DONE), (5, True, Verdict.REFUSED))


async def test_processes_that_share_a_store_never_get_the_same_epoch(shared_place) -> None:
    handle = await shared_place.open()
    for number in range(SEQUENCES):
        await claim(handle, ask(f"s{number}"))
    times = 6
    children = [start("claim", url_of(shared_place), f"child {n}", str(times)) for n in range(2)]
    for child in children:
        assert child.stdout.readline() == "started\n", child.stderr.read()
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    lines = []
    for child in children:
        said, complaints = await asyncio.to_thread(child.communicate, timeout=WAIT_SECONDS)
        assert child.returncode == 0, complaints
        lines += said.splitlines()
    assert len(lines) == 2 * times * SEQUENCES
    assert len({line.split()[1] for line in lines}) == len(lines)
    # Whoever owned a sequence wrote one step; whoever had lost it wrote none.
    done = sum(line.endswith("DONE") for line in lines)
    steps = [(await handle.read(key(f"s{number}"))).checkpoint.step for number in range(SEQUENCES)]
    assert sum(steps) == done > 0


async def test_processes_that_open_a_new_file_at_once_all_get_it(tmp_path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    children = [start("claim", url, f"child {n}", "0") for n in range(4)]
    for child in children:
        _, complaints = await asyncio.to_thread(child.communicate, "go\n", timeout=WAIT_SECONDS)
        assert child.returncode == 0, complaints
