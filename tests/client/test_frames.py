"""What leaves the client, counted at a server: frames form by themselves, none without need."""

import asyncio
import threading

import numpy as np

from sluice_client import AsyncClient, Client, InvalidInput
from sluice_protos.sequences_pb2 import Limits
from tests.client.model_server import POISON
from tests.client.recording_server import RecordingServer


async def test_two_hundred_coroutines_make_one_frame(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client:
        sequences = [client.sequence("sum") for _ in range(200)]
        await asyncio.gather(*(sequence.open() for sequence in sequences))
        assert len(recorder.requests) == 1
        for turn in range(1, 4):
            outputs = await asyncio.gather(*(sequence.step([1, 2]) for sequence in sequences))
            assert len(recorder.frames) == turn
            assert np.array_equal(outputs, [[turn, 2 * turn]] * 200)
        assert recorder.streams == 1


async def test_coroutines_that_step_in_a_loop_stay_in_one_frame(recorder: RecordingServer) -> None:
    async def walk() -> None:
        async with client.sequence("sum") as sequence:
            for turn in range(1, 11):
                assert (await sequence.step([1, 1]))[0] == turn

    async with AsyncClient(recorder.address) as client:
        await asyncio.gather(*(walk() for _ in range(50)))
    assert len(recorder.frames) == 10


async def test_steps_gather_while_a_message_is_being_taken(recorder: RecordingServer) -> None:
    """Sequences that do not wait for each other share messages all the same."""

    async def walk(number: int) -> None:
        async with client.sequence("sum") as sequence:
            for turn in range(20):
                await asyncio.sleep(0.0001 * (number % 7 + turn % 3))
                await sequence.step([1, 1])

    async with AsyncClient(recorder.address) as client:
        await asyncio.gather(*(walk(number) for number in range(50)))
    assert len(recorder.frames) < 50 * 20


async def test_a_lone_step_leaves_at_once_and_costs_one_message(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client, client.sequence("sum") as sequence:
        before = len(recorder.requests)
        for turn in range(1, 31):
            assert (await sequence.step([1, 0]))[0] == turn
        # Acknowledgements rode along: nothing is held but the last output.
        assert len(recorder.requests) - before == 30
        held = recorder.model.sequences[sequence.sequence_id]
        assert held.applied - held.floor == 1


async def test_a_group_makes_one_frame(recorder: RecordingServer) -> None:
    async with AsyncClient(recorder.address) as client:
        names = [f"row-{row}" for row in range(300)]
        async with client.group("sum", names) as group:
            rows = np.arange(600).reshape(300, 2)
            for turn in range(1, 4):
                result = await group.step(rows)
                assert len(recorder.frames) == turn
                assert np.array_equal(result.outputs, turn * rows)
            assert (group.step_counts == 3).all()


def test_a_group_of_threads_makes_one_frame_too(recorder: RecordingServer) -> None:
    with Client(recorder.address) as client:
        with client.group("sum", [f"row-{row}" for row in range(300)]) as group:
            rows = np.arange(600).reshape(300, 2)
            assert np.array_equal(group.step(rows).check(), rows)
        assert len(recorder.frames) == 1


def test_what_threads_ask_while_a_message_is_being_taken_leaves_together(
    recorder: RecordingServer,
) -> None:
    with Client(recorder.address) as client:
        sequences = [client.sequence("sum") for _ in range(20)]
        for sequence in sequences:
            sequence.open()
        before = len(recorder.requests)
        stream = client._streams["sum"]
        threads = [threading.Thread(target=sequence.step, args=([1, 1],)) for sequence in sequences]
        with stream.lock:  # as the sender would, while it makes a message
            for thread in threads:
                thread.start()
            calls = [sequence._submit([1, 1]) for sequence in sequences]
        for thread in threads:
            thread.join()
        for call in calls:
            stream.wait(call)
        assert len(recorder.requests) - before < 40


async def test_long_chunks_keep_within_credit_and_are_acknowledged_in_time() -> None:
    limits = Limits(
        request_bytes_max=8192, chunk_steps_max=7, credit_steps=64, unacknowledged_steps_max=10
    )
    # The server asserts that credit and sizes are kept, and runs no more than 10 ahead.
    with RecordingServer(limits) as recorder:
        client = AsyncClient(recorder.address)
        async with client, client.sequence("sum") as one, client.sequence("sum") as two:
            rows = np.ones((500, 2), np.int64)
            outputs = await asyncio.gather(one.step(rows), two.step(2 * rows))
            assert np.array_equal(outputs[0], np.cumsum(rows, axis=0))
            assert np.array_equal(outputs[1], 2 * outputs[0])


async def test_a_bad_row_of_a_group_leaves_the_others_alone(recorder: RecordingServer) -> None:
    client = AsyncClient(recorder.address)
    async with client, client.group("sum", ["a", "b", "c"]) as group:
        bad = np.array([[[1, 1], [1, 1]], [[1, 1], [POISON, 0]], [[1, 1], [1, 1]]])
        result = await group.step(bad)
        assert result.ok.tolist() == [True, False, True]
        assert result.errors.keys() == {1}
        assert isinstance(result.errors[1], InvalidInput)
        assert (result.errors[1].sequence_id, result.errors[1].step) == ("b", 1)
        assert result.outputs[:, :, 0].tolist() == [[1, 2], [1, 0], [1, 2]]
        # Each row goes on from where it stands.
        assert group.step_counts.tolist() == [2, 1, 2]
        again = await group.step(np.ones((3, 2), np.int64))
        assert again.ok.all()
        assert again.outputs[:, 0].tolist() == [3, 2, 3]
