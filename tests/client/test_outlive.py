"""A real server is killed with kill -9, and another one goes on from its file: nobody notices."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sluice_client import (
    AsyncClient,
    Client,
    Fenced,
    Mode,
    ReplayNeeded,
    SequenceExists,
    StepFailed,
    Ticket,
)
from tests.client.proxy import Proxy
from tests.client.server_process import ServerProcess


class Mortal:
    """A server with a store behind an address that stays, whose process can be killed."""

    durability = ""

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


@pytest.fixture(scope="module")
def strict(accumulator_file, tmp_path_factory) -> Iterator[Mortal]:
    server = Mortal(
        {"accumulator": accumulator_file},
        tmp_path_factory.mktemp("strict"),
        "--durability",
        "strict",
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def periodic(accumulator_file, tmp_path_factory) -> Iterator[Mortal]:
    """Between the open and a park nothing is checkpointed."""
    server = Mortal(
        {"accumulator": accumulator_file},
        tmp_path_factory.mktemp("periodic"),
        "--durability",
        "periodic",
        "--checkpoint-seconds",
        "1000000",
        "--checkpoint-steps",
        "1000000",
    )
    yield server
    server.stop()


@pytest.fixture(params=["strict", "periodic"])
def server(request) -> Mortal:
    mortal: Mortal = request.getfixturevalue(request.param)
    mortal.durability = request.param
    return mortal


def expected(count: int) -> list[int]:
    return np.cumsum(np.arange(count)).tolist()


async def test_coroutines_do_not_notice_that_their_server_was_killed(server) -> None:
    async with AsyncClient(server.address) as client, client.sequence("accumulator") as sequence:
        assert sequence.durability == server.durability
        rows = []
        for step in range(40):
            if step == 20:
                server.kill()
            rows.append((await sequence.step([step])).item())
        assert rows == expected(40)
        durable = {"strict": 40, "periodic": 0}
        assert sequence.durable_step == durable[server.durability]


def test_threads_do_not_notice_that_their_server_was_killed(server) -> None:
    with Client(server.address) as client, client.sequence("accumulator") as sequence:
        rows = []
        for y in sequence.stream(([step] for step in range(300)), ahead=16):
            rows.append(y.item())
            if len(rows) == 100:
                server.kill()
        assert rows == expected(300)


async def test_a_group_does_not_notice_either(periodic) -> None:
    client = AsyncClient(periodic.address)
    async with client, client.group("accumulator", list("abc")) as group:
        for turn in range(1, 5):
            if turn == 3:
                periodic.kill()
            result = await group.step(np.full((3, 2, 1), 1.0))
            assert result.check()[:, :, 0].tolist() == [[2 * turn - 1, 2 * turn]] * 3
        assert group.durabilities == ["periodic"] * 3
        assert group.durable_steps.tolist() == [0, 0, 0]


async def test_a_refused_step_is_refused_at_its_place(server) -> None:
    """Also where outputs wait for the store: the fault comes after them."""
    async with AsyncClient(server.address) as client, client.sequence("accumulator") as sequence:
        outputs = []
        with pytest.raises(StepFailed) as caught:
            async for y in sequence.stream([[1], [1], [np.nan], [1]]):
                outputs += y.tolist()
        assert outputs == [1, 2]
        assert caught.value.step == 2
        assert (await sequence.step([5])).item() == 7


def test_what_is_parked_is_there_after_the_server_was_killed(periodic) -> None:
    with Client(periodic.address) as client:
        with client.sequence("accumulator", "parked") as sequence:
            sequence.step([[1], [2]])
            sequence.park()
        periodic.kill()
        with client.sequence("accumulator", "parked", mode=Mode.TAKEOVER) as sequence:
            assert sequence.step_count == sequence.durable_step == 2
            assert sequence.step([3]).item() == 6


# -- a client that is killed


@contextmanager
def journaling(server: Mortal, journal: Path, durability: str, rows: int) -> Iterator[None]:
    """A client in a process of its own that has written so many rows, killed with the block."""
    command = [sys.executable, Path(__file__).with_name("journaling_client.py")]
    process = subprocess.Popen([*command, server.address, journal, durability])
    try:
        while not journal.exists() or journal.read_text().count("\n") <= rows:
            assert process.poll() is None
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


def read(journal: Path) -> tuple[Ticket, list[float]]:
    """What a journal has; a last line that was cut short counts as not written."""
    ticket, *rows = journal.read_text().split("\n")[:-1]
    return Ticket.from_json(ticket), [float(row) for row in rows]


def test_a_successor_goes_on_where_a_killed_client_stood(server, tmp_path) -> None:
    journal = tmp_path / "journal"
    with journaling(server, journal, server.durability, rows=100):
        pass
    ticket, rows = read(journal)
    client = Client(server.address)
    with client, client.resume(ticket, received=len(rows)) as sequence:
        for outputs in sequence.settle():
            rows += outputs[:, 0].tolist()
        assert len(rows) == sequence.step_count
        for step in range(len(rows), len(rows) + 20):
            rows.append(sequence.step([step]).item())
    assert rows == expected(len(rows))


async def test_a_successor_replays_what_a_killed_server_has_lost(periodic, tmp_path) -> None:
    journal = tmp_path / "journal"
    with journaling(periodic, journal, "periodic", rows=50):
        pass
    periodic.kill()
    ticket, rows = read(journal)
    client = AsyncClient(periodic.address)
    async with client, client.resume(ticket, received=len(rows)) as sequence:
        assert (sequence.replays_from, sequence.step_count) == (0, len(rows))
        with pytest.raises(ReplayNeeded, match="replay") as caught:
            await sequence.step([0])
        assert caught.value.step == 0
        sequence.replay([[step] for step in range(len(rows))])
        assert sequence.replays_from is None
        for step in range(len(rows), len(rows) + 20):
            rows.append((await sequence.step([step])).item())
        periodic.kill()
        rows.append((await sequence.step([len(rows)])).item())
    assert rows == expected(len(rows))


async def test_of_two_handles_with_one_ticket_the_later_has_the_sequence(strict) -> None:
    async with AsyncClient(strict.address) as client, AsyncClient(strict.address) as later:
        first = client.sequence("accumulator", "shared")
        await first.open()
        await first.step([1])
        ticket = first.ticket()
        second = later.resume(ticket)
        await second.open()
        with pytest.raises(Fenced):
            await first.step([2])
        await first.close()  # it has nothing to close any more
        assert (await second.step([2])).item() == 3
        third = client.resume(second.ticket())
        await third.open()
        assert (await third.step([3])).item() == 6
        with pytest.raises(Fenced):
            await second.step([4])
        await third.close()


# -- states and copies


async def test_a_copy_and_a_rollback_survive_too(periodic) -> None:
    async with AsyncClient(periodic.address) as client:
        async with client.sequence("accumulator", "origin") as sequence:
            await sequence.step([[1], [2]])
            held = await sequence.state()
            fork = await sequence.fork("what-if")
            with pytest.raises(SequenceExists):
                await sequence.fork("what-if")
            drawn = await sequence.fork(durability="periodic")
            periodic.kill()
            async with fork, drawn:
                assert fork.step_count == drawn.step_count == 2
                assert (await fork.step([10])).item() == 13
                assert (await drawn.step([20])).item() == 23
            # The server has gone back, and is sent the steps again before it is asked.
            state = await sequence.state()
            assert (state.step, state.row.tolist()) == (2, [3])
            await sequence.step([3])
        back = client.sequence("accumulator", "origin", mode=Mode.RESTART, state=held)
        async with back:
            periodic.kill()
            assert (await back.step([4])).item() == 7
            assert back.step_count == 3


def test_a_thread_forks_and_rolls_back(strict) -> None:
    with Client(strict.address) as client, client.sequence("accumulator", "origin") as sequence:
        sequence.step([[1], [2]])
        held = sequence.state()
        with sequence.fork() as fork:
            assert fork.step([10]).item() == 13
        sequence.step([3])
        with client.sequence("accumulator", "origin", mode=Mode.RESTART, state=held) as back:
            assert back.step([4]).item() == 7
            with pytest.raises(Fenced):
                sequence.step([5])
