"""A real server is killed with kill -9, and another one goes on from its file: nobody notices."""

import numpy as np
import pytest

from sluice_client import AsyncClient, Client
from tests.client.proxy import Proxy
from tests.client.server_process import ServerProcess


class Mortal:
    """A server with a store behind an address that stays, whose process can be killed."""

    def __init__(self, models, folder, *flags: str) -> None:
        self._models = models
        self._flags = ["--store", f"sqlite:///{folder}/sequences.db", *flags]
        self._process = ServerProcess(self._models, *self._flags)
        self._proxy = Proxy(self._process.address)
        self.address = self._proxy.address

    def kill(self) -> None:
        """As `kill -9` does, and start another process over the same file."""
        self._process.kill()
        self._process = ServerProcess(self._models, *self._flags)
        self._proxy.aim(self._process.address)

    def stop(self) -> None:
        self._process.stop()
        self._proxy.__exit__()


@pytest.fixture
def mortal(accumulator_file, tmp_path):
    """`mortal(*flags)`: a server over a file of the test's own."""
    servers = []

    def start(*flags: str) -> Mortal:
        servers.append(Mortal({"accumulator": accumulator_file}, tmp_path, *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


# With `periodic`, only what the test asks for is checkpointed after the open.
STRICT = ("--durability", "strict")
PERIODIC = ("--durability", "periodic", "--checkpoint-seconds", "1000000")
BOTH = pytest.mark.parametrize("flags", [STRICT, PERIODIC], ids=["strict", "periodic"])


def expected(count: int) -> list[int]:
    return np.cumsum(np.arange(count)).tolist()


@BOTH
async def test_coroutines_do_not_notice_that_their_server_was_killed(mortal, flags) -> None:
    server = mortal(*flags)
    async with AsyncClient(server.address) as client, client.sequence("accumulator") as sequence:
        assert sequence.durability == flags[1]
        rows = []
        for step in range(60):
            if step in (20, 40):
                server.kill()
            rows.append((await sequence.step([step])).item())
        assert rows == expected(60)
        durable = {"strict": 60, "periodic": 0}
        assert sequence.durable_step == durable[flags[1]]


@BOTH
def test_threads_do_not_notice_that_their_server_was_killed(mortal, flags) -> None:
    server = mortal(*flags)
    with Client(server.address) as client, client.sequence("accumulator") as sequence:
        rows = []
        for y in sequence.stream(([step] for step in range(300)), ahead=16):
            rows.append(y.item())
            if len(rows) in (100, 200):
                server.kill()
        assert rows == expected(300)
