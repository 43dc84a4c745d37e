"""A lost stream is mended behind the caller's back; a lost sequence is told, with its step."""

import asyncio

import numpy as np
import pytest

from sluice_client import (
    AsyncClient,
    Client,
    ModelNotFound,
    SequenceNotFound,
    StepTimedOut,
    StepUnsettled,
    Unavailable,
)
from tests.client.recording_server import RecordingServer


async def test_steps_go_on_over_lost_streams(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client, client.sequence("sum") as sequence:
        for turn in range(1, 13):
            if turn % 3 == 0:
                recorder.requests_left = 1
            assert (await sequence.step([1, turn]))[0] == turn
        assert sequence.step_count == 12
        assert recorder.streams == 5
        assert recorder.model.sequences[sequence.sequence_id].applied == 12


def test_steps_of_threads_go_on_over_lost_streams(recorder: RecordingServer) -> None:
    with Client(recorder.address) as client, client.sequence("sum") as sequence:
        for turn in range(1, 13):
            if turn % 3 == 0:
                recorder.requests_left = 1
            assert sequence.step([1, turn])[0] == turn
        assert recorder.streams == 5


async def test_a_pipelined_stream_goes_on_over_lost_streams(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client, client.sequence("sum") as sequence:
        seen = []
        async for y in sequence.stream(([1, 0] for _ in range(300)), ahead=16):
            seen.append(int(y[0]))
            if len(seen) % 50 == 0:
                recorder.requests_left = 2
        assert seen == list(range(1, 301))
        assert recorder.streams > 1


async def test_a_group_goes_on_over_lost_streams(recorder: RecordingServer) -> None:
    client = AsyncClient(recorder.address)
    async with client, client.group("sum", list("abcdef")) as group:
        for turn in range(1, 10):
            recorder.requests_left = 1 if turn % 2 else None
            result = await group.step(np.ones((6, 3, 2), np.int64))
            assert result.check()[:, -1, 0].tolist() == [3 * turn] * 6


async def test_closing_over_a_lost_stream_closes_once(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client:
        sequence = client.sequence("sum", "mine")
        await sequence.open()
        await sequence.step([1, 1])
        recorder.requests_left = 1
        await sequence.close()
        assert recorder.model.sequences["mine"].is_closed


async def test_a_sequence_the_server_has_lost_is_told_with_its_step(
    recorder: RecordingServer,
) -> None:
    async with AsyncClient(recorder.address) as client:
        sequence = client.sequence("sum", "mine")
        await sequence.open()
        await sequence.step([[1, 1], [1, 1]])
        recorder.model.sequences.clear()
        recorder.requests_left = 1
        with pytest.raises(SequenceNotFound, match="after 2 steps") as caught:
            await sequence.step([1, 1])
        assert (caught.value.sequence_id, caught.value.step) == ("mine", 2)
        with pytest.raises(SequenceNotFound):
            await sequence.step([1, 1])
        await sequence.close()


async def test_no_server_is_said_at_once() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            await client.models()
        with pytest.raises(Unavailable):
            await client.sequence("sum").open()
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.sequence("sum").open()


async def test_a_server_that_stays_away_is_unavailable_after_a_while() -> None:
    with RecordingServer() as recorder:
        client = AsyncClient(recorder.address, reconnect_seconds_max=0.1)
        sequence = client.sequence("sum")
        await sequence.open()
    with pytest.raises(Unavailable, match="may have been applied"):
        await sequence.step([1, 1])
    await client.close()


async def test_the_next_address_is_tried_when_one_does_not_answer(
    recorder: RecordingServer,
) -> None:
    addresses = ["127.0.0.1:1", recorder.address]
    async with AsyncClient(addresses) as client, client.sequence("sum") as sequence:
        assert (await sequence.step([1, 1])).tolist() == [1, 1]
    with Client(addresses) as client, client.sequence("sum") as sequence:
        assert sequence.step([1, 1]).tolist() == [1, 1]
    with Client(f"dns:///localhost:{recorder.port}") as client:
        assert [model.name for model in client.models()] == ["sum"]


async def test_an_unknown_model_is_told(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client:
        with pytest.raises(ModelNotFound, match="--model"):
            await client.sequence("other").open()


async def test_a_timed_out_step_must_be_settled_before_the_next(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client, client.sequence("sum") as sequence:
        await sequence.step([1, 1])
        recorder.is_answering.clear()
        with pytest.raises(StepTimedOut, match="may have been applied") as caught:
            await sequence.step([10, 10], timeout=0.05)
        assert caught.value.step == 1
        with pytest.raises(StepUnsettled, match="settle") as unsettled:
            await sequence.step([100, 100])
        assert unsettled.value.step == 1
        with pytest.raises(TimeoutError):
            await sequence.settle(timeout=0.05)
        recorder.is_answering.set()
        assert [y.tolist() for y in await sequence.settle()] == [[11, 11]]
        assert await sequence.settle() == []
        assert (await sequence.step([100, 100])).tolist() == [111, 111]


async def test_a_cancelled_step_never_gives_its_output_to_the_next(
    recorder: RecordingServer,
) -> None:
    async with AsyncClient(recorder.address) as client, client.sequence("sum") as sequence:
        await sequence.step([1, 1])
        recorder.is_answering.clear()
        task = asyncio.create_task(sequence.step([10, 10]))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        recorder.is_answering.set()
        await asyncio.sleep(0.01)
        with pytest.raises(StepUnsettled):
            await sequence.step([100, 100])
        assert [y.tolist() for y in await sequence.settle()] == [[11, 11]]
        assert (await sequence.step([100, 100])).tolist() == [111, 111]


def test_a_timed_out_step_of_a_thread_must_be_settled_too(recorder: RecordingServer) -> None:
    with Client(recorder.address) as client, client.sequence("sum") as sequence:
        sequence.step([1, 1])
        recorder.is_answering.clear()
        with pytest.raises(StepTimedOut):
            sequence.step([10, 10], timeout=0.05)
        with pytest.raises(StepUnsettled):
            sequence.step([100, 100])
        recorder.is_answering.set()
        assert [y.tolist() for y in sequence.settle()] == [[11, 11]]
        assert sequence.step([100, 100]).tolist() == [111, 111]


async def test_what_a_stream_left_under_way_is_settled(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client, client.sequence("sum") as sequence:
        outputs = []
        stream = sequence.stream([[1, 0]] * 10, ahead=4)
        async for y in stream:
            outputs.append(y)
            if len(outputs) == 3:
                break
        await stream.aclose()
        outputs += await sequence.settle()
        assert [int(y[0]) for y in outputs] == list(range(1, sequence.step_count + 1))
        assert 3 < sequence.step_count <= 10
