"""A server whose store is down or slow, over real sockets: clients wait, and lose nothing."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from sluice_client import AsyncClient, Client, Unavailable
from tests.client.durable_server import Store
from tests.client.recording_server import RecordingServer


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def recorder(store) -> Iterator[RecordingServer]:
    with RecordingServer(store=store) as server:
        yield server


def wait_for_opens(recorder: RecordingServer, count: int) -> None:
    """Until so many opens have arrived."""
    recorder.wait_for(lambda: sum(len(request.open) for request in recorder.requests) >= count)


async def test_an_open_waits_for_the_store(recorder, store) -> None:
    store.is_down = True
    async with AsyncClient(recorder.address) as client:
        sequence = client.sequence("sum", "mine")
        opening = asyncio.create_task(sequence.open())
        await asyncio.to_thread(wait_for_opens, recorder, 3)
        assert not opening.done()
        store.is_down = False
        await opening
        assert (await sequence.step([1, 1])).tolist() == [1, 1]
        assert sequence.durability == "periodic"


def test_an_open_of_a_thread_waits_for_the_store(recorder, store) -> None:
    store.is_down = True
    with Client(recorder.address) as client:
        sequence = client.sequence("sum", "mine")
        thread = threading.Thread(target=sequence.open)
        thread.start()
        wait_for_opens(recorder, 3)
        store.is_down = False
        thread.join()
        assert sequence.step([1, 1]).tolist() == [1, 1]


async def test_another_server_is_tried_while_the_store_of_one_is_down(recorder, store) -> None:
    store.is_down = True
    with RecordingServer(store=Store()) as other:
        addresses = [recorder.address, other.address]
        async with AsyncClient(addresses) as client, client.sequence("sum", "mine") as sequence:
            assert (await sequence.step([1, 1])).tolist() == [1, 1]
        with Client(addresses) as client, client.sequence("sum", "yours") as sequence:
            assert sequence.step([1, 1]).tolist() == [1, 1]


async def test_who_is_served_goes_on_while_others_wait_for_the_store(recorder, store) -> None:
    client = AsyncClient(recorder.address)
    async with client, client.sequence("sum", "served") as served:
        await served.step([1, 0])
        store.is_down = True
        waiting = client.sequence("sum", "waiting")
        opening = asyncio.create_task(waiting.open())
        for turn in range(2, 50):
            assert (await served.step([1, 0]))[0] == turn
        await asyncio.to_thread(wait_for_opens, recorder, 4)
        assert recorder.streams == 1
        store.is_down = False
        await opening
        assert (await waiting.step([5, 5])).tolist() == [5, 5]
        await waiting.close()


def test_threads_that_are_served_go_on_while_others_wait_for_the_store(recorder, store) -> None:
    with Client(recorder.address) as client, client.sequence("sum", "served") as served:
        served.step([1, 0])
        store.is_down = True
        waiting = client.sequence("sum", "waiting")
        thread = threading.Thread(target=waiting.open)
        thread.start()
        for turn in range(2, 50):
            assert served.step([1, 0])[0] == turn
        wait_for_opens(recorder, 4)
        store.is_down = False
        thread.join()
        assert recorder.streams == 1
        assert waiting.step([5, 5]).tolist() == [5, 5]


async def test_a_store_that_stays_down_is_said(recorder, store) -> None:
    client = AsyncClient(recorder.address, reconnect_seconds_max=0.2)
    async with client, client.sequence("sum", "served") as served:
        store.is_down = True
        with pytest.raises(Unavailable, match="no server has answered"):
            await client.sequence("sum", "waiting").open()
        store.is_down = False
        assert (await served.step([1, 1])).tolist() == [1, 1]
    with Client(recorder.address, reconnect_seconds_max=0.2) as client:
        store.is_down = True
        with pytest.raises(Unavailable):
            client.sequence("sum", "waiting").open()
    store.is_down = False


async def test_steps_wait_for_a_store_that_comes_back(recorder, store) -> None:
    async with AsyncClient(recorder.address) as client, client.sequence("sum") as sequence:
        await sequence.step([1, 1])
        store.is_down = True
        recorder.refuse()
        step = asyncio.create_task(sequence.step([1, 1]))
        await asyncio.to_thread(wait_for_opens, recorder, 4)
        assert not step.done()
        store.is_down = False
        assert (await step).tolist() == [2, 2]


async def test_a_caller_waits_when_too_much_is_retained(recorder) -> None:
    client = AsyncClient(recorder.address, kept_steps_max=3)
    async with (
        client,
        client.sequence("sum") as sequence,
        client.sequence("sum", durability="strict") as other,
    ):
        for turn in range(1, 4):
            assert (await sequence.step([1, 1]))[0] == turn
        assert sequence.durable_step == 0
        step = asyncio.create_task(sequence.step([1, 1]))
        # One that is not held up shows that the step was not sent.
        mark = asyncio.create_task(other.step([1, 1]))
        await asyncio.to_thread(recorder.wait_for, lambda: len(recorder.frames) == 4)
        assert not step.done()
        recorder.checkpoint()
        await mark
        assert (await step)[0] == 4
        assert sequence.durable_step == 3


def test_a_thread_waits_when_too_much_is_retained(recorder) -> None:
    with Client(recorder.address, kept_bytes_max=1) as client, client.sequence("sum") as sequence:
        assert sequence.step([1, 1])[0] == 1
        totals = []
        thread = threading.Thread(target=lambda: totals.append(sequence.step([1, 1])[0]))
        thread.start()
        thread.join(0.05)
        assert not totals
        assert len(recorder.frames) == 1
        recorder.checkpoint()
        thread.join()
        assert totals == [2]
