"""Sequences of the Open Inference Protocol that outlive their server."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import numpy as np
import pytest

from sluice_protos.open_inference_pb2 import ModelInferRequest
from sluice_service.rpc.open_inference.requests import InferRequest
from sluice_service.store import Key, StoreError, unpack
from tests.client.server_process import ServerProcess
from tests.client.test_streaming import run_offline
from tests.compat.caller import Caller, request, values
from tests.compat.inside import dispatcher, inference
from tests.service.test_durability import crash
from tests.service.wire import Served, eventually, floats

Code = grpc.StatusCode
Replicas = Callable[..., Awaitable[Served]]


@pytest.fixture
async def replica(sums, tmp_path) -> Replicas:
    """`await replica(**settings)`: one more server over the same store."""

    async def start(**settings: Any) -> Served:
        fields = {"durability": "strict", "checkpoint_seconds": 1e6, **settings}
        return await sums(store=f"sqlite:///{tmp_path}/sequences.db", **fields)

    return start


@pytest.mark.parametrize("counts", [False, True])
async def test_strict_a_sequence_goes_on_at_the_next_server(replica, counts) -> None:
    def step(number: int) -> dict[str, int]:
        return {"sequence_step": number} if counts else {}

    first = await replica()
    caller = Caller(first.channel)
    assert await caller.infer(1, sequence_id=1, sequence_start=True, **step(0)) == [1]
    assert await caller.infer(2, sequence_id=1, **step(1)) == [3]
    await crash(first)
    caller = Caller((await replica()).channel)
    assert await caller.infer(3, sequence_id=1, **step(2)) == [6]
    assert await caller.infer(4, sequence_id=1, sequence_end=True, **step(3)) == [10]


async def test_drained_a_sequence_goes_on_at_the_next_server(replica) -> None:
    first = await replica(durability="periodic")
    await Caller(first.channel).infer([[[1], [2]]], sequence_id="a", sequence_start=True)
    await first.server.stop()
    first.is_stopped = True
    caller = Caller((await replica(durability="periodic")).channel)
    assert await caller.infer(3, sequence_id="a") == [6]


async def test_periodic_who_counts_steps_replays_and_others_are_told_the_last_durable_one(
    replica,
) -> None:
    settings = {"durability": "periodic", "checkpoint_steps": 2}
    first = await replica(**settings)
    caller = Caller(first.channel)
    assert await caller.infer([[[1], [2]]], sequence_id=1, sequence_start=True) == [1, 3]
    (host,) = first.server.hosts.values()
    await eventually(lambda: host._table.durable[0] == 2)
    assert await caller.infer(3, sequence_id=1) == [6]
    await crash(first)
    caller = Caller((await replica(**settings)).channel)
    code, text = await caller.fails(request(4, sequence_id=1))
    assert code is Code.NOT_FOUND
    assert "last durable step is 2" in text
    # It had three, and the store has two.
    code, text = await caller.fails(request(4, sequence_id=1, sequence_step=3))
    assert code is Code.FAILED_PRECONDITION
    assert "sequence_step 2" in text
    assert await caller.infer(3, sequence_id=1, sequence_step=2) == [6]
    assert await caller.infer(4, sequence_id=1, sequence_step=3, sequence_end=True) == [10]


# The answer to the last request, asked for again.


async def test_killed_servers_answer_the_last_request_again_with_the_same_bits(
    lstm_file, tmp_path
) -> None:
    x = np.random.default_rng(1).standard_normal((9, 8)).astype(np.float32)
    (expected,) = run_offline(lstm_file.path, x=x)
    flags = ("--store", f"sqlite:///{tmp_path}/sequences.db", "--durability", "strict")
    answers: list[bytes] = []
    for number in range(4):
        server = ServerProcess({"lstm": lstm_file.path}, *flags)
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                caller = Caller(channel)
                for again in [number - 1, number] if number else [number]:
                    answer = await caller.send(_part(x, again))
                    if again == number:
                        answers += answer.raw_output_contents
                    assert list(answer.outputs[0].shape) == [1, len(_rows(x, again)), 4]
                    assert answer.raw_output_contents[0] == answers[again]
        finally:
            server.kill()
    assert b"".join(answers) == expected.tobytes()


def _rows(x: np.ndarray, number: int) -> np.ndarray:
    return x[[0, 1, 3, 7][number] : [1, 3, 7, 9][number]]


def _part(x: np.ndarray, number: int) -> ModelInferRequest:
    """The sequence in four requests of 1, 2, 4 and 2 steps, without an END."""
    begin = {"sequence_start": True} if not number else {}
    first = [0, 1, 3, 7][number]
    return request(
        _rows(x, number)[np.newaxis], model="lstm", sequence_id="kept", sequence_step=first, **begin
    )


async def test_only_the_last_request_is_answered_again(replica) -> None:
    first = await replica()
    await count(Caller(first.channel), [[1], [2, 3], [4, 5]])
    await crash(first)
    caller = Caller((await replica()).channel)
    for numbers, step in (([2, 3], 1), ([1], 0), ([3, 4], 2)):
        code, text = await caller.fails(part(numbers, step))
        assert code is Code.OUT_OF_RANGE
        assert "go on with sequence_step 5" in text
    # What is held for a repeat is no answer to another request.
    stream = caller.stream()
    await stream.send(part([4], 3), part([6], 5))
    assert "go on with sequence_step 5" in (await stream.read()).error_message
    assert await stream.take(1) == [[21]]


@pytest.mark.parametrize("how", ["checkpoint", "drain"])
async def test_periodic_the_last_answer_is_as_durable_as_the_state(replica, how) -> None:
    settings = {"durability": "periodic", "checkpoint_steps": 1 if how == "checkpoint" else 1000}
    first = await replica(**settings)
    await count(Caller(first.channel), [[1], [2, 3]])
    if how == "checkpoint":
        (host,) = first.server.hosts.values()
        await eventually(lambda: host._table.durable[0] == 3)
        await crash(first)
    else:
        await first.server.stop()
        first.is_stopped = True
    caller = Caller((await replica(**settings)).channel)
    assert await ask(caller, [2, 3], 1) == [3, 6]
    assert await ask(caller, [4], 3) == [10]


async def test_a_request_whose_server_died_in_the_middle_is_finished_by_the_next(
    gate, replica
) -> None:
    settings = {"run_steps_max": 2}
    first = await replica(**settings)
    begun = asyncio.ensure_future(count(Caller(first.channel), [[1]]))
    await gate.let_through()
    await begun
    lost = asyncio.ensure_future(ask(Caller(first.channel), [2, 3, 4, 5, 6], 1))
    for _ in range(2):
        await gate.let_through()
    # The last step of it stands at the gate, and the store has some of those before.
    store, key = first.server.store, Key("accumulator", "int64:1")
    while unpack((await store.read(key)).checkpoint.data).step == 1:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await gate.reached()
    gate.held.clear()
    await crash(first)
    await asyncio.gather(lost, return_exceptions=True)
    caller = Caller((await replica(**settings)).channel)
    again = asyncio.ensure_future(ask(caller, [2, 3, 4, 5, 6], 1))
    while not again.done():
        if gate.held:
            await gate.let_through()
        await asyncio.sleep(0.001)
    assert await again == [3, 6, 10, 15, 21]


async def test_an_answer_longer_than_what_is_held_comes_once(replica) -> None:
    first = await replica(unacknowledged_steps_max=4, run_steps_max=3)
    caller = Caller(first.channel)
    assert await count(caller, [[1], [1] * 11]) == list(range(1, 13))
    await crash(first)
    caller = Caller((await replica()).channel)
    code, _ = await caller.fails(part([1] * 11, 1))
    assert code is Code.OUT_OF_RANGE
    assert await ask(caller, [1], 12) == [13]


async def test_a_start_begins_again_and_an_end_is_over_at_the_next_server(replica) -> None:
    first = await replica()
    await count(Caller(first.channel), [[1, 2]])
    await crash(first)
    second = await replica()
    caller = Caller(second.channel)
    assert await count(caller, [[1, 2], [3]]) == [1, 3, 6]
    end = part([4], 3, sequence_end=True)
    assert values(await caller.send(end)) == [10]
    await eventually(lambda: second.find("accumulator", "int64:1") is None)
    await crash(second)
    code, text = await Caller((await replica()).channel).fails(end)
    assert code is Code.NOT_FOUND
    assert "its client ended it" in text


async def test_an_end_that_was_not_told_is_told_by_the_next_server(replica, monkeypatch) -> None:
    first = await replica()
    caller = Caller(first.channel)
    await count(caller, [[1]])
    end = part([2], 1, sequence_end=True)
    monkeypatch.setattr(first.server.store, "close", _fail)
    assert values(await caller.send(end)) == [3]
    await crash(first)
    second = await replica()
    assert values(await Caller(second.channel).send(end)) == [3]
    await eventually(lambda: second.find("accumulator", "int64:1") is None)


async def test_only_the_last_answer_is_held_and_only_for_those_who_count(replica) -> None:
    served = await replica()
    caller = Caller(served.channel)

    def held(name: str) -> int:
        info = served.find("accumulator", name)
        assert info is not None
        return info.held_steps

    await count(caller, [[1, 2], [3, 4, 5]])
    assert held("int64:1") == 3
    await count(caller, [[6]], at=5)
    assert held("int64:1") == 1
    await caller.infer(1, sequence_id=2, sequence_start=True)
    assert held("int64:2") == 0


@pytest.mark.parametrize("durability", ["off", "strict"])
async def test_a_repeat_is_answered_by_whoever_began_in_the_middle(replica, durability) -> None:
    first = await replica(durability=durability)
    caller = Caller(first.channel)
    await caller.infer(1, sequence_id=1, sequence_start=True)
    assert await ask(caller, [2], 1) == [3]
    assert await ask(caller, [2], 1) == [3]
    assert await ask(caller, [3], 2) == [6]


async def test_a_sequence_that_others_had_meanwhile_goes_on_at_the_next_server(replica) -> None:
    first = await replica()
    caller = Caller(first.channel)
    await count(caller, [[1], [2]])
    wire = first.wire("accumulator")
    await wire.open(0, "int64:1", mode="RESUME")
    await wire.push(0, floats([3]))
    assert (await wire.rows(0, 1)).tolist() == [[6]]
    assert await ask(caller, [4], 3) == [10]
    await crash(first)
    caller = Caller((await replica()).channel)
    assert await ask(caller, [4], 3) == [10]
    assert await ask(caller, [5], 4) == [15]


@pytest.mark.parametrize("seed", range(8))
async def test_whoever_repeats_until_answered_gets_every_output_once(replica, seed) -> None:
    """One sequence over servers that die: before they answer, after, or in between."""
    draw = random.Random(seed)
    served, step, outputs = await replica(run_steps_max=2), 0, []
    for _ in range(8):
        steps, fate = draw.randint(1, 5), draw.choice(["answered", "lost", "again", "dies"])
        message = part(range(step + 1, step + steps + 1), step, sequence_start=step == 0)
        if fate == "lost":
            lost = asyncio.ensure_future(Caller(served.channel).send(message))
            for _ in range(draw.randint(0, 60)):
                await asyncio.sleep(0)
            await crash(served)
            await asyncio.gather(lost, return_exceptions=True)
            served = await replica(run_steps_max=2)
        answer = values(await Caller(served.channel).send(message))
        if fate == "dies":
            await crash(served)
            served = await replica(run_steps_max=2)
        if fate in ("dies", "again"):
            assert values(await Caller(served.channel).send(message)) == answer
        outputs += answer
        step += steps
    assert outputs == np.cumsum(np.arange(1, step + 1)).tolist()


def part(numbers: Iterable[float], step: int, **fields: Any) -> ModelInferRequest:
    """A request of sequence 1 that counts its steps."""
    steps = np.array(list(numbers), np.float32).reshape(1, -1, 1)
    return request(steps, sequence_id=1, sequence_step=step, **fields)


async def ask(caller: Caller, numbers: Iterable[float], step: int, **fields: Any) -> list[float]:
    return values(await caller.send(part(numbers, step, **fields)))


async def count(caller: Caller, parts: Iterable[list[float]], *, at: int = 0) -> list[float]:
    """Ask for one part after another, from step `at` on; all answers."""
    answers: list[float] = []
    for numbers in parts:
        answers += await ask(caller, numbers, at, sequence_start=at == 0)
        at += len(numbers)
    return answers


# A store that goes away.


@pytest.mark.parametrize("counts", [False, True])
async def test_strict_a_sequence_goes_on_when_the_store_is_back(
    replica, monkeypatch, counts
) -> None:
    monkeypatch.setattr("sluice_service.durability.checkpointer._STRICT_WAIT_SECONDS", 0.0)
    served = await replica()
    caller = Caller(served.channel)
    step = {"sequence_step": 1} if counts else {}
    first = {"sequence_step": 0} if counts else {}
    await caller.infer(1, sequence_id=1, sequence_start=True, **first)
    await caller.infer(10, sequence_id=2, sequence_start=True, **first)
    store = served.server.store
    write = store.write
    monkeypatch.setattr(store, "write", _fail)
    code, text = await caller.fails(request(2, sequence_id=1, **step))
    assert code is Code.UNAVAILABLE
    assert "the store" in text
    await eventually(lambda: not dispatcher(served).lanes)
    monkeypatch.setattr(store, "write", write)
    if counts:
        assert await caller.infer(2, sequence_id=1, **step) == [3]
        step = {"sequence_step": 2}
    assert await caller.infer(3, sequence_id=1, **step) == [6]
    # One that asked for nothing meanwhile goes on as well.
    step = {"sequence_step": 1} if counts else {}
    assert await caller.infer(1, sequence_id=2, sequence_end=True, **step) == [11]


async def test_strict_what_the_store_held_up_goes_to_nobody_else(replica, monkeypatch) -> None:
    monkeypatch.setattr("sluice_service.durability.checkpointer._STRICT_WAIT_SECONDS", 0.0)
    served = await replica()
    caller = Caller(served.channel)
    # What no store holds up keeps the stream to the host in use.
    assert await caller.infer(1) == [1]
    store = served.server.store
    write = store.write
    monkeypatch.setattr(store, "write", _fail)
    code, _ = await caller.fails(request(1, sequence_id=1, sequence_start=True))
    assert code is Code.UNAVAILABLE
    # The next sequence gets the lane of that one, and waits for the store as well.
    monkeypatch.setattr("sluice_service.durability.checkpointer._STRICT_WAIT_SECONDS", 1e6)
    task = asyncio.ensure_future(caller.infer(20, sequence_id=2, sequence_start=True))

    def is_applied() -> bool:
        info = served.find("accumulator", "int64:2")
        return info is not None and info.step == 1

    await eventually(is_applied)
    monkeypatch.setattr(store, "write", write)
    assert await task == [20]


async def test_a_step_waits_for_no_store_that_is_asked_about_a_start_of_the_same_turn(
    replica, monkeypatch
) -> None:
    served = await replica(durability="periodic")
    await Caller(served.channel).infer(1, sequence_id=1, sequence_start=True)
    service, store = inference(served), served.server.store
    answering, claim = asyncio.Event(), store.claim

    async def claim_later(requests: Any) -> Any:
        await answering.wait()
        return await claim(requests)

    monkeypatch.setattr(store, "claim", claim_later)
    step, start = InferRequest(lambda: None), InferRequest(lambda: None)
    service.submit(request(2, sequence_id=1), step)
    service.submit(request(5, sequence_id=2, sequence_start=True), start)
    await eventually(lambda: step.is_done)
    assert not start.is_done
    answering.set()
    await eventually(lambda: start.is_done)
    assert [np.frombuffer(one.outputs[0], "<f4") for one in (step, start)] == [3, 5]


async def _fail(*_: Any) -> None:
    raise StoreError("it is away")
