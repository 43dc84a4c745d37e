"""Whoever asks something of a client that was closed is told so, met or not."""

import asyncio
import socket
import threading

import pytest

from sluice_client import AsyncClient, Client, ClientClosed
from tests.client.recording_server import RecordingServer


@pytest.mark.parametrize("has_met", [False, True])
async def test_a_handle_of_a_closed_client_does_not_open(
    recorder: RecordingServer, has_met: bool
) -> None:
    client = AsyncClient(recorder.address)
    if has_met:
        await client.sequence("sum").open()
    sequence = client.sequence("sum")
    await client.close()
    with pytest.raises(ClientClosed, match="the client was closed"):
        await sequence.open()
    with pytest.raises(ClientClosed, match="make another one"):
        client.sequence("another")


@pytest.mark.parametrize("has_met", [False, True])
def test_a_handle_of_a_closed_client_of_threads_does_not_open(
    recorder: RecordingServer, has_met: bool
) -> None:
    client = Client(recorder.address)
    if has_met:
        client.sequence("sum").open()
    sequence = client.sequence("sum")
    client.close()
    with pytest.raises(ClientClosed, match="the client was closed"):
        sequence.open()


async def test_a_client_is_closed_while_it_waits_for_a_server_that_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = AsyncClient(f"127.0.0.1:{silent.getsockname()[1]}")
        opening = [asyncio.create_task(client.sequence("sum").open()) for _ in range(2)]
        # Its connection is there, and nobody answers on it.
        near, _ = await asyncio.to_thread(silent.accept)
        with near:
            await client.close()
            for error in await asyncio.gather(*opening, return_exceptions=True):
                assert isinstance(error, ClientClosed)


async def test_steps_under_way_get_client_closed(recorder: RecordingServer) -> None:
    client = AsyncClient(recorder.address)
    sequence = client.sequence("sum")
    await sequence.open()
    recorder.is_answering.clear()
    step = asyncio.create_task(sequence.step([1, 1]))
    await asyncio.to_thread(recorder.wait_for, lambda: recorder.frames)
    await client.close()
    with pytest.raises(ClientClosed, match="the client was closed"):
        await step


def test_steps_of_threads_under_way_get_client_closed(recorder: RecordingServer) -> None:
    client, errors = Client(recorder.address), []
    sequence = client.sequence("sum")
    sequence.open()
    recorder.is_answering.clear()

    def step() -> None:
        try:
            sequence.step([1, 1])
        except ClientClosed as error:
            errors.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    recorder.wait_for(lambda: recorder.frames)
    client.close()
    thread.join(60)
    assert len(errors) == 1
