"""Servers in this process, one that all tests share and others with settings of their own."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sluice_service.runtime.clock import AwakeClock
from tests.service.hands import Gate, Hands
from tests.service.wire import SECONDS, Served


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """`await serve({"name": path}, **settings)`: a server that is stopped after the test."""
    started: list[Served] = []

    async def start(models: dict[str, Path], **settings: Any) -> Served:
        served = await Served(models, **settings).start()
        started.append(served)
        return served

    yield start
    for served in started:
        await served.stop()


@pytest.fixture(scope="session")
async def served(
    accumulator_file, lstm_file, gru_file, rnn_file, embedding_file, multi_file
) -> AsyncIterator[Served]:
    """One server of every model, as it is without settings."""
    files = {"lstm": lstm_file, "gru": gru_file, "rnn": rnn_file}
    files |= {"embedding": embedding_file, "multi": multi_file}
    paths = {name: file.path for name, file in files.items()}
    served = await Served({"accumulator": accumulator_file, **paths}).start()
    yield served
    await served.stop()


@pytest.fixture
async def sums(serve, accumulator_file) -> Callable[..., Awaitable[Served]]:
    """`await sums(**settings)`: a server of the accumulator."""

    async def start(**settings: Any) -> Served:
        return await serve({"accumulator": accumulator_file}, **settings)

    return start


@pytest.fixture
async def kept(serve, accumulator_file, tmp_path) -> Callable[..., Awaitable[Served]]:
    """`await kept(**settings)`: a server of the accumulator, over one store with the others."""

    async def start(**settings: Any) -> Served:
        # So seldom that only what a test does makes a checkpoint.
        fields = {"durability": "periodic", "checkpoint_seconds": 1e6, **settings}
        store = f"sqlite:///{tmp_path}/sequences.db"
        return await serve({"accumulator": accumulator_file}, store=store, **fields)

    return start


@pytest.fixture
def hands(monkeypatch) -> Hands:
    """The clock of every server that is made hereafter."""
    hands = Hands()
    monkeypatch.setattr(
        "sluice_service.models.host.AwakeClock",
        lambda **_: AwakeClock(gap_max=2.0, monotonic=hands),
    )
    # Nobody but the test looks for idle sequences.
    monkeypatch.setattr("sluice_service.models.host._TICK_SECONDS", 1e6)
    return hands


@pytest.fixture
def unhurried(monkeypatch) -> None:
    """A server that stops lets its calls end by themselves, however slow this machine is."""
    monkeypatch.setattr("sluice_service.server.GRACE_SECONDS", SECONDS)


@pytest.fixture
def gate(monkeypatch) -> Gate:
    """Every server that is made hereafter takes all its runs through this gate."""
    gate = Gate()
    monkeypatch.setattr("sluice_service.models.registry.ThreadPoolExecutor", lambda **_: gate)
    # Runs that are expected to take long are never executed on the event loop.
    monkeypatch.setattr("sluice_service.batching.engine.Engine.estimate", lambda *_: float("inf"))
    monkeypatch.setattr("sluice_service.serving.run_loop._INLINE_ALONE_SECONDS_MAX", -1.0)
    return gate
