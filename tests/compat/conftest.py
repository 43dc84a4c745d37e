"""Servers to speak the Open Inference Protocol to, and the models its own examples use."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compat.caller import Caller
from tests.service.conftest import gate, hands, serve, unhurried
from tests.service.wire import Served

__all__ = ["gate", "hands", "serve", "unhurried"]


@pytest.fixture(scope="session")
async def served(accumulator_file, integers_file, stateless_file) -> AsyncIterator[Served]:
    """One server of small models, as it is without settings."""
    files = {"accumulator": accumulator_file, "integers": integers_file}
    served = await Served({**files, "stateless": stateless_file}).start()
    yield served
    await served.stop()


@pytest.fixture
def caller(served: Served) -> Caller:
    """Speaks to the server that all tests share."""
    return Caller(served.channel)


@pytest.fixture
async def sums(serve, accumulator_file) -> Callable[..., Awaitable[Served]]:
    """`await sums(**settings)`: a server of the accumulator."""

    async def start(**settings: Any) -> Served:
        return await serve({"accumulator": accumulator_file}, **settings)

    return start


@pytest.fixture(scope="session")
def integers_file(accumulator_file: Path, models_folder: Path) -> Path:
    """The accumulator over int32, as the field's own examples have it."""
    from tests.compat.models import write_integer_accumulator

    path = models_folder / "integers.onnx"
    write_integer_accumulator(accumulator_file, path)
    return path
