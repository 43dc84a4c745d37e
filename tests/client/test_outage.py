"""Through a real server whose connections break, or that goes away altogether."""

import asyncio
import random
import threading

import numpy as np
import pytest

from sluice_client import AsyncClient, Client, SequenceNotFound, Unavailable
from tests.client.proxy import Proxy
from tests.client.server_process import ServerProcess


async def test_every_step_is_applied_once_however_often_the_network_breaks(server) -> None:
    calls = 0

    async def walk(client: AsyncClient, number: int) -> None:
        nonlocal calls
        draw = random.Random(number)
        total = 0
        async with client.sequence("accumulator") as sequence:
            for _ in range(30):
                x = np.array([[draw.randrange(9)] for _ in range(draw.randrange(1, 5))])
                expected = total + np.cumsum(x, axis=0)
                assert np.array_equal(await sequence.step(x), expected)
                total = expected[-1, 0]
                calls += 1
                if calls % 61 == 0:  # in the middle of whatever the others are at
                    proxy.cut()

    with Proxy(server.address) as proxy:
        async with AsyncClient(proxy.address) as client:
            await asyncio.gather(*(walk(client, number) for number in range(20)))
    assert proxy.connections > 5


def test_threads_do_not_notice_a_network_that_breaks(server) -> None:
    with Proxy(server.address) as proxy:
        client = Client(proxy.address)
        with client, client.sequence("accumulator") as sequence:
            for turn in range(1, 60):
                if turn % 10 == 0:
                    threading.Timer(0.001 * (turn % 3), proxy.cut).start()
                assert sequence.step([1]).tolist() == [turn]


async def test_a_pipelined_stream_survives_a_network_that_breaks(server) -> None:
    with Proxy(server.address) as proxy:
        client = AsyncClient(proxy.address)
        async with client, client.sequence("accumulator") as sequence:
            totals = []
            async for y in sequence.stream([[1]] * 500, ahead=32):
                totals += y.tolist()
                if len(totals) % 125 == 0:
                    proxy.cut()
    assert totals == list(range(1, 501))


@pytest.mark.parametrize("is_graceful", [True, False])
async def test_a_sequence_does_not_outlive_its_server_and_says_so(
    accumulator_file, is_graceful
) -> None:
    first = ServerProcess({"accumulator": accumulator_file})
    async with AsyncClient(first.address) as client:
        sequence = client.sequence("accumulator")
        await sequence.open()
        await sequence.step([[1], [2]])
        if is_graceful:
            first.stop()
        else:
            first.kill()
        second = ServerProcess({"accumulator": accumulator_file}, "--listen", first.address)
        with pytest.raises(SequenceNotFound, match="after 2 steps"):
            await sequence.step([3])
        # The client itself goes on.
        async with client.sequence("accumulator") as another:
            assert (await another.step([3])).tolist() == [3]
        second.stop()


async def test_steps_under_way_when_a_server_goes_for_good_are_unavailable(
    accumulator_file,
) -> None:
    process = ServerProcess({"accumulator": accumulator_file})
    client = AsyncClient(process.address, reconnect_seconds_max=0.2)
    sequence = client.sequence("accumulator")
    await sequence.open()
    await sequence.step([1])
    process.kill()
    with pytest.raises(Unavailable) as caught:
        await sequence.step([1])
    assert caught.value.step == 1
    await client.close()
