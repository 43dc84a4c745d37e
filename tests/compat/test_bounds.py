"""What one client asks for, and how it behaves, costs the server and others no more than it says."""

import asyncio
from typing import Any

import grpc

from sluice_service.errors import StoppingError
from tests.compat.caller import Caller, request, values
from tests.service.wire import Served, eventually

Code = grpc.StatusCode
MODEL = "accumulator"


async def waiting(served: Served, count: int) -> None:
    """Return once so many sequences wait for a place."""
    await eventually(lambda: served.metric("sluice_sequences_waiting", model=MODEL) == count)


async def test_one_error_that_ends_many_calls_brings_nothing_of_one_to_another(sums) -> None:
    served = await sums(sequences_max=1)
    caller = Caller(served.channel)
    await caller.infer(1, sequence_id=1, sequence_start=True)
    calls = [
        asyncio.ensure_future(caller.fails(request(1, sequence_id=sequence, sequence_start=True)))
        for sequence in range(2, 12)
    ]
    await waiting(served, len(calls))
    unseen: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unseen.append(context))
    error = StoppingError("no more today")
    served.server._open_inference._models[MODEL].exchange.dismiss(error)
    answers = await asyncio.gather(*calls)
    loop.set_exception_handler(None)
    assert answers == [(Code.UNAVAILABLE, "no more today")] * len(calls)
    assert error.__traceback__ is None
    assert not unseen


async def test_an_output_that_is_named_again_and_again_comes_once(caller) -> None:
    message = request([[[1], [2]]])
    for _ in range(1000):
        message.outputs.add(name="y")
    answer = await caller.send(message)
    assert [tensor.name for tensor in answer.outputs] == ["y"]
    assert values(answer) == [1, 3]
    assert len(answer.raw_output_contents) == 1
