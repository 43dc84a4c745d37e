"""What was answered is there after kill -9, after a full disk, and after a store that was away."""

import asyncio
import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sluice_service.store import Packed, Store, StoreError, Verdict, Write, open_store
from sluice_service.store.claims import OpenMode
from sluice_service.store.sqlite import SqliteStore
from tests.chaos.processes import RedisProcess
from tests.service.store.child import content
from tests.service.store.places import PATIENCE, ask, claim, key, take_over, write
from tests.service.store.test_sharing import WAIT_SECONDS, start

_SECONDS = {"tombstone_seconds": 600.0, "record_seconds": 600.0}


@pytest.fixture
def redis_process(tmp_path: Path):
    """A Redis of this test's own, that has each command on the disk before it answers."""
    process = RedisProcess(tmp_path / "redis")
    process.start()
    yield process
    process.close()


@pytest.fixture
async def opened() -> AsyncIterator:
    """`await opened(url)`: a store that is stopped after the test."""
    stores = list[Store]()

    async def open_one(url: str) -> Store:
        store = open_store(url, **_SECONDS)
        await store.start()
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        await store.stop()


async def until_it_answers(store: Store, writes: list[Write]) -> list[Verdict]:
    """Ask until the store is back, as a host does."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                return await store.write(writes)
            except StoreError:
                await asyncio.sleep(0.05)


async def check_promises(store: Store, lines: list[str]) -> None:
    """Every line of a child's is true in the store."""
    promised = dict[str, int]()
    epochs = list[int]()
    for line in lines:
        word, name, number = line.split()
        if word == "claimed":
            epochs.append(int(number))
        else:
            promised[name] = max(int(number), promised.get(name, 0))
    assert promised
    assert len(set(epochs)) == len(epochs)
    for name, step in promised.items():
        found = await store.read(key(name))
        assert found is not None
        assert found.checkpoint.step >= step
        assert found.checkpoint.data == content(name, found.checkpoint.step)


def run_until_killed(url: str, lines: int) -> list[str]:
    """What a writing child said until it was killed in the middle of its work."""
    child = start("write", url)
    assert child.stdout.readline() == "started\n", child.stderr.read()
    said = [child.stdout.readline() for _ in range(lines)]
    child.send_signal(signal.SIGKILL)
    # What had been said and not read yet was promised too; the last line may be cut off.
    # `communicate` would pass by what the pipe's reader holds already, and begin in mid-line.
    with child:
        said += child.stdout.readlines()
        assert child.stderr.read() == ""
    return [line for line in said if line.endswith("\n")]


async def test_what_sqlite_acknowledged_is_there_after_kill_9_of_the_writer(
    tmp_path, opened
) -> None:
    url, lines = f"sqlite:///{tmp_path}/store.db", list[str]()
    for kill_after in (30, 200, 77):
        lines += await asyncio.to_thread(run_until_killed, url, kill_after)
        await check_promises(await opened(url), lines)


async def test_what_redis_acknowledged_is_there_after_kill_9_of_redis(
    redis_process, opened
) -> None:
    url = f"redis://127.0.0.1:{redis_process.port}/0?{PATIENCE}"
    store = await opened(url)
    lines = list[str]()
    for kill_after in (20, 60):

        async def go_on(name: str, enough: asyncio.Event, kill_after=kill_after) -> None:
            step = 0
            try:
                found = await store.read(key(name))
                granted = (
                    await claim(store, ask(name))
                    if found is None
                    else await take_over(store, name, b"%d" % found.epoch)
                )
                lines.append(f"claimed {name} {granted.epoch}")
                step = granted.checkpoint.step
                while True:
                    step += 1
                    await write(store, granted.claim_id, step, content(name, step), name)
                    lines.append(f"written {name} {step}")
                    if len(lines) > kill_after:
                        enough.set()
            except StoreError:
                enough.set()

        enough = asyncio.Event()
        tasks = [asyncio.create_task(go_on(f"s{number}", enough)) for number in range(4)]
        await enough.wait()
        redis_process.kill()
        await asyncio.gather(*tasks)
        redis_process.start()
        await check_promises(store, lines)


async def test_a_connection_that_the_event_loop_has_closed_is_a_store_that_is_away(
    redis_process, opened, monkeypatch
) -> None:
    store = await opened(f"redis://127.0.0.1:{redis_process.port}/0")

    async def find_closed(*_: object) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport>; the handler is closed")

    with monkeypatch.context() as patch:
        patch.setattr(store._redis, "eval", find_closed)
        with pytest.raises(StoreError, match="did not answer"):
            await claim(store, ask())
    await claim(store, ask())


async def test_a_redis_that_was_away_is_found_again_without_a_word(redis_process, opened) -> None:
    store = await opened(f"redis://127.0.0.1:{redis_process.port}/0?{PATIENCE}")
    granted = await claim(store, ask())
    redis_process.kill()
    with pytest.raises(StoreError, match="did not answer"):
        await write(store, granted.claim_id, 1, b"one")
    with pytest.raises(StoreError):
        await store.claim([ask(mode=OpenMode.RESUME)])
    with pytest.raises(StoreError):
        await store.read(key())
    with pytest.raises(StoreError):
        [found async for found in store.stored("m")]
    redis_process.start()
    again = [Write(key(), granted.claim_id, Packed(1, b"one"))]
    assert await until_it_answers(store, again) == [Verdict.DONE]


async def test_an_answer_that_got_lost_on_the_way_is_asked_for_again(redis_process, opened) -> None:
    """Redis did what was asked; the connection broke before its answer came."""
    store = await opened(redis_process.url)
    first = await claim(store, ask())
    for number in range(6):
        request = ask(mode=OpenMode.RESUME)
        task = asyncio.create_task(store.claim([request]))
        await asyncio.sleep(0.001 * number)
        redis_process.proxy.cut()
        try:
            (granted,) = await task
        except StoreError:
            granted = await claim_until_it_answers(store, request)
        assert granted.claim_id == request.claim_id
        # Its own claim was not taken for another process's.
        assert granted.previous == first.claim_id
        first = granted


async def claim_until_it_answers(store: Store, request):
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                return (await store.claim([request]))[0]
            except StoreError:
                await asyncio.sleep(0.05)


async def test_a_full_disk_is_told_and_forgotten_when_there_is_room_again(tmp_path) -> None:
    child = start("fill", f"sqlite:///{tmp_path}/store.db")
    said, complaints = await asyncio.to_thread(child.communicate, timeout=WAIT_SECONDS)
    assert child.returncode == 0, complaints
    lines = said.splitlines()
    assert sum("did not answer" in line for line in lines if line.startswith("full")) >= 5
    assert sum(line.startswith("kept") for line in lines) > 20


async def test_a_locked_file_is_told_and_forgotten(tmp_path) -> None:
    path = tmp_path / "store.db"
    store = SqliteStore(path, **_SECONDS, busy_seconds=0.1)
    await store.start()
    granted = await claim(store, ask())
    intruder = sqlite3.connect(path, isolation_level=None)
    intruder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        await write(store, granted.claim_id, 1, b"one")
    assert (await store.read(key())).checkpoint.data == b"initial"
    intruder.execute("ROLLBACK")
    intruder.close()
    assert await write(store, granted.claim_id, 1, b"one") is Verdict.DONE
    await store.stop()


async def test_nothing_goes_into_a_file_that_was_deleted_or_replaced(tmp_path, opened) -> None:
    path = tmp_path / "store.db"
    store = await opened(f"sqlite:///{path}")
    granted = await claim(store, ask())
    kept = tmp_path / "kept"
    kept.mkdir()
    for file in tmp_path.glob("store.db*"):
        shutil.move(file, kept / file.name)
    with pytest.raises(StoreError):
        await write(store, granted.claim_id, 1, b"into nowhere")
    with pytest.raises(StoreError):
        await store.read(key())
    assert not path.exists()
    for file in kept.iterdir():
        shutil.move(file, tmp_path / file.name)
    assert await write(store, granted.claim_id, 1, b"one") is Verdict.DONE
    assert (await store.read(key())).checkpoint.data == b"one"


async def test_a_damaged_file_is_told_and_never_half_used(tmp_path) -> None:
    path = tmp_path / "store.db"
    store = SqliteStore(path, **_SECONDS)
    await store.start()
    for number in range(50):
        await claim(store, ask(f"s{number}", initial=Packed(0, bytes(2000))))
    await store.stop()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)
    damaged = SqliteStore(path, **_SECONDS)
    with pytest.raises(StoreError, match="malformed"):
        await damaged.start()
        await damaged.claim([ask("s7", OpenMode.RESUME)])
    await damaged.stop()


async def test_one_request_that_cannot_be_done_does_not_drag_others_down(place) -> None:
    store = await place.open()
    granted = await claim(store, ask())
    good = [
        store.write([Write(key(), granted.claim_id, Packed(step, b"good"))]) for step in range(1, 9)
    ]
    bad = store.claim([ask("bad", initial=Packed(2**70, b""))])
    answers = await asyncio.gather(*good[:4], bad, *good[4:], return_exceptions=True)
    assert [answer for answer in answers if answer == [Verdict.DONE]] == [[Verdict.DONE]] * 8
    assert (await store.read(key())).checkpoint.step == 8


async def test_a_call_whose_caller_has_gone_disturbs_no_other(place) -> None:
    store = await place.open()
    granted = await claim(store, ask())
    for step in range(1, 30):
        gone = asyncio.create_task(write(store, granted.claim_id, 2 * step, b"gone"))
        await asyncio.sleep(0.0005 * (step % 4))
        gone.cancel()
        (verdict,) = await store.write(
            [Write(key(), granted.claim_id, Packed(2 * step + 1, b"%d" % step))]
        )
        assert verdict is Verdict.DONE
        assert (await store.read(key())).checkpoint == Packed(2 * step + 1, b"%d" % step)
        await asyncio.gather(gone, return_exceptions=True)


async def test_a_file_that_was_closed_is_told(tmp_path) -> None:
    store = SqliteStore(tmp_path / "store.db", **_SECONDS)
    with pytest.raises(StoreError, match="not open"):
        await store.read(key())
    await store.start()
    await claim(store, ask())
    await store.stop()
    with pytest.raises(StoreError, match="not open"):
        await store.read(key())
