"""Where a store is kept during a test: handles to it, and its clock as a test may turn it."""

import asyncio
import itertools
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import redis

from sluice_service.errors import LaneError
from sluice_service.store import ClaimRequest, Granted, Key, Packed, Store, Verdict, Write
from sluice_service.store.claims import OpenMode, OpenRequest
from sluice_service.store.redis import RedisStore
from sluice_service.store.sqlite import SqliteStore
from tests.service.store.memory import MemoryStore

# So long that the test's own seconds decide nothing.
TOMBSTONE_SECONDS = 10_000.0
RECORD_SECONDS = 100_000.0
_SECONDS = {"tombstone_seconds": TOMBSTONE_SECONDS, "record_seconds": RECORD_SECONDS}
# Of whoever uses Redis: a busy machine answers when it can.
PATIENCE = "socket_timeout=60&socket_connect_timeout=60"
# Of the time between two uses of a store so much counts at least.
_STEP_SECONDS = 10.0


_COUNT = """
local names, checkpoints = redis.call("KEYS", ARGV[1] .. "sequence:*"), 0
for _, name in ipairs(names) do
    checkpoints = checkpoints + redis.call("HEXISTS", name, "data")
end
return {#names, redis.call("ZCARD", ARGV[1] .. "expiries"), checkpoints}
"""


class Place:
    """One store, of which processes have handles."""

    def __init__(self) -> None:
        self._handles: list[Store] = []

    async def open(self, **seconds: float) -> Store:
        """One more handle, as another process would have it."""
        store = self._make(**seconds)
        await store.start()
        self._handles.append(store)
        return store

    async def leave(self) -> None:
        """Stop every handle."""
        for store in self._handles:
            await store.stop()

    def _make(self, **seconds: float) -> Store:
        raise AssertionError

    async def pass_time(self, seconds: float) -> None:
        """Let the store be in use for so many seconds."""
        raise AssertionError

    async def jump(self, seconds: float) -> None:
        """Turn the machine's clock by so many seconds."""
        raise AssertionError

    def count(self) -> tuple[int, int]:
        """How many sequences it has something of, and how many checkpoints."""
        raise AssertionError


class MemoryPlace(Place):
    """A dictionary: every handle is the same one."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._store = MemoryStore(**_SECONDS, monotonic=lambda: self._now)

    def _make(self, **seconds: float) -> Store:
        return self._store

    async def pass_time(self, seconds: float) -> None:
        while seconds > 0:
            self._now += min(seconds, _STEP_SECONDS)
            seconds -= _STEP_SECONDS
            await self._store.renew_leases([])

    async def jump(self, seconds: float) -> None:
        self._now += max(seconds, 0)  # this clock never goes back


class SqlitePlace(Place):
    """A file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "store.db"
        self._now = 1e6

    def _make(self, **seconds: float) -> Store:
        return SqliteStore(
            self.path, **_SECONDS | seconds, monotonic=lambda: self._now, busy_seconds=60
        )

    async def pass_time(self, seconds: float) -> None:
        with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
            connection.execute("UPDATE store SET seconds = seconds + ?", (seconds,))

    async def jump(self, seconds: float) -> None:
        self._now += seconds

    def count(self) -> tuple[int, int]:
        with closing(sqlite3.connect(self.path, timeout=60)) as connection:
            count = "SELECT (SELECT count(*) FROM sequences), (SELECT count(*) FROM checkpoints)"
            sequences, checkpoints = connection.execute(count).fetchone()
        return sequences, checkpoints


class RedisPlace(Place):
    """A prefix of its own in a real Redis."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.prefix = f"{uuid.uuid4().hex}:"
        self.url = f"{url}?prefix={self.prefix}&{PATIENCE}"
        self._redis = redis.Redis.from_url(url)

    def _make(self, **seconds: float) -> Store:
        return RedisStore(self.url, **_SECONDS | seconds)

    async def pass_time(self, seconds: float) -> None:
        self._redis.hincrby(f"{self.prefix}clock", "milliseconds", int(seconds * 1000))
        await self._tick()

    async def jump(self, seconds: float) -> None:
        # The machine's clock as it was seen last lies so much further back.
        self._redis.hincrby(f"{self.prefix}clock", "machine", int(-seconds * 1000))
        await self._tick()

    def count(self) -> tuple[int, int]:
        # At one instant: the store clears away when it likes.
        names, expiring, checkpoints = self._redis.eval(_COUNT, 0, self.prefix)
        assert expiring == names
        return names, checkpoints

    async def _tick(self) -> None:
        store = self._make()
        await store.start()
        await store.stop()


INITIAL = Packed(0, b"initial")

_ATTEMPTS = itertools.count(1)


def key(name: str = "s") -> Key:
    """A sequence of the model `m`."""
    return Key("m", name)


def ask(
    name: str = "s",
    mode: OpenMode = OpenMode.START,
    writer: bytes = b"me",
    *,
    attempt: int | None = None,
    epoch: int = 0,
    initial: Packed = INITIAL,
    held: bytes = b"",
    snapshot: Packed | None = None,
) -> ClaimRequest:
    """An open of a writer; each a later attempt than those before."""
    wanted = OpenRequest(
        sequence_id=name,
        mode=mode,
        writer=writer,
        attempt=next(_ATTEMPTS) if attempt is None else attempt,
        expected_epoch=epoch,
    )
    return ClaimRequest(key(name), wanted, initial, held, snapshot)


async def claim(store: Store, request: ClaimRequest) -> Granted:
    """A claim that is granted."""
    (answer,) = await store.claim([request])
    assert isinstance(answer, Granted), answer
    return answer


async def refuse(store: Store, request: ClaimRequest) -> LaneError:
    """A claim that is refused."""
    (answer,) = await store.claim([request])
    assert isinstance(answer, LaneError), answer
    return answer


async def write(store: Store, claim_id: bytes, step: int, data: bytes, name: str = "s") -> Verdict:
    """One checkpoint."""
    (verdict,) = await store.write([Write(key(name), claim_id, Packed(step, data))])
    return verdict


async def take_over(store: Store, name: str, writer: bytes) -> Granted:
    """Take a sequence from whoever has it, however often the epoch rises meanwhile."""
    epoch = 0
    while True:
        (answer,) = await store.claim([ask(name, OpenMode.TAKEOVER, writer, epoch=epoch)])
        if isinstance(answer, Granted):
            return answer
        assert answer.epoch > epoch, answer
        epoch = answer.epoch
        await asyncio.sleep(0)
