"""Whatever one client asks for, and however it behaves, what it costs has a bound."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from sluice_service.errors import StoppingError
from sluice_service.rpc.open_inference.requests import InferRequest
from tests.compat.caller import SECONDS, Caller, request, values
from tests.compat.inside import dispatcher, inference, unanswered
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
    error = StoppingError("no more today")
    dispatcher(served).dismiss_all(error)
    answers = await asyncio.gather(*calls)
    assert answers == [(Code.UNAVAILABLE, "no more today")] * len(calls)
    assert error.__traceback__ is None


async def test_an_output_that_is_named_again_and_again_comes_once(caller) -> None:
    message = request([[[1], [2]]])
    for _ in range(1000):
        message.outputs.add(name="y")
    answer = await caller.send(message)
    assert [tensor.name for tensor in answer.outputs] == ["y"]
    assert values(answer) == [1, 3]
    assert len(answer.raw_output_contents) == 1


@pytest.mark.parametrize(
    ("model", "limits", "most"),
    [
        ("unknown", {"unacknowledged_steps_max": 8}, 8),
        ("unknown" * 20_000, {"stream_queue_bytes_max": 1_000_000}, 9),
        (MODEL, {"stream_queue_bytes_max": 1_000_000}, 9),
    ],
)
async def test_a_stream_is_read_no_further_while_much_of_it_is_unanswered(
    sums, model, limits, most
) -> None:
    served = await sums(sequences_max=1, **limits)
    caller = Caller(served.channel)
    await caller.infer(1, sequence_id=1, sequence_start=True)
    # Behind a request that waits, what cannot be served waits too: it is 140 kB or a few bytes.
    stream = caller.stream()
    await stream.send(request(5, sequence_id=2, sequence_start=True))
    await waiting(served, 1)
    label = "id" * 70_000 if model == MODEL else ""
    bad = [request(1, model=model, label=label, sequence_id=3) for _ in range(40)]
    sending = asyncio.ensure_future(stream.send(*bad))
    await eventually(lambda: unanswered(served) == most)
    # The server goes on with others, and has not read on.
    for _ in range(5):
        await caller.infer(1, sequence_id=1)
    assert unanswered(served) == most
    await caller.infer(1, sequence_id=1, sequence_end=True)
    answers = [await stream.read() for _ in range(41)]
    await sending
    assert not answers[0].error_message
    assert all(answer.error_message for answer in answers[1:])


# Batches of requests without a sequence.


async def test_a_batch_that_is_refused_leaves_nobody_in_the_line(sums) -> None:
    served = await sums(sequences_max=1, backlog_sequences_max=4)
    caller = Caller(served.channel)
    await caller.infer(1, sequence_id=1, sequence_start=True)
    code, _ = await caller.fails(request([[1]] * 8))
    assert code is Code.RESOURCE_EXHAUSTED
    await waiting(served, 0)
    assert not dispatcher(served).waiting_steps
    others = []
    for place, sequence in enumerate((2, 3, 4, 5), start=1):
        message = request(sequence, sequence_id=sequence, sequence_start=True, sequence_end=True)
        others.append(asyncio.ensure_future(caller.send(message)))
        await waiting(served, place)
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert [values(await other) for other in others] == [[2], [3], [4], [5]]


async def test_a_batch_of_which_one_row_has_failed_waits_for_no_more_places(sums) -> None:
    served = await sums(sequences_max=1)
    caller = Caller(served.channel)
    await caller.infer(1, sequence_id=1, sequence_start=True)
    failing = asyncio.ensure_future(caller.fails(request([[np.nan], [2], [3]])))
    await waiting(served, 3)
    other = asyncio.ensure_future(caller.infer(4, sequence_id=2, sequence_start=True))
    await waiting(served, 4)
    await caller.infer(1, sequence_id=1, sequence_end=True)
    code, text = await failing
    assert code is Code.INVALID_ARGUMENT
    assert "NaN" in text
    assert await other == [4]
    # The rows behind it were not run for nobody.
    assert served.metric("sluice_steps_total", model=MODEL) == 3


async def test_a_place_that_expires_as_a_request_borrows_it_is_opened_again(hands, sums) -> None:
    served = await sums(sequence_idle_seconds_max=60)
    caller = Caller(served.channel)
    (host,) = served.server.hosts.values()
    assert await caller.infer(1) == [1]
    hands.go(host, 61)
    done = asyncio.Event()
    borrower = InferRequest(done.set)
    inference(served).submit(request([[[2], [3]]]), borrower)
    await host.expire()
    await asyncio.wait_for(done.wait(), SECONDS)
    assert borrower.error is None
    assert np.frombuffer(borrower.outputs[0], "<f4").tolist() == [2, 5]
    assert await caller.infer(4) == [4]


async def test_a_defect_in_the_opening_of_sequences_is_told_to_all_who_wait_for_it(
    sums, monkeypatch
) -> None:
    served = await sums()
    caller = Caller(served.channel)
    (host,) = served.server.hosts.values()

    async def break_down(*_: Any, **__: Any) -> None:
        raise RuntimeError("this is a defect")

    with monkeypatch.context() as broken:
        broken.setattr(host, "open", break_down)
        for fields in ({"sequence_id": 1, "sequence_start": True}, {}):
            code, text = await caller.fails(request(1, **fields))
            assert (code, text) == (Code.INTERNAL, "an error inside the server")
    assert not dispatcher(served).waiting_steps
    assert await caller.infer(1, sequence_id=1, sequence_start=True) == [1]
    assert await caller.infer(2) == [2]


# Answers that are kept for those who repeat.


async def test_answers_beyond_their_bytes_are_forgotten_the_oldest_first(monkeypatch, sums) -> None:
    monkeypatch.setattr("sluice_service.rpc.open_inference.last_answers._BYTES_MAX", 10_000)
    served = await sums()
    caller = Caller(served.channel)
    long, asked = np.ones((1, 500, 1)), {}
    for sequence in (1, 2, 3, 4):
        await caller.infer(1, sequence_id=sequence, sequence_start=True, sequence_step=0)
        message = request(long, sequence_id=sequence, sequence_step=1, sequence_end=sequence == 3)
        asked[sequence] = message, await caller.send(message)
    code, text = await caller.fails(asked[1][0])
    assert code is Code.OUT_OF_RANGE
    assert "sequence_step 501" in text
    for sequence in (2, 3, 4):
        message, answer = asked[sequence]
        assert await caller.send(message) == answer
    # Who has lost no answer goes on, and one that is too long by itself is not kept at all.
    assert await caller.infer(1, sequence_id=1, sequence_step=501) == [502]
    message = request(np.ones((1, 3000, 1)), sequence_id=1, sequence_step=502, sequence_end=True)
    await caller.send(message)
    code, _ = await caller.fails(message)
    assert code is Code.NOT_FOUND
    assert not dispatcher(served).answers.bytes


async def test_an_answer_goes_with_its_sequence_unless_it_is_to_the_end(hands, sums) -> None:
    served = await sums(sequence_idle_seconds_max=60)
    caller = Caller(served.channel)
    (host,) = served.server.hosts.values()
    for sequence in ("idle", "ended", "uncounted"):
        fields = {"sequence_id": sequence, "sequence_start": True, "sequence_step": 0}
        await caller.infer(1, sequence_end=sequence == "ended", **fields)
    await caller.infer(1, sequence_id="uncounted")
    hands.go(host, 61)
    await host.expire()
    answers = dispatcher(served).answers
    await eventually(lambda: list(answers._answers) == ["string:ended"])
    assert answers.bytes == answers._answers["string:ended"].bytes
    assert await caller.infer(2, sequence_id="ended", sequence_start=True) == [2]
    assert not answers.bytes
