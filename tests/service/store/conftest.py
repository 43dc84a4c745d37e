"""The three stores, each test with one of its own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sluice_service.store import Store
from tests.chaos.processes import RedisProcess
from tests.service.store.places import MemoryPlace, Place, RedisPlace, SqlitePlace


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis, which keeps nothing on disk: what outlives it has a Redis of its own."""
    process = RedisProcess(tmp_path_factory.mktemp("redis"), "--appendonly", "no")
    process.start()
    yield f"redis://127.0.0.1:{process.port}/0"
    process.close()


def make_place(kind: str, folder: Path, redis_url: str) -> Place:
    if kind == "memory":
        return MemoryPlace()
    return SqlitePlace(folder) if kind == "sqlite" else RedisPlace(redis_url)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def place(request, tmp_path: Path, redis_url: str) -> AsyncIterator[Place]:
    """Each of the three."""
    place = make_place(request.param, tmp_path, redis_url)
    yield place
    await place.leave()


@pytest.fixture(params=["sqlite", "redis"])
async def shared_place(request, tmp_path: Path, redis_url: str) -> AsyncIterator[Place]:
    """Each of the two that several processes may share."""
    place = make_place(request.param, tmp_path, redis_url)
    yield place
    await place.leave()


@pytest.fixture
async def store(place: Place) -> Store:
    """One handle to each of the three."""
    return await place.open()
