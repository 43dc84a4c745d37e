"""Sequences of the Open Inference Protocol that outlive their server."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from tests.compat.caller import Caller, request
from tests.service.test_durability import crash
from tests.service.wire import Served, eventually

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
    (host,) = first.server._hosts.values()
    await eventually(lambda: host._sequences.durable[0] == 2)
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
