"""Sequences of the Open Inference Protocol, in the spirit of the tests its reference server has."""

import asyncio

import grpc
import numpy as np
import pytest

from sluice_protos.open_inference_pb2 import InferParameter
from sluice_protos.sequences_pb2 import OpenSequence
from sluice_service.rpc.open_inference.last_answers import _digest
from sluice_service.rpc.open_inference.requests import InferRequest
from tests.compat.caller import Caller, request, values
from tests.compat.inside import dispatcher, has_opened_and_closed, inference
from tests.service.wire import eventually, floats

Code = grpc.StatusCode


async def test_a_sequence_goes_on_from_request_to_request(caller) -> None:
    assert await caller.infer(1, sequence_id=101, sequence_start=True) == [1]
    assert await caller.infer(2, sequence_id=101) == [3]
    assert await caller.infer(3, sequence_id=101, sequence_end=True) == [6]


async def test_a_sequence_may_have_many_steps_in_one_request(caller) -> None:
    steps = [[[1], [2], [3]]]
    answer = await caller.send(request(steps, sequence_id="chunks", sequence_start=True))
    assert list(answer.outputs[0].shape) == [1, 3, 1]
    assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [1, 3, 6]
    assert await caller.infer(4, sequence_id="chunks", sequence_end=True) == [10]


async def test_steps_beyond_what_one_run_takes_come_back_in_one_answer(sums) -> None:
    caller = Caller((await sums(run_steps_max=4)).channel)
    numbers = np.arange(1, 12, dtype=np.float32)
    answer = await caller.infer(numbers.reshape(1, -1, 1), sequence_id=1, sequence_start=True)
    assert answer == np.cumsum(numbers).tolist()


async def test_length_one_is_a_sequence_too(caller) -> None:
    for _ in range(2):
        ends = {"sequence_start": True, "sequence_end": True}
        assert await caller.infer(5, sequence_id=102, **ends) == [5]


@pytest.mark.parametrize("end", [False, True])
async def test_no_start_is_told_as_clients_expect(caller, end) -> None:
    code, text = await caller.fails(request(1, sequence_id=103, sequence_end=end))
    assert code is Code.INVALID_ARGUMENT
    assert "sequence 103 to model 'accumulator' must specify the START flag" in text


async def test_a_sequence_that_has_ended_is_over(caller) -> None:
    await caller.infer(1, sequence_id=104, sequence_start=True, sequence_end=True)
    code, text = await caller.fails(request(1, sequence_id=104))
    assert code is Code.NOT_FOUND
    assert "must specify the START flag" in text
    assert "ended" in text


async def test_a_second_start_begins_again(caller) -> None:
    assert await caller.infer(1, sequence_id=105, sequence_start=True) == [1]
    assert await caller.infer(10, sequence_id=105, sequence_start=True) == [10]
    assert await caller.infer(1, sequence_id=105, sequence_end=True) == [11]


async def test_a_second_start_is_refused_where_the_server_says_so(sums) -> None:
    caller = Caller((await sums(duplicate_start="refuse")).channel)
    assert await caller.infer(1, sequence_id=1, sequence_start=True) == [1]
    code, _ = await caller.fails(request(10, sequence_id=1, sequence_start=True))
    assert code is Code.ALREADY_EXISTS
    assert await caller.infer(2, sequence_id=1) == [3]


async def test_numbers_and_strings_that_look_alike_are_different_sequences(caller) -> None:
    assert await caller.infer(1, sequence_id=7, sequence_start=True) == [1]
    assert await caller.infer(10, sequence_id="7", sequence_start=True) == [10]
    assert await caller.infer(100, sequence_id="int64:7", sequence_start=True) == [100]
    assert await caller.infer(1, sequence_id=7, sequence_end=True) == [2]
    assert await caller.infer(1, sequence_id="7", sequence_end=True) == [11]
    assert await caller.infer(1, sequence_id="int64:7", sequence_end=True) == [101]


@pytest.mark.parametrize("nothing", [0, ""])
async def test_zero_and_nothing_are_no_sequence(caller, nothing) -> None:
    assert await caller.infer(1, sequence_id=nothing) == [1]
    assert await caller.infer(1, sequence_id=nothing) == [1]
    code, text = await caller.fails(request(1, sequence_id=nothing, sequence_start=True))
    assert code is Code.INVALID_ARGUMENT
    assert "sequence_id" in text


async def test_interleaved_sequences_on_one_stream_do_not_mix(caller) -> None:
    stream = caller.stream()
    count, steps = 40, 6
    messages = [
        request(
            100 * sequence + step,
            sequence_id=1000 + sequence,
            sequence_start=step == 0,
            sequence_end=step == steps - 1,
        )
        for step in range(steps)
        for sequence in range(count)
    ]
    expected = [
        [sum(100 * sequence + before for before in range(step + 1))]
        for step in range(steps)
        for sequence in range(count)
    ]
    assert await stream.ask(messages) == expected


async def test_many_callers_at_once_do_not_mix(caller) -> None:
    async def run(sequence: int) -> list[float]:
        sums = []
        for step in range(5):
            flags = {"sequence_start": step == 0, "sequence_end": step == 4}
            sums += await caller.infer(sequence + step, sequence_id=f"many-{sequence}", **flags)
        return sums

    answers = await asyncio.gather(*(run(sequence) for sequence in range(60)))
    assert answers == [np.cumsum(np.arange(s, s + 5)).tolist() for s in range(60)]


async def test_an_id_can_be_used_again_while_requests_wait(caller) -> None:
    stream = caller.stream()
    ends = {"sequence_start": True, "sequence_end": True}
    messages = [
        request(1, sequence_id=106, sequence_start=True),
        request(2, sequence_id=106, sequence_end=True),
        request(5, sequence_id=106, sequence_start=True),
        request(6, sequence_id=106),
        request(9, sequence_id=106, **ends),
        request(4, sequence_id=106, **ends),
    ]
    assert await stream.ask(messages) == [[1], [3], [5], [11], [9], [4]]


async def test_answers_on_a_stream_come_in_the_order_of_requests(caller) -> None:
    stream = caller.stream()
    long = np.ones((1, 500, 1), np.float32)
    await stream.send(request(long, label="a", sequence_id=107, sequence_start=True))
    await stream.send(request(1, label="b"), request(1, label="c", sequence_id=108))
    await stream.send(request(1, label="d", sequence_id=107, sequence_end=True))
    responses = [await stream.read() for _ in range(4)]
    assert [response.infer_response.id for response in responses] == ["a", "b", "c", "d"]
    assert [bool(response.error_message) for response in responses] == [0, 0, 1, 0]
    assert np.frombuffer(responses[3].infer_response.raw_output_contents[0], "<f4") == [501]


async def test_a_sequence_survives_the_connection_it_began_on(caller) -> None:
    stream = caller.stream()
    assert await stream.ask([request(1, sequence_id=109, sequence_start=True)]) == [[1]]
    stream.call.cancel()
    assert await caller.infer(2, sequence_id=109, sequence_end=True) == [3]


async def test_two_new_sequences_after_a_cancelled_one_do_not_mix(caller) -> None:
    stream = caller.stream()
    long = np.ones((1, 2000, 1), np.float32)
    await stream.send(*(request(long, sequence_id=110, sequence_start=i == 0) for i in range(5)))
    stream.call.cancel()
    begin = {"sequence_start": True}
    assert await caller.infer(1, sequence_id=111, **begin) == [1]
    assert await caller.infer(2, sequence_id=112, **begin) == [2]
    assert await caller.infer(1, sequence_id=111, sequence_end=True) == [2]
    assert await caller.infer(1, sequence_id=112, sequence_end=True) == [3]


async def test_a_fault_leaves_the_sequence_as_it_was(caller) -> None:
    stream = caller.stream()
    await stream.send(
        request(1, sequence_id=113, sequence_start=True),
        request(np.nan, sequence_id=113, sequence_end=True),
        request(2, sequence_id=113, sequence_end=True),
    )
    first, bad, last = [await stream.read() for _ in range(3)]
    assert not first.error_message
    assert "NaN" in bad.error_message
    assert np.frombuffer(last.infer_response.raw_output_contents[0], "<f4") == [3]


async def test_a_request_that_fails_in_the_middle_tells_what_was_applied(sums) -> None:
    caller = Caller((await sums(run_steps_max=2)).channel)
    steps = [[[1], [2], [3e38], [3e38], [4]]]
    code, text = await caller.fails(
        request(steps, sequence_id=1, sequence_start=True, sequence_end=True)
    )
    assert code is Code.INVALID_ARGUMENT
    assert "first 2 steps were applied" in text
    assert await caller.infer(4, sequence_id=1, sequence_step=2, sequence_end=True) == [7]


async def test_sequences_that_have_ended_leave_nothing_behind(sums) -> None:
    served = await sums()
    caller = Caller(served.channel)
    for sequence in range(1, 20):
        ends = {"sequence_start": True, "sequence_end": sequence > 1}
        await caller.infer(1, sequence_id=sequence, **ends)
        await caller.fails(request(1, sequence_id=1000 + sequence))
    assert list(dispatcher(served).lanes) == ["int64:1"]
    assert served.metric("sluice_streams_open", model="accumulator") == 1
    await caller.infer(1, sequence_id=1, sequence_end=True)
    await eventually(lambda: not served.metric("sluice_streams_open", model="accumulator"))
    assert not dispatcher(served).lanes
    assert await caller.infer(2, sequence_id=1, sequence_start=True) == [2]


async def test_sequences_that_come_and_go_all_at_once_all_go(sums) -> None:
    served = await sums()
    caller = Caller(served.channel)
    ends = {"sequence_start": True, "sequence_end": True}
    for _ in range(10):
        messages = [request(number, sequence_id=number, **ends) for number in range(1, 30)]
        answers = await asyncio.gather(*map(caller.send, messages))
        assert [values(answer) for answer in answers] == [[number] for number in range(1, 30)]
    await eventually(lambda: not served.metric("sluice_streams_open", model="accumulator"))
    assert await served.list("accumulator") == {}


async def test_requests_without_a_sequence_keep_no_place_from_one_with(sums) -> None:
    served = await sums(sequences_max=16)
    caller = Caller(served.channel)
    await asyncio.gather(*(caller.infer(1) for _ in range(16)))
    for sequence in range(1, 17):
        await caller.infer(1, sequence_id=sequence, sequence_start=True)
    assert len(await served.list("accumulator")) == 16


async def test_an_idle_sequence_expires_and_says_so(hands, sums) -> None:
    served = await sums(sequence_idle_seconds_max=60)
    caller = Caller(served.channel)
    await caller.infer(1, sequence_id=1, sequence_start=True)
    (host,) = served.server.hosts.values()
    hands.go(host, 61)
    await host.expire()
    code, text = await caller.fails(request(1, sequence_id=1))
    assert code is Code.NOT_FOUND
    assert "must specify the START flag" in text
    assert "no step for 60 seconds" in text
    assert await caller.infer(3, sequence_id=1, sequence_start=True) == [3]


async def test_live_sequences_go_on_above_thousands_that_were_abandoned(
    hands, sums, monkeypatch
) -> None:
    # Turns have a time, not a size: with none, each is as short as it can be.
    monkeypatch.setattr("sluice_service.runtime.cooperative._TURN_SECONDS", -1.0)
    served = await sums(sequence_idle_seconds_max=60)
    caller = Caller(served.channel)
    (host,) = served.server.hosts.values()
    # By no socket: so many would take a busy machine a minute.
    service, begun = inference(served), []
    for number in range(1, 3001):
        begun.append(InferRequest(lambda: None))
        service.submit(request(1, sequence_id=number, sequence_start=True), begun[-1])
    await eventually(lambda: all(one.is_done for one in begun))
    assert not any(one.error for one in begun)
    assert await caller.infer(1, sequence_id="live", sequence_start=True) == [1]
    hands.go(host, 59)
    assert await caller.infer(1, sequence_id="live") == [2]
    hands.go(host, 2)
    # The event loop has its turn all the while: nothing stands still until all are gone.
    before, steps = 3001, []
    expiring = asyncio.ensure_future(host.expire())
    while not expiring.done():
        await asyncio.sleep(0)
        steps.append(before - (before := host.sequences_live))
    assert sum(steps) == 3000
    assert max(steps) == 1
    assert await caller.infer(1, sequence_id="live", sequence_end=True) == [3]
    code, text = await caller.fails(request(1, sequence_id=3000))
    assert code is Code.NOT_FOUND
    assert "no step for 60 seconds" in text


async def test_a_close_that_comes_late_ends_no_other_sequence(sums, monkeypatch) -> None:
    # Lanes are closed one by one, with much time between them for what follows.
    monkeypatch.setattr("sluice_service.runtime.cooperative._TURN_SECONDS", -1.0)
    monkeypatch.setattr("sluice_service.runtime.cooperative._ROUNDS", 1000)
    served = await sums()

    async def ask(sequence: int, **flags: bool) -> None:
        asked = InferRequest(lambda: None)
        inference(served).submit(request(1, sequence_id=sequence, **flags), asked)
        await eventually(lambda: asked.is_done)
        assert asked.error is None

    for sequence in (1, 2, 3):
        await ask(sequence, sequence_start=True)
    # All three end in one run. While the first is being closed, the last begins again, which
    # takes it from its old lane, and another sequence begins.
    await asyncio.gather(*(ask(sequence, sequence_end=True) for sequence in (1, 2, 3)))
    for sequence in (3, 4):
        await ask(sequence, sequence_start=True)
    await eventually(lambda: has_opened_and_closed(served))
    for sequence in (3, 4):
        await ask(sequence, sequence_end=True)


async def test_both_protocols_share_runs_and_never_states(served, caller) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "int64:120")
    code, _ = await caller.fails(request(1, sequence_id=121))
    assert code is Code.INVALID_ARGUMENT
    await caller.infer(1, sequence_id=121, sequence_start=True)
    await wire.push(0, floats([10]))
    assert (await wire.rows(0, 1)).tolist() == [[10]]
    assert await caller.infer(1, sequence_id=121, sequence_end=True) == [2]
    wire.cut()


async def test_a_sequence_taken_over_by_the_native_stream_must_start_again(served, caller) -> None:
    await caller.infer(1, sequence_id=122, sequence_start=True)
    wire = served.wire("accumulator")
    opened = await wire.open(0, "int64:122", mode="RESUME")
    assert opened.applied == 1
    await wire.push(0, floats([10]))
    assert (await wire.rows(0, 1)).tolist() == [[11]]
    await wire.send(close=[0])
    await wire.next_closed(0)
    code, _ = await caller.fails(request(1, sequence_id=122))
    assert code is Code.NOT_FOUND


async def test_the_native_protocol_sees_and_ends_these_sequences(served, caller) -> None:
    await caller.infer(1, sequence_id="seen", sequence_start=True)
    assert (await served.list("accumulator"))["string:seen"].step == 1
    assert await served.close("accumulator", "string:seen") == 1
    code, _ = await caller.fails(request(1, sequence_id="seen"))
    assert code is Code.NOT_FOUND


async def test_a_sequence_of_a_client_with_a_writer_is_not_given_away(served, caller) -> None:
    wire = served.wire("accumulator")
    await wire.send(
        open=[OpenSequence(lane=0, sequence_id="string:mine", mode="START", writer=b"w" * 16)]
    )
    await wire.next_opened(0)
    code, _ = await caller.fails(request(1, sequence_id="mine"))
    assert code is Code.FAILED_PRECONDITION
    wire.cut()


# Steps that are counted.


async def test_a_request_that_counts_its_steps_can_be_repeated(caller) -> None:
    begin = request(1, sequence_id=130, sequence_start=True, sequence_step=0)
    middle = request([[[2], [3]]], sequence_id=130, sequence_step=1)
    end = request(4, sequence_id=130, sequence_step=3, sequence_end=True)
    for message, answer in ((begin, [1]), (middle, [3, 6]), (end, [10])):
        for _ in range(3):
            response = await caller.send(message)
            assert np.frombuffer(response.raw_output_contents[0], "<f4").tolist() == answer
    assert await caller.infer(7, sequence_id=130, sequence_start=True, sequence_step=0) == [7]


async def test_a_repeat_with_other_values_is_no_repeat(caller) -> None:
    await caller.infer(1, sequence_id=131, sequence_start=True, sequence_step=0)
    code, text = await caller.fails(request(2, sequence_id=131, sequence_step=0))
    assert code is Code.OUT_OF_RANGE
    assert "sequence_step 1" in text
    assert await caller.infer(2, sequence_id=131, sequence_start=True, sequence_step=0) == [2]


async def test_the_inputs_of_a_request_are_looked_through_once(caller, monkeypatch) -> None:
    digests = list[bytes]()

    def digest(one: InferRequest) -> bytes:
        digests.append(_digest(one))
        return digests[-1]

    monkeypatch.setattr("sluice_service.rpc.open_inference.last_answers._digest", digest)
    for step in range(3):
        fields = {"sequence_start": step == 0, "sequence_step": step}
        assert await caller.infer(1, sequence_id=132, **fields) == [step + 1]
    assert len(digests) == 3
    # A repeat is compared with what it repeats.
    assert await caller.infer(1, sequence_id=132, sequence_step=2) == [3]
    assert len(digests) == 4


async def test_an_end_that_was_forgotten_is_no_repeat(caller) -> None:
    await caller.infer(1, sequence_id=133, sequence_start=True, sequence_step=0)
    code, _ = await caller.fails(request(1, sequence_id=133, sequence_step=0, sequence_end=True))
    assert code is Code.OUT_OF_RANGE
    assert await caller.infer(2, sequence_id=133, sequence_step=1, sequence_end=True) == [3]


async def test_a_gap_in_counted_steps_is_refused(caller) -> None:
    await caller.infer(1, sequence_id=132, sequence_start=True, sequence_step=0)
    code, text = await caller.fails(request(1, sequence_id=132, sequence_step=2))
    assert code is Code.FAILED_PRECONDITION
    assert "sequence_step 1" in text
    assert await caller.infer(1, sequence_id=132, sequence_step=1, sequence_end=True) == [2]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"sequence_id": True}, "sequence_id"),
        ({"sequence_id": 1.5}, "sequence_id"),
        ({"sequence_id": InferParameter()}, "sequence_id"),
        ({"sequence_id": 1, "sequence_start": 1}, "sequence_start"),
        ({"sequence_id": 1, "sequence_end": "yes"}, "sequence_end"),
        ({"sequence_id": 1, "sequence_step": "1"}, "sequence_step"),
        ({"sequence_id": 1, "sequence_step": -1}, "sequence_step"),
        ({"sequence_id": 1, "sequence_start": True, "sequence_step": 4}, "sequence_step"),
        ({"sequence_end": True}, "sequence_id"),
        ({"triton_nonsense": True}, "triton_nonsense"),
        ({"sequence_id": "x" * 600, "sequence_start": True}, "bytes"),
    ],
)
async def test_wrong_parameters_are_told_by_name(caller, parameters, words) -> None:
    code, text = await caller.fails(request(1, **parameters))
    assert code is Code.INVALID_ARGUMENT
    assert words in text


async def test_a_batch_with_a_sequence_is_refused(caller) -> None:
    code, text = await caller.fails(request([[1], [2]], sequence_id=1, sequence_start=True))
    assert code is Code.INVALID_ARGUMENT
    assert "batch of 2" in text
