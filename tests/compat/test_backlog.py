"""New sequences beyond the limit wait for a place, in the spirit of Triton's own tests."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from sluice_protos.sequences_pb2 import Fault
from sluice_service.rpc.open_inference.backlog import Backlog
from sluice_service.rpc.open_inference.requests import InferRequest, RequestLane
from sluice_service.settings import Settings
from sluice_service.store.claims import OpenRequest
from tests.compat.caller import Caller, request, values
from tests.compat.inside import dispatcher, inference
from tests.service.test_durability import crash
from tests.service.wire import Served, eventually, floats

Code = grpc.StatusCode
MODEL = "accumulator"
TIMED_OUT = "timeout of the corresponding sequence has been expired"


async def waiting(served: Served, count: int) -> None:
    """Return once so many sequences wait for a place."""
    await eventually(lambda: served.metric("sluice_sequences_waiting", model=MODEL) == count)


def asked(caller: Caller, number: Any, sequence: Any, **fields: Any) -> "asyncio.Task[list[float]]":
    """A request that starts a sequence, under way."""
    fields = {"sequence_id": sequence, "sequence_start": True, **fields}
    return asyncio.ensure_future(caller.infer(number, **fields))


async def refused(task: "asyncio.Task[list[float]]") -> tuple[grpc.StatusCode, str]:
    """How a request that was under way has failed."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await task
    return caught.value.code(), caught.value.details() or ""


def expire(served: Served) -> None:
    """Have the line looked at, as its timer would."""
    dispatcher(served).backlog.review()


@pytest.fixture
async def full(sums) -> Callable[..., Awaitable[tuple[Served, Caller]]]:
    """`await full(sequences_max)`: a server with so many sequences, 1 and on, and its caller."""

    async def start(sequences_max: int = 1, **settings: Any) -> tuple[Served, Caller]:
        served = await sums(sequences_max=sequences_max, **settings)
        caller = Caller(served.channel)
        for sequence in range(1, sequences_max + 1):
            await caller.infer(1, sequence_id=sequence, sequence_start=True)
        return served, caller

    return start


# In order, and every one of them.


async def test_sequences_beyond_the_limit_get_the_places_that_become_free_in_order(full) -> None:
    served, caller = await full(2)
    tasks = {}
    for place, sequence in enumerate((5, 3, 4), start=1):
        tasks[sequence] = asked(caller, 10 * sequence, sequence)
        await waiting(served, place)
    # Those that live go on.
    assert await caller.infer(1, sequence_id=1) == [2]
    for place, (ending, sequence) in enumerate([(2, 5), (1, 3), (5, 4)], start=1):
        await caller.infer(1, sequence_id=ending, sequence_end=True)
        assert await tasks[sequence] == [10 * sequence]
        assert served.metric("sluice_sequences_waiting", model=MODEL) == 3 - place
    assert await caller.infer(1, sequence_id=3, sequence_end=True) == [31]
    assert await caller.infer(1, sequence_id=4, sequence_end=True) == [41]


async def test_whoever_comes_while_others_wait_goes_to_the_end_of_the_line(gate, sums) -> None:
    served = await sums(sequences_max=1)
    caller = Caller(served.channel)
    begun = asked(caller, 1, 1)
    await gate.let_through()
    assert await begun == [1]
    waits = asked(caller, 2, 2)
    await waiting(served, 1)
    ending = asyncio.ensure_future(caller.infer(1, sequence_id=1, sequence_end=True))
    await gate.let_through()
    assert await ending == [2]
    # The place is taken again already, or given to the one that waits: never to this one.
    late = asked(caller, 3, 3)
    await gate.let_through()
    assert await waits == [2]
    await waiting(served, 1)
    ending = asyncio.ensure_future(caller.infer(1, sequence_id=2, sequence_end=True))
    await gate.let_through()
    await gate.let_through()
    assert (await ending, await late) == ([3], [3])


def stands(key: str) -> RequestLane:
    return RequestLane(key, current=InferRequest(lambda: None))


@pytest.fixture
def line() -> Backlog:
    """A line without a server."""
    settings = Settings(backlog_seconds_max=1e6)
    return Backlog(settings, steps_max=1000, now=lambda: 0.0, wake=lambda: None)


async def test_a_place_that_is_free_while_others_wait_is_theirs(line) -> None:
    first, second, third, late = map(stands, ("first", "second", "third", "late"))
    assert line.admit_newcomer(first, places=1)
    for newcomer in (second, third):
        assert not line.admit_newcomer(newcomer, places=1)
        assert line.wait(newcomer) is None
    # The first found no place after all: its turn is before that of all others.
    assert line.wait(first) is None
    assert not line.admit_newcomer(late, places=2)
    assert line.wait(late) is None
    assert line.admit(places=2) == [first, second]
    assert line.admit(places=2) == []
    line.forget_admission(first)
    assert line.admit(places=2) == [third]
    assert list(line) == [late]


async def test_the_line_is_put_in_order_once_however_many_come_back(line, monkeypatch) -> None:
    lanes = [stands(str(number)) for number in range(100)]
    for lane in lanes:
        assert not line.admit_newcomer(lane, places=0)
        assert line.wait(lane) is None
    sorts = list[int]()

    def sort(items: Any, **options: Any) -> Any:
        sorts.append(len(items))
        return sorted(items, **options)

    monkeypatch.setattr("sluice_service.rpc.open_inference.backlog.sorted", sort, raising=False)
    for lane in reversed(line.admit(places=50)):
        assert line.wait(lane) is None
        assert line.admit(places=0) == []
    assert line.admit(places=60) == lanes[:60]
    assert list(line) == lanes[60:]
    assert sorts == [100]


async def test_later_requests_wait_behind_the_one_that_starts_their_sequence(full) -> None:
    served, caller = await full()
    streams = {sequence: caller.stream() for sequence in (2, 3)}
    for place, (sequence, stream) in enumerate(streams.items(), start=1):
        await stream.send(
            request(10 * sequence, sequence_id=sequence, sequence_start=True),
            request([[[1], [2]]], sequence_id=sequence),
            request(4, sequence_id=sequence, sequence_end=True),
        )
        await waiting(served, place)
    assert await caller.infer(1, sequence_id=1, sequence_end=True) == [2]
    for sequence, stream in streams.items():
        first = 10 * sequence
        assert await stream.take(3) == [[first], [first + 1, first + 3], [first + 7]]
    await waiting(served, 0)


async def test_a_sequence_may_wait_again_under_the_same_id(full) -> None:
    _, caller = await full()
    stream = caller.stream()
    ends = {"sequence_start": True, "sequence_end": True}
    await stream.send(*(request(number, sequence_id=2, **ends) for number in (5, 6, 7)))
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await stream.take(3) == [[5], [6], [7]]


async def test_many_sequences_come_through_few_places_and_never_mix(sums) -> None:
    served = await sums(sequences_max=3)
    caller = Caller(served.channel)

    async def run(sequence: int) -> list[float]:
        sums = []
        for step in range(4):
            flags = {"sequence_start": step == 0, "sequence_end": step == 3}
            sums += await caller.infer(sequence + step, sequence_id=sequence, **flags)
        return sums

    answers = await asyncio.gather(*(run(sequence) for sequence in range(1, 41)))
    assert answers == [np.cumsum(np.arange(s, s + 4)).tolist() for s in range(1, 41)]
    await waiting(served, 0)
    await eventually(lambda: not served.metric("sluice_streams_open", model=MODEL))


async def test_requests_without_a_sequence_wait_in_the_same_line(full) -> None:
    served, caller = await full()
    batch = asyncio.ensure_future(caller.infer([[1], [2], [3]]))
    await waiting(served, 3)
    begun = asked(caller, 7, 2)
    await waiting(served, 4)
    await caller.infer(1, sequence_id=1, sequence_end=True)
    # One place for all of them, one after another.
    assert await batch == [1, 2, 3]
    assert await begun == [7]


async def test_answers_of_a_stream_keep_their_order_while_what_they_answer_is_run(full) -> None:
    served, caller = await full()
    stream = caller.stream()
    await stream.send(request(5, sequence_id=2, sequence_start=True))
    await waiting(served, 1)
    # This answer comes second, but its END is what makes room for the first.
    await stream.send(request(1, sequence_id=1, sequence_end=True))
    assert await stream.take(2) == [[5], [2]]


# What makes room, and who needs none.


async def test_a_start_of_a_sequence_that_lives_waits_for_nothing(full) -> None:
    served, caller = await full()
    task = asked(caller, 5, 2)
    await waiting(served, 1)
    assert await caller.infer(7, sequence_id=1, sequence_start=True) == [7]
    # And where it is known by a stream of the native protocol alone:
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await task == [5]
    await caller.infer(1, sequence_id=2, sequence_end=True)
    wire = served.wire(MODEL)
    await wire.open(0, "int64:9")
    task = asked(caller, 6, 3)
    await waiting(served, 1)
    assert await caller.infer(8, sequence_id=9, sequence_start=True) == [8]
    await caller.infer(8, sequence_id=9, sequence_end=True)
    assert await task == [6]
    wire.cut()


async def test_a_place_that_is_about_to_be_free_is_as_good(full) -> None:
    served, _ = await full(backlog_sequences_max=0)
    service, requests = inference(served), []

    def ask(number: int, **fields: Any) -> None:
        # Asked for in the very turn in which the one before is answered.
        loop = asyncio.get_running_loop()
        following = {"sequence_start": True, "sequence_end": True}
        requests.append(
            InferRequest(lambda: loop.call_soon(lambda: ask(number + 1, **following)))
            if number < 20
            else InferRequest(lambda: None)
        )
        service.submit(request(number, sequence_id=number, **fields), requests[-1])

    ask(1, sequence_end=True)
    await eventually(lambda: len(requests) == 20 and requests[-1].is_done)
    assert [one.error for one in requests] == [None] * 20


async def test_a_place_that_the_first_in_line_did_not_take_is_the_next_ones(full) -> None:
    served, caller = await full()
    refusable = asked(caller, 5, "x" * 600)
    await waiting(served, 1)
    task = asked(caller, 6, 2)
    await waiting(served, 2)
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await refused(refusable) == (
        Code.INVALID_ARGUMENT,
        "sequence_id has 607 bytes; 512 are allowed",
    )
    assert await task == [6]


async def test_a_place_that_the_first_in_line_did_not_need_is_the_next_ones(sums) -> None:
    served = await sums(sequences_max=2)
    caller, (host,) = Caller(served.channel), served.server.hosts.values()
    stream = host.attach(lambda: None)
    await host.open(stream, [OpenRequest(lane=lane) for lane in (0, 1)])
    tasks = [asked(caller, 5, 2)]
    await waiting(served, 1)
    tasks.append(asked(caller, 6, 3))
    await waiting(served, 2)
    # In one turn two places become free, and the first sequence in line begins to live.
    await host.open(stream, [OpenRequest(lane=2, sequence_id="int64:2")], closing=[0, 1])
    assert [await task for task in tasks] == [[5], [6]]


async def test_a_close_from_outside_makes_room(full) -> None:
    served, caller = await full()
    task = asked(caller, 5, 2)
    await waiting(served, 1)
    assert await served.close(MODEL, "int64:1") == 1
    assert await task == [5]


async def test_a_sequence_that_expires_makes_room(hands, full) -> None:
    served, caller = await full(sequence_idle_seconds_max=20)
    task = asked(caller, 5, 2)
    await waiting(served, 1)
    (host,) = served.server.hosts.values()
    hands.go(host, 21)
    await host.expire()
    assert await task == [5]


async def test_the_end_of_a_native_sequence_makes_room_and_a_park_does_not(sums) -> None:
    served = await sums(sequences_max=1)
    caller = Caller(served.channel)
    wire = served.wire(MODEL)
    await wire.open(0, "native")
    task = asked(caller, 5, 2)
    await waiting(served, 1)
    await wire.send(park=[0])
    await wire.next_closed(0)
    await wire.open(0, "native", mode="RESUME")
    await waiting(served, 1)
    assert not task.done()
    await wire.send(close=[0])
    assert await task == [5]
    wire.cut()


async def test_native_streams_are_refused_at_once_while_others_wait(full) -> None:
    served, caller = await full()
    task = asked(caller, 5, 2)
    await waiting(served, 1)
    wire = served.wire(MODEL)
    fault = await wire.refused(0, "native")
    assert (fault.reason, fault.code) == (Fault.LIMIT, Code.RESOURCE_EXHAUSTED.value[0])
    # The line does not hide what lives here, and a sequence that is nowhere is told so.
    assert (await wire.open(0, "int64:1", mode="RESUME")).applied == 1
    assert (await wire.refused(1, "nowhere", mode="RESUME")).reason == Fault.NOT_FOUND
    await wire.push(0, floats([1]))
    assert (await wire.rows(0, 1)).tolist() == [[2]]
    await wire.send(close=[0])
    assert await task == [5]
    wire.cut()


# For how long.


async def test_whoever_waits_too_long_is_refused_with_all_its_requests(hands, full) -> None:
    served, caller = await full(backlog_seconds_max=30)
    (host,) = served.server.hosts.values()
    tasks = [asked(caller, 5, 2)]
    await waiting(served, 1)
    hands.go(host, 10)
    later = asked(caller, 6, 3)
    await waiting(served, 2)
    stream = caller.stream()
    await stream.send(request(1, sequence_id=2, label="second"))
    await eventually(lambda: dispatcher(served).waiting_steps == 3)
    hands.go(host, 19)
    expire(served)
    await waiting(served, 2)
    hands.go(host, 2)
    expire(served)
    code, text = await refused(tasks[0])
    assert code is Code.UNAVAILABLE
    assert text.startswith(f"{TIMED_OUT}: sequence 2 ")
    answer = await stream.read()
    assert (answer.infer_response.id, TIMED_OUT in answer.error_message) == ("second", True)
    await waiting(served, 1)
    # What comes after it belongs to nothing.
    code, text = await caller.fails(request(1, sequence_id=2))
    assert code is Code.INVALID_ARGUMENT
    assert "must specify the START flag" in text
    # It may ask again, at the end of the line.
    again = asked(caller, 7, 2)
    await waiting(served, 2)
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await later == [6]
    await caller.infer(1, sequence_id=3, sequence_end=True)
    assert await again == [7]


@pytest.mark.parametrize("which", [0, 1])
async def test_a_request_says_how_long_its_sequence_may_wait(hands, full, which) -> None:
    served, caller = await full(backlog_seconds_max=60)
    (host,) = served.server.hosts.values()
    stream, patient = caller.stream(), asked(caller, 8, 3, timeout=0)
    await waiting(served, 1)
    seconds = [20, 5] if which else [5, 20]
    for number, (flag, timeout) in enumerate(zip((True, False), seconds, strict=True)):
        fields = {"sequence_start": flag, "timeout": timeout * 1_000_000}
        await stream.send(request(number, sequence_id=2, **fields))
    await eventually(lambda: dispatcher(served).waiting_steps == 3)
    hands.go(host, 6)
    expire(served)
    for _ in range(2):
        assert TIMED_OUT in (await stream.read()).error_message
    # Where a place is there, no time is too short.
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await patient == [8]
    assert await caller.infer(1, sequence_id=3, timeout=1, sequence_end=True) == [9]


async def test_the_time_is_over_without_anybody_looking(full) -> None:
    _, caller = await full()
    code, text = await caller.fails(request(1, sequence_id=2, sequence_start=True, timeout=1000))
    assert code is Code.UNAVAILABLE
    assert TIMED_OUT in text
    assert await caller.infer(1, sequence_id=1) == [2]


@pytest.mark.parametrize("value", ["1", 1.5, True, -1])
async def test_a_timeout_that_is_none_is_told(caller, value) -> None:
    code, text = await caller.fails(request(1, sequence_id=1, timeout=value))
    assert code is Code.INVALID_ARGUMENT
    assert "timeout" in text


# Who gives up.


async def test_a_cancelled_call_leaves_the_line_and_two_new_sequences_do_not_mix(full) -> None:
    served, caller = await full()
    task = asked(caller, 1000, 2)
    await waiting(served, 1)
    task.cancel()
    await waiting(served, 0)
    new = []
    for sequence in (3, 4):
        new.append(asked(caller, 10 * sequence, sequence))
        await waiting(served, len(new))
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await new[0] == [30]
    assert await caller.infer(1, sequence_id=3, sequence_end=True) == [31]
    assert await new[1] == [40]
    assert await caller.infer(1, sequence_id=4, sequence_end=True) == [41]
    code, _ = await caller.fails(request(1, sequence_id=2))
    assert code is Code.INVALID_ARGUMENT


async def test_a_cancelled_stream_leaves_the_line_with_all_it_asked_for(full) -> None:
    served, caller = await full()
    stream = caller.stream()
    for sequence in (2, 3, 2, 3):
        await stream.send(request(1000, sequence_id=sequence, sequence_start=True))
    await stream.send(request([[1000], [1000]]))
    await waiting(served, 4)
    after = asked(caller, 5, 4)
    await waiting(served, 5)
    stream.call.cancel()
    await waiting(served, 1)
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await after == [5]
    assert set(await served.list(MODEL)) == {"int64:4"}


async def test_others_who_wait_for_a_cancelled_start_are_told(full) -> None:
    served, caller = await full()
    task = asked(caller, 1, 2)
    await waiting(served, 1)
    stream = caller.stream()
    await stream.send(request(1, sequence_id=2))
    await eventually(lambda: dispatcher(served).waiting_steps == 2)
    task.cancel()
    assert "START flag" in (await stream.read()).error_message
    await waiting(served, 0)
    assert not dispatcher(served).backlog.steps


async def test_a_later_request_that_is_cancelled_gives_up_nobody_elses_turn(full) -> None:
    served, caller = await full()
    task = asked(caller, 1, 2)
    await waiting(served, 1)
    later = asyncio.ensure_future(caller.infer(1000, sequence_id=2))
    lane = dispatcher(served).lanes["int64:2"]
    await eventually(lambda: lane.waiting)
    later.cancel()
    await eventually(lambda: lane.waiting[0].is_cancelled)
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await task == [1]
    assert await caller.infer(2, sequence_id=2, sequence_end=True) == [3]


# How many.


async def test_beyond_the_backlog_a_sequence_is_refused_at_once(full) -> None:
    served, caller = await full(backlog_sequences_max=2)
    tasks = [asked(caller, sequence, sequence) for sequence in (2, 3)]
    await waiting(served, 2)
    code, text = await caller.fails(request(1, sequence_id=4, sequence_start=True))
    assert code is Code.RESOURCE_EXHAUSTED
    assert "--backlog-sequences-max" in text
    code, _ = await caller.fails(request([[1], [2]]))
    assert code is Code.RESOURCE_EXHAUSTED
    tasks[0].cancel()
    await waiting(served, 1)
    last = asked(caller, 4, 4)
    await waiting(served, 2)
    for ending, task, answer in ((1, tasks[1], [3]), (3, last, [4])):
        await caller.infer(1, sequence_id=ending, sequence_end=True)
        assert await task == answer


async def test_without_a_backlog_a_sequence_is_refused_and_a_place_is_given_again(full) -> None:
    _, caller = await full(2, backlog_sequences_max=0)
    for _ in range(20):
        code, text = await caller.fails(request(1, sequence_id=3, sequence_start=True))
        assert code is Code.RESOURCE_EXHAUSTED
        assert "--sequences-max" in text
        await caller.infer(1, sequence_id=1, sequence_end=True)
        assert await caller.infer(4, sequence_id=3, sequence_start=True) == [4]
        await caller.infer(1, sequence_id=3, sequence_end=True)
        assert await caller.infer(1, sequence_id=1, sequence_start=True) == [1]


async def test_what_waits_for_a_place_is_bounded_and_holds_up_nobody_who_has_one(full) -> None:
    served, caller = await full(stream_queue_steps_max=8)
    long = np.ones((1, 20, 1), np.float32)
    task = asked(caller, long, 2)
    await waiting(served, 1)
    assert await caller.infer(1, sequence_id=1) == [2]
    for fields in ({"sequence_id": 3, "sequence_start": True}, {"sequence_id": 2}):
        code, text = await caller.fails(request(1, **fields))
        assert code is Code.RESOURCE_EXHAUSTED
        assert "20 steps wait" in text
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert (await task)[-1] == 20
    assert await caller.infer(1, sequence_id=2, sequence_end=True) == [21]


def test_a_backlog_cannot_be_smaller_than_none() -> None:
    with pytest.raises(ValueError, match="backlog_sequences_max"):
        Settings(backlog_sequences_max=-1)


# When the server or the model goes.


async def test_a_stop_answers_those_who_wait(full, unhurried) -> None:
    served, caller = await full()
    task, stream = asked(caller, 5, 2), caller.stream()
    await waiting(served, 1)
    await stream.send(request(1, sequence_id=3, sequence_start=True))
    await waiting(served, 2)
    stopping = asyncio.ensure_future(served.stop())
    code, text = await refused(task)
    assert code is Code.UNAVAILABLE
    assert "stopping" in text
    assert "stopping" in (await stream.read()).error_message
    assert await stream.call.read() is grpc.aio.EOF
    await stopping


async def test_those_who_wait_are_answered_before_the_server_has_finished_its_runs(
    gate, sums, unhurried
) -> None:
    served = await sums(sequences_max=1)
    caller = Caller(served.channel)
    begun = asked(caller, 1, 1)
    await gate.reached()
    task = asked(caller, 5, 2)
    await waiting(served, 1)
    stopping = asyncio.ensure_future(served.stop())
    code, _ = await refused(task)
    assert code is Code.UNAVAILABLE
    assert not begun.done()
    await gate.let_through()
    assert await begun == [1]
    await stopping


async def test_an_unloaded_model_answers_those_who_wait(full) -> None:
    served, caller = await full()
    task = asked(caller, 5, 2)
    await waiting(served, 1)
    await served.server.hosts.unload(MODEL)
    code, text = await refused(task)
    assert code is Code.UNAVAILABLE
    assert "unloaded" in text
    code, text = await caller.fails(request(1, sequence_id=3, sequence_start=True))
    assert code is Code.UNAVAILABLE
    assert await caller.infer(1, sequence_id=1, sequence_end=True) == [2]


async def test_who_waits_for_a_version_that_is_old_is_told_and_others_begin_on_the_new(
    full, accumulator_file
) -> None:
    served, caller = await full()
    message = request(1, sequence_id=2, sequence_start=True)
    message.model_version = "1"
    old = asyncio.ensure_future(caller.send(message))
    await waiting(served, 1)
    message = request(3, sequence_id=3, sequence_start=True)
    new = asyncio.ensure_future(caller.send(message))
    await waiting(served, 2)
    await served.server.hosts.adopt(MODEL, served.server.hosts.load(accumulator_file, 2))
    code, text = await refused(old)
    assert code is Code.NOT_FOUND
    assert "version 1" in text
    await caller.infer(1, sequence_id=1, sequence_end=True)
    answer = await new
    assert (values(answer), answer.model_version) == ([3], "2")


# Durable sequences.


@pytest.fixture
async def replica(sums, tmp_path) -> Callable[..., Awaitable[Served]]:
    """`await replica()`: one more server of one place over the same store."""

    async def start(**settings: Any) -> Served:
        fields = {"durability": "strict", "sequences_max": 1, **settings}
        return await sums(store=f"sqlite:///{tmp_path}/sequences.db", **fields)

    return start


@pytest.mark.parametrize("duplicates", ["restart", "refuse"])
async def test_durable_sequences_wait_for_a_place_as_others_do(replica, duplicates) -> None:
    served = await replica(duplicate_start=duplicates)
    caller = Caller(served.channel)
    await caller.infer(1, sequence_id=1, sequence_start=True)
    tasks = []
    for sequence in (2, 3):
        tasks.append(asked(caller, sequence, sequence))
        await waiting(served, len(tasks))
    for sequence, task in zip((2, 3), tasks, strict=True):
        await caller.infer(1, sequence_id=sequence - 1, sequence_end=True)
        assert await task == [sequence]


async def test_a_sequence_of_another_server_waits_for_a_place_here(replica) -> None:
    first = await replica()
    await Caller(first.channel).infer(1, sequence_id="moves", sequence_start=True)
    await crash(first)
    served = await replica()
    caller = Caller(served.channel)
    await caller.infer(1, sequence_id=1, sequence_start=True)
    task = asyncio.ensure_future(caller.infer(2, sequence_id="moves"))
    await waiting(served, 1)
    # One that is nowhere does not wait for nothing.
    code, text = await caller.fails(request(1, sequence_id="nowhere"))
    assert code is Code.INVALID_ARGUMENT
    assert "must specify the START flag" in text
    await caller.infer(1, sequence_id=1, sequence_end=True)
    assert await task == [3]


async def test_a_place_that_became_free_while_a_sequence_was_refused_one_is_taken(
    replica, monkeypatch
) -> None:
    first = await replica()
    await Caller(first.channel).infer(1, sequence_id="moves", sequence_start=True)
    await crash(first)
    served = await replica()
    caller, store = Caller(served.channel), served.server.store
    await caller.infer(1, sequence_id=1, sequence_start=True)
    asking, answering = asyncio.Event(), asyncio.Event()
    claim = store.claim

    async def claim_later(requests: Any) -> Any:
        asking.set()
        await answering.wait()
        return await claim(requests)

    monkeypatch.setattr(store, "claim", claim_later)
    task = asyncio.ensure_future(caller.infer(2, sequence_id="moves"))
    # There was no place for it, and it will be told so.
    await eventually(asking.is_set)
    await caller.infer(1, sequence_id=1, sequence_end=True)
    answering.set()
    assert await task == [3]
