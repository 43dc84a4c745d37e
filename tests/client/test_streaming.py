"""Through a real server: what is streamed is a plain ONNX Runtime run of the whole, bit for bit."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from sluice_client import (
    AsyncClient,
    Client,
    Fenced,
    InvalidInput,
    Mode,
    NonFinite,
    SequenceClosed,
    SequenceExists,
    SequenceNotFound,
    StepFailed,
    WrongModel,
)


def run_offline(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    """All steps of one sequence in one run at batch 1: [steps, …] for each output."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    steps = len(next(iter(inputs.values())))
    feed = {name: array[np.newaxis] for name, array in inputs.items()}
    for argument in session.get_inputs():
        if argument.name == "lengths":
            feed["lengths"] = np.array([steps], np.int32)
        elif argument.name == "state":
            feed["state"] = np.zeros((1, argument.shape[1]), np.float32)
    names = [output.name for output in session.get_outputs() if output.name != "state_out"]
    return [array[0] for array in session.run(names, feed)]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


async def test_single_steps_chunks_and_streams_equal_one_offline_run(server, lstm_file) -> None:
    x = draw(40, 8)
    (expected,) = run_offline(lstm_file.path, x=x)
    async with AsyncClient(server.address) as client, client.sequence("lstm") as sequence:
        rows = [await sequence.step(row) for row in x[:5]]
        rows += list(await sequence.step(x[5:17]))
        rows += [y async for y in sequence.stream(x[17:30])]
        async for chunk in sequence.stream([x[30:33], x[33:40]]):
            rows += list(chunk)
        assert np.array_equal(rows, expected)
        assert rows[0].dtype == np.float32
        assert sequence.step_count == 40


def test_the_blocking_client_gives_the_same(server, lstm_file) -> None:
    x = draw(40, 8)
    (expected,) = run_offline(lstm_file.path, x=x)
    with Client(server.address) as client, client.sequence("lstm") as sequence:
        rows = [sequence.step(row) for row in x[:5]]
        rows += list(sequence.step(x[5:17]))
        rows += list(sequence.stream(x[17:40]))
        assert np.array_equal(rows, expected)


async def test_many_sequences_at_once_equal_their_offline_runs(server, lstm_file) -> None:
    async def walk(number: int) -> None:
        x = draw(5 + number % 4, 8, seed=number)
        async with client.sequence("lstm") as sequence:
            rows = [await sequence.step(row) for row in x]
        assert np.array_equal(rows, run_offline(lstm_file.path, x=x)[0])

    async with AsyncClient(server.address) as client:
        await asyncio.gather(*map(walk, range(60)))


def test_threads_share_a_client(server, accumulator_file) -> None:
    totals = {}

    def walk(number: int) -> None:
        with client.sequence("accumulator") as sequence:
            for _ in range(10):
                totals[number] = sequence.step([number])[0]

    with Client(server.address) as client:
        threads = [threading.Thread(target=walk, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert totals == {number: 10 * number for number in range(20)}


async def test_a_group_equals_its_rows_alone(server, lstm_file) -> None:
    x = draw(12, 9, 8)
    client = AsyncClient(server.address)
    async with client, client.group("lstm", [f"row {row}" for row in range(12)]) as group:
        outputs = [(await group.step(x[:, step])).check() for step in range(4)]
        outputs.append((await group.step(x[:, 4:])).check())
    got = np.concatenate([np.stack(outputs[:4], axis=1), outputs[4]], axis=1)
    for row in range(12):
        assert np.array_equal(got[row], run_offline(lstm_file.path, x=x[row])[0])


async def test_a_model_of_scalars_takes_scalars(server, embedding_file) -> None:
    tokens = np.array([3, 1, 4, 1, 5])
    (expected,) = run_offline(embedding_file.path, tokens=tokens)
    async with AsyncClient(server.address) as client, client.sequence("embedding") as sequence:
        rows = [await sequence.step(int(token)) for token in tokens[:2]]
        rows += list(await sequence.step(tokens[2:]))
        assert np.array_equal(rows, expected)
        with pytest.raises(InvalidInput, match="from 0 to 31"):
            await sequence.step(32)


async def test_several_inputs_and_outputs_go_by_name(server, multi_file) -> None:
    features, tokens = draw(6, 6), np.arange(6)
    expected = run_offline(multi_file.path, features=features, tokens=tokens)
    async with AsyncClient(server.address) as client, client.sequence("multi") as sequence:
        first = await sequence.step({"tokens": 0, "features": features[0]})
        rest = await sequence.step({"tokens": tokens[1:], "features": features[1:]})
    assert first.keys() == {"scores", "choice"}
    assert np.array_equal([first["scores"], *rest["scores"]], expected[0])
    assert np.array_equal([first["choice"], *rest["choice"]], expected[1])


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        ("lstm", np.zeros(7), r"float32 \[8\] for one step or float32 \[steps, 8\]"),
        ("lstm", np.zeros((0, 8)), "at least one"),
        ("lstm", np.zeros((2, 2, 8)), "not shape"),
        ("lstm", ["one"] * 8, "does not fit"),
        ("lstm", {"z": np.zeros(8)}, r"inputs are \['x'\], not \['z'\]"),
        ("lstm", np.full(8, 1e300), "too large"),
        ("embedding", 1.5, "cast it yourself"),
        ("embedding", 2**70, "does not fit"),
        ("multi", np.zeros(6), "several inputs"),
        ("multi", {"features": np.zeros((2, 6)), "tokens": [1]}, "differ"),
    ],
)
async def test_wrong_input_is_refused_before_it_is_sent(server, model, x, message) -> None:
    async with AsyncClient(server.address) as client, client.sequence(model) as sequence:
        with pytest.raises(InvalidInput, match=message) as caught:
            await sequence.step(x)
        assert isinstance(caught.value, ValueError)
        assert caught.value.sequence_id == sequence.sequence_id
        assert sequence.step_count == 0


async def test_what_the_server_refuses_leaves_the_sequence_as_it_was(server) -> None:
    async with AsyncClient(server.address) as client, client.sequence("accumulator") as sequence:
        await sequence.step([1])
        with pytest.raises(StepFailed) as caught:
            await sequence.step([[2], [np.nan], [3]])
        assert isinstance(caught.value, InvalidInput | NonFinite)
        applied = 0 if caught.value.outputs is None else len(caught.value.outputs)
        assert caught.value.step == sequence.step_count == 1 + applied
        assert (await sequence.step([4])).tolist() == [5 + 2 * applied]


async def test_a_stream_stops_at_the_step_that_failed(server) -> None:
    async with AsyncClient(server.address) as client, client.sequence("accumulator") as sequence:
        totals = []
        with pytest.raises(StepFailed) as caught:
            async for y in sequence.stream([[1], [1], [np.nan], [1], [1]]):
                totals += y.tolist()
        assert totals == [1, 2]
        assert caught.value.step == 2
        # Nothing given behind it was applied, and nothing is left to settle.
        assert (await sequence.step([1])).tolist() == [3]


async def test_a_state_is_a_value_that_starts_other_sequences(server) -> None:
    async with AsyncClient(server.address) as client, client.sequence("accumulator") as one:
        await one.step([[1], [2]])
        state = await one.state()
        assert (state.step, state.row.tolist()) == (2, [3.0])
        async with client.sequence("accumulator", state=state) as two:
            assert (await two.step([10])).tolist() == [13]
            assert two.step_count == 3
        assert (await one.step([1])).tolist() == [4]
        with pytest.raises(WrongModel):
            await client.sequence("lstm", state=state).open()


async def test_an_id_that_is_alive_is_refused_taken_over_or_restarted(server) -> None:
    async with AsyncClient(server.address) as mine, AsyncClient(server.address) as yours:
        first = mine.sequence("accumulator", "shared")
        await first.open()
        await first.step([5])
        with pytest.raises(SequenceExists):
            await yours.sequence("accumulator", "shared").open()
        second = yours.sequence("accumulator", "shared", mode=Mode.TAKEOVER)
        await second.open()
        assert second.step_count == 1
        assert (await second.step([1])).tolist() == [6]
        with pytest.raises(Fenced):
            await first.step([1])
        third = mine.sequence("accumulator", "shared", mode=Mode.RESTART)
        await third.open()
        assert (await third.step([1])).tolist() == [1]
        await third.close()
        # Over a closed one: the client learns the epoch by itself.
        async with yours.sequence("accumulator", "shared") as fourth:
            assert (await fourth.step([2])).tolist() == [2]


async def test_a_parked_sequence_waits_for_whoever_takes_it_over(server) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(SequenceNotFound):
            await client.sequence("accumulator", "parked", mode=Mode.TAKEOVER).open()
        async with client.sequence("accumulator", "parked") as sequence:
            await sequence.step([1])
            await sequence.park()
        with pytest.raises(SequenceClosed):
            await sequence.step([1])
    client = Client(server.address)
    with client, client.sequence("accumulator", "parked", mode=Mode.START_OR_RESUME) as sequence:
        assert sequence.step([1]).tolist() == [2]


async def test_an_exception_parks_and_a_normal_end_closes(server) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.sequence("accumulator", "kept") as sequence:
                await sequence.step([7])
                raise ZeroDivisionError
        async with client.sequence("accumulator", "kept", mode=Mode.TAKEOVER) as sequence:
            assert (await sequence.step([1])).tolist() == [8]
        with pytest.raises(SequenceNotFound):
            await client.sequence("accumulator", "kept", mode=Mode.TAKEOVER).open()


async def test_a_group_opens_as_a_whole_or_not_at_all(server) -> None:
    async with AsyncClient(server.address) as client, client.sequence("accumulator", "b"):
        with pytest.raises(SequenceExists) as caught:
            await client.group("accumulator", ["a", "b", "c"]).open()
        assert caught.value.sequence_id == "b"
        async with client.group("accumulator", ["a", "c"]) as group:
            assert (await group.step([[1], [2]])).outputs.tolist() == [[1], [2]]


@pytest.mark.parametrize(("ids", "message"), [([], "at least one"), (["a", "b", "a"], "twice")])
async def test_a_group_of_none_or_of_doubles_is_refused(server, ids, message) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(ValueError, match=message):
            client.group("accumulator", ids)


async def test_models_tell_what_they_take(server) -> None:
    async with AsyncClient(server.address) as client:
        names = {model.name for model in await client.models()}
        assert names == {"accumulator", "lstm", "embedding", "multi"}
        contract = await client.model("lstm")
        assert list(contract.inputs[0].shape) == [8]
