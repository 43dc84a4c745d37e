"""The rules of the stream: parking, resuming, acknowledging, fencing, credit, draining."""

import asyncio
import gc

import grpc
import numpy as np
import pytest
import structlog
from grpc import StatusCode

from sluice_protos.sequences_pb2 import (
    RESTART,
    RESUME,
    START,
    START_OR_RESUME,
    TAKEOVER,
    Closed,
    Fault,
    ListModelsRequest,
    OpenSequence,
    Received,
    Tensor,
)
from sluice_service.sequences.events import Outputs
from tests.service.wire import SECONDS, Wire, eventually, floats

MINE = {"writer": b"mine"}
OTHER = {"writer": b"other"}


async def _totals(wire: Wire, lane: int, steps: int) -> list[float]:
    return (await wire.rows(lane, steps)).ravel().tolist()


# Park and resume.


async def test_a_parked_sequence_goes_on_where_it_stood(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "park", **MINE)
    await wire.push(0, floats([1, 2]))
    await wire.send(park=[0])
    assert await wire.next_closed(0) == Closed.PARKED
    assert await _totals(wire, 0, 2) == [1, 3]
    info = (await served.list("accumulator"))["park"]
    assert (info.is_parked, info.step, info.held_steps) == (True, 2, 2)
    # On another lane of another stream.
    again = served.wire("accumulator")
    opened = await again.open(7, "park", mode=RESUME, attempt=1, received=2, **MINE)
    assert (opened.applied, opened.held_from, opened.durable) == (2, 2, 0)
    await again.push(7, floats([3]))
    assert await _totals(again, 7, 1) == [6]


async def test_what_is_sent_behind_a_park_is_not_applied(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "behind", **MINE)
    await wire.send(lane=[0], inputs=[Tensor(data=floats([1]).tobytes())], park=[0])
    await wire.push(0, floats([100]))
    assert await wire.next_closed(0) == Closed.PARKED
    await wire.settle()
    assert not wire.faults[0]
    assert (await served.state("accumulator", "behind")).step == 1


async def test_a_cut_stream_parks_and_its_outputs_come_again_once(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "cut", **MINE)
    for value in range(1, 6):
        await wire.push(0, floats([value]))
    assert await _totals(wire, 0, 5) == [1, 3, 6, 10, 15]
    wire.cut()
    await served.parked("accumulator", "cut")
    assert (await served.list("accumulator"))["cut"].held_steps == 5
    again = served.wire("accumulator")
    opened = await again.open(0, "cut", mode=RESUME, attempt=1, received=2, **MINE)
    assert (opened.applied, opened.held_from) == (5, 2)
    await again.settle()
    assert [first for first, *_ in again.pieces[0]] == [2, 3, 4]
    assert await _totals(again, 0, 3) == [6, 10, 15]


async def test_outputs_are_cut_where_the_client_says_they_have_arrived(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "inside", **MINE)
    await wire.push(0, floats(range(1, 11)))
    await wire.rows(0, 10)
    for attempt, received in ((1, 0), (2, 4), (3, 9), (4, 10)):
        opened = await wire.open(
            attempt, "inside", mode=RESUME, attempt=attempt, received=received, **MINE
        )
        assert opened.held_from == received
        await wire.settle()
        expected = np.cumsum(range(1, 11))[received:].tolist()
        if expected:
            assert await _totals(wire, attempt, 10 - received) == expected
        else:
            assert not wire.pieces[attempt]


async def test_a_start_may_be_repeated_and_tells_what_was_applied(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "repeat", mode=START, **MINE)
    await wire.push(0, floats([1, 2, 3]), first=0)
    await wire.rows(0, 3)
    wire.cut()
    again = served.wire("accumulator")
    opened = await again.open(0, "repeat", mode=START, attempt=1, **MINE)
    assert (opened.applied, opened.held_from) == (3, 0)
    await again.push(0, floats([1, 2, 3, 4]), first=0)
    assert await _totals(again, 0, 4) == [1, 3, 6, 10]


async def test_an_end_by_the_client_parks_the_rest_and_is_ok(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "half-closed", **MINE)
    await wire.push(0, floats(range(1, 1001)))
    assert await wire.end() == StatusCode.OK
    assert (await _totals(wire, 0, 1000))[-1] == 500_500
    await served.parked("accumulator", "half-closed")


async def test_outputs_of_a_client_without_writer_are_not_held(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "anonymous")
    await wire.push(0, floats([1, 2]))
    await wire.rows(0, 2)
    wire.cut()
    await served.parked("accumulator", "anonymous")
    assert (await served.list("accumulator"))["anonymous"].held_steps == 0
    again = served.wire("accumulator")
    fault = await again.refused(0, "anonymous", mode=RESUME, received=0)
    assert fault.reason == Fault.OUT_OF_RANGE
    opened = await again.open(1, "anonymous", mode=RESUME)
    assert (opened.applied, opened.held_from) == (2, 2)
    await again.push(1, floats([3]))
    assert await _totals(again, 1, 1) == [6]


# Acknowledgements.


async def test_outputs_that_were_acknowledged_are_out_of_range(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "range", **MINE)
    await wire.push(0, floats([1, 2, 3, 4]))
    await wire.rows(0, 4)
    await wire.send(received=[Received(lane=0, step=3)])
    await wire.settle()
    assert (await served.list("accumulator"))["range"].held_steps == 1
    # An older word of the same client changes nothing.
    await wire.send(received=[Received(lane=0, step=1)])
    await wire.settle()
    assert (await served.list("accumulator"))["range"].held_steps == 1
    for received in (2, 5):
        fault = await wire.refused(1, "range", mode=RESUME, attempt=1, received=received, **MINE)
        assert (fault.reason, fault.code) == (
            Fault.OUT_OF_RANGE,
            StatusCode.OUT_OF_RANGE.value[0],
        )
        assert "received 3" in fault.message
    # A refused open leaves the lane that has the sequence alone.
    await wire.push(0, floats([5]))
    assert await _totals(wire, 0, 1) == [15]
    opened = await wire.open(2, "range", mode=RESUME, attempt=1, received=3, **MINE)
    assert (opened.applied, opened.held_from) == (5, 3)
    assert await _totals(wire, 2, 2) == [10, 15]


async def test_nobody_can_acknowledge_more_than_was_applied(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "too-much", **MINE)
    for step in (5, 2**62, 2**64 - 1):
        await wire.send(received=[Received(lane=0, step=step)], received_responses=2**63)
    await wire.push(0, floats([1, 2]))
    await wire.rows(0, 2)
    await wire.settle()
    assert (await served.list("accumulator"))["too-much"].held_steps == 2


@pytest.mark.parametrize("way", ["lane", "responses"])
async def test_a_sequence_stalls_without_acknowledgements_and_one_alone_releases_it(
    sums, way
) -> None:
    served = await sums(unacknowledged_steps_max=4)
    wire = served.wire("accumulator")
    await wire.open(0, "stalls", **MINE)
    await wire.open(1, "goes-on", **OTHER)
    assert wire.limits.unacknowledged_steps_max == 4
    await wire.push(0, floats([1] * 10))
    await wire.push(1, floats([10]))
    assert await _totals(wire, 0, 4) == [1, 2, 3, 4]
    assert await _totals(wire, 1, 1) == [10]
    await wire.settle()
    assert not wire.pieces[0]
    assert (await served.state("accumulator", "stalls")).step == 4
    for end in (8, 10):
        received = 4 if end == 8 else 8
        if way == "lane":
            await wire.send(received=[Received(lane=0, step=received)])
        else:
            await wire.send(received_responses=len(wire.responses))
        assert (await _totals(wire, 0, end - received))[-1] == end
    await wire.send(received=[Received(lane=0, step=10)])
    await wire.push(0, floats([1]))
    assert await _totals(wire, 0, 1) == [11]


async def test_an_acknowledgement_of_part_releases_as_much(sums) -> None:
    served = await sums(unacknowledged_steps_max=4)
    wire = served.wire("accumulator")
    await wire.open(0, "part", **MINE)
    await wire.push(0, floats([1] * 10))
    await wire.rows(0, 4)
    await wire.send(received=[Received(lane=0, step=1)])
    await wire.settle()
    assert await _totals(wire, 0, 1) == [5]
    assert (await served.state("accumulator", "part")).step == 5


async def test_the_bytes_of_outputs_bound_what_is_held_too(sums) -> None:
    served = await sums(unacknowledged_bytes_max=12)
    wire = served.wire("accumulator")
    await wire.open(0, "bytes", **MINE)
    assert wire.limits.unacknowledged_steps_max == 3
    await wire.push(0, floats([1] * 5))
    await wire.rows(0, 3)
    await wire.settle()
    assert (await served.state("accumulator", "bytes")).step == 3


async def test_a_client_without_writer_never_stalls(sums) -> None:
    served = await sums(unacknowledged_steps_max=4)
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.push(0, floats([1] * 1000))
    assert (await _totals(wire, 0, 1000))[-1] == 1000


async def test_a_stalled_sequence_may_be_closed_and_parked(sums) -> None:
    served = await sums(unacknowledged_steps_max=2)
    wire = served.wire("accumulator")
    await wire.open(0, "stalled-close", **MINE)
    await wire.open(1, "stalled-park", **MINE)
    for lane in (0, 1):
        await wire.push(lane, floats([1, 1]))
        await wire.rows(lane, 2)
    await wire.send(close=[0], park=[1])
    assert await wire.next_closed(0) == Closed.CLIENT
    assert await wire.next_closed(1) == Closed.PARKED
    # With steps still queued, a stream that ends drops them and ends well.
    await wire.open(2, "stalled-end", **MINE)
    await wire.push(2, floats([1] * 5))
    await wire.rows(2, 2)
    assert await wire.end() == StatusCode.OK
    assert (await served.state("accumulator", "stalled-end")).step == 2


async def test_acknowledging_responses_covers_every_lane_in_them(served) -> None:
    wire = served.wire("accumulator")
    names = [f"covered-{n}" for n in range(5)]
    await wire.send(
        open=[OpenSequence(lane=n, sequence_id=name, **MINE) for n, name in enumerate(names)]
    )
    await wire.send(lane=range(5), inputs=[Tensor(data=floats(range(5)).tobytes())])
    for lane in range(5):
        await wire.rows(lane, 1)
    await wire.send(received_responses=len(wire.responses))
    await wire.push(0, floats([1]))
    await wire.rows(0, 1)
    infos = await served.list("accumulator")
    assert [infos[name].held_steps for name in names] == [1, 0, 0, 0, 0]


async def test_an_acknowledgement_of_an_earlier_sequence_on_a_lane_does_not_count_for_the_next(
    served,
) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "first-on-lane", **MINE)
    await wire.push(0, floats([1, 2, 3]))
    await wire.rows(0, 3)
    await wire.send(close=[0])
    await wire.next_closed(0)
    read = len(wire.responses)
    await wire.open(0, "second-on-lane", **MINE)
    await wire.push(0, floats([1, 2, 3]))
    await wire.rows(0, 3)
    await wire.send(received_responses=read)
    await wire.settle()
    assert (await served.list("accumulator"))["second-on-lane"].held_steps == 3


# Who has the sequence.


async def test_a_new_lane_fences_the_old_one(served) -> None:
    old, new = served.wire("accumulator"), served.wire("accumulator")
    await old.open(0, "fenced", **MINE)
    await old.push(0, floats([1]))
    await old.rows(0, 1)
    opened = await new.open(3, "fenced", mode=RESUME, attempt=1, received=1, **MINE)
    assert opened.applied == 1
    assert await old.next_closed(0) == Closed.FENCED
    # Whatever the old lane still sends is ignored: chunks, acknowledgements, endings.
    await old.push(0, floats([100]))
    await old.send(received=[Received(lane=0, step=1)], close=[0], park=[0])
    await old.settle()
    assert not old.faults[0]
    assert not old.ended[0]
    await new.push(3, floats([2]))
    assert await _totals(new, 3, 1) == [3]
    old.cut()
    await new.push(3, floats([3]))
    assert await _totals(new, 3, 1) == [6]
    assert (await served.list("accumulator"))["fenced"].held_steps == 2


async def test_a_frame_with_a_fenced_lane_gives_the_others_their_own_rows(served) -> None:
    old, new = served.wire("accumulator"), served.wire("accumulator")
    await old.open(0, "gone", **MINE)
    await old.open(1, "stays", **MINE)
    await new.open(0, "gone", mode=RESUME, attempt=1, **MINE)
    await old.send(lane=[0, 1], inputs=[Tensor(data=floats([100, 7]).tobytes())])
    assert await _totals(old, 1, 1) == [7]
    assert (await served.state("accumulator", "gone")).step == 0


async def test_queued_steps_of_a_fenced_lane_are_dropped_and_its_credit_given_back(sums) -> None:
    served = await sums(unacknowledged_steps_max=2, stream_queue_steps_max=20)
    old, new = served.wire("accumulator"), served.wire("accumulator")
    await old.open(0, "dropped", **MINE)
    await old.push(0, floats([1] * 30))  # two run, the rest waits: beyond the credit of 20
    await old.rows(0, 2)
    opened = await new.open(0, "dropped", mode=RESUME, attempt=1, received=2, **MINE)
    assert opened.applied == 2
    assert await old.next_closed(0) == Closed.FENCED
    # The old stream is read again.
    await old.open(1)
    await old.push(1, floats([5]))
    assert await _totals(old, 1, 1) == [5]
    await new.push(0, floats([1]))
    assert await _totals(new, 0, 1) == [3]


async def test_a_takeover_by_another_writer_needs_the_epoch_and_conflict_tells_it(served) -> None:
    old, new = served.wire("accumulator"), served.wire("accumulator")
    first = await old.open(0, "taken", **MINE)
    await old.push(0, floats([1, 2]))
    await old.rows(0, 2)
    fault = await new.refused(0, "taken", mode=RESUME, **OTHER)
    assert (fault.reason, fault.code) == (
        Fault.FENCED,
        StatusCode.FAILED_PRECONDITION.value[0],
    )
    fault = await new.refused(0, "taken", mode=TAKEOVER, **OTHER)
    assert (fault.reason, fault.code) == (Fault.CONFLICT, StatusCode.ABORTED.value[0])
    assert fault.epoch == first.epoch
    # Nothing has happened to the old lane yet.
    await old.push(0, floats([3]))
    assert await _totals(old, 0, 1) == [6]
    opened = await new.open(
        0, "taken", mode=TAKEOVER, attempt=1, expected_epoch=fault.epoch, **OTHER
    )
    assert opened.epoch > first.epoch
    # Outputs that were promised to the other writer are not this one's.
    assert (opened.applied, opened.held_from) == (3, 3)
    assert await old.next_closed(0) == Closed.FENCED
    await new.push(0, floats([4]))
    assert await _totals(new, 0, 1) == [10]
    fault = await old.refused(1, "taken", mode=RESUME, attempt=9, **MINE)
    assert fault.reason == Fault.FENCED
    # The same epoch does not serve twice.
    fault = await old.refused(
        2, "taken", mode=TAKEOVER, attempt=10, expected_epoch=first.epoch, **MINE
    )
    assert (fault.reason, fault.epoch) == (Fault.CONFLICT, opened.epoch)


async def test_start_or_resume_is_whichever_fits(served) -> None:
    wire = served.wire("accumulator")
    opened = await wire.open(0, "either", mode=START_OR_RESUME, **MINE)
    await wire.push(0, floats([1]))
    await wire.rows(0, 1)
    again = await wire.open(1, "either", mode=START_OR_RESUME, attempt=1, **MINE)
    assert (again.applied, again.epoch) == (1, opened.epoch)
    fault = await wire.refused(2, "either", mode=START_OR_RESUME, **OTHER)
    assert (fault.reason, fault.epoch) == (Fault.CONFLICT, opened.epoch)


async def test_a_restart_by_another_writer_begins_at_the_initial_state(served) -> None:
    old, new = served.wire("accumulator"), served.wire("accumulator")
    first = await old.open(0, "restart", **MINE)
    await old.push(0, floats([1, 2]))
    await old.rows(0, 2)
    # The same writer's restart resumes: it may be a repeat.
    again = await old.open(1, "restart", mode=RESTART, attempt=1, received=2, **MINE)
    assert (again.applied, again.epoch) == (2, first.epoch)
    opened = await new.open(
        0, "restart", mode=RESTART, expected_epoch=first.epoch, received=1, **OTHER
    )
    assert (opened.applied, opened.held_from) == (0, 0)
    assert opened.epoch > first.epoch
    await new.push(0, floats([5]))
    assert await _totals(new, 0, 1) == [5]


async def test_a_client_without_writer_may_restart_at_will(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "at-will")
    await wire.push(0, floats([1, 2]))
    await wire.rows(0, 2)
    opened = await wire.open(1, "at-will", mode=RESTART)
    assert await wire.next_closed(0) == Closed.FENCED
    assert opened.applied == 0
    await wire.push(1, floats([5]))
    assert await _totals(wire, 1, 1) == [5]


async def test_a_lower_attempt_is_stale_and_changes_nothing(served) -> None:
    wire, late = served.wire("accumulator"), served.wire("accumulator")
    await wire.open(0, "stale", attempt=5, **MINE)
    await wire.push(0, floats([1]))
    fault = await late.refused(0, "stale", mode=START, attempt=4, **MINE)
    assert (fault.reason, fault.code) == (Fault.STALE, StatusCode.ABORTED.value[0])
    await wire.push(0, floats([2]))
    assert await _totals(wire, 0, 2) == [1, 3]
    # The attempt of a resume counts from then on.
    await wire.open(1, "stale", mode=RESUME, attempt=8, **MINE)
    fault = await late.refused(0, "stale", mode=RESUME, attempt=7, **MINE)
    assert fault.reason == Fault.STALE


async def test_a_late_repeat_of_the_open_of_a_closed_sequence_does_not_start_it_again(
    served,
) -> None:
    wire = served.wire("accumulator")
    opened = await wire.open(0, "tombstone", **MINE)
    await wire.send(close=[0])
    await wire.next_closed(0)
    fault = await wire.refused(1, "tombstone", mode=START, attempt=1, **MINE)
    assert fault.reason == Fault.SEQUENCE_CLOSED
    assert "closed it" in fault.message
    fault = await wire.refused(2, "tombstone", mode=START, **OTHER)
    assert (fault.reason, fault.epoch) == (Fault.CONFLICT, opened.epoch)
    again = await wire.open(3, "tombstone", mode=START, expected_epoch=opened.epoch, **OTHER)
    assert again.applied == 0
    assert again.epoch > opened.epoch
    # Without a writer an id can be used again at will.
    await wire.send(close=[3])
    await wire.next_closed(3)
    assert (await wire.open(4, "tombstone")).applied == 0


async def test_a_sequence_starts_from_a_state_that_was_taken_elsewhere(served) -> None:
    wire = served.wire("lstm")
    x = np.random.default_rng(5).standard_normal((20, 8)).astype(np.float32)
    await wire.open(0, "origin", **MINE)
    await wire.push(0, x[:12])
    await wire.rows(0, 12)
    state = await served.state("lstm", "origin")
    assert state.step == 12
    opened = await wire.open(1, "copy", state=state, **OTHER)
    assert (opened.applied, opened.held_from) == (12, 12)
    await wire.push(0, x[12:])
    await wire.push(1, x[12:], first=12)
    assert (await wire.rows(1, 8) == await wire.rows(0, 8)).all()
    # Starting over from a state: for those who may, and from that state.
    fault = await wire.refused(2, "copy", mode=RESTART, state=state, writer=b"third")
    opened = await wire.open(
        2, "copy", mode=RESTART, state=state, writer=b"third", expected_epoch=fault.epoch
    )
    assert opened.applied == 12
    await wire.push(2, x[12:15], first=12)
    await wire.rows(2, 3)
    assert (await served.state("lstm", "copy")).step == 15
    bad = type(state)(model_digest=state.model_digest, step=1, row=bytes(3))
    fault = await wire.refused(
        3, "copy", mode=RESTART, state=bad, writer=b"4th", expected_epoch=opened.epoch
    )
    assert fault.reason == Fault.INVALID_INPUT
    assert not wire.ended[2]
    assert (await served.state("lstm", "copy")).step == 15


# Lanes, responses, credit.


async def test_a_lane_is_free_again_when_its_closed_has_come(served) -> None:
    wire = served.wire("accumulator")
    for value in range(5):
        await wire.open(0, f"reuse-{value}", **MINE)
        await wire.push(0, floats([value, 1]))
        assert await _totals(wire, 0, 2) == [value, value + 1]
        await wire.send(close=[0])
        assert await wire.next_closed(0) == Closed.CLIENT


@pytest.mark.parametrize("size", [1, 1500, 20_000])
async def test_no_response_is_larger_than_the_client_takes(served, size) -> None:
    wire = served.wire("lstm", response_bytes_max=size)
    x = np.random.default_rng(6).standard_normal((3, 100, 8)).astype(np.float32)
    await wire.send(open=[OpenSequence(lane=n) for n in range(200)])
    await wire.send(
        lane=[0, 1, 2], steps=[100] * 3, inputs=[Tensor(data=np.ascontiguousarray(x).tobytes())]
    )
    for lane in range(3):
        assert (await wire.rows(lane, 100)).shape == (100, 4)
    await wire.until(lambda: len(wire.opened) == 200)
    sizes = [response.ByteSize() for response in wire.responses]
    # One row or one notice is the least there is.
    assert max(sizes) <= max(size, 200)
    assert wire.responses[0].HasField("limits")


async def test_the_limits_come_first_and_say_what_was_set(sums) -> None:
    served = await sums(
        request_bytes_max=4000,
        chunk_steps_max=30,
        stream_queue_steps_max=500,
        stream_queue_bytes_max=400,
        unacknowledged_steps_max=7,
    )
    wire = served.wire("accumulator")
    await wire.send()
    first = await wire.read()
    assert first.HasField("limits")
    assert first.limits.request_bytes_max == 4000
    assert first.limits.chunk_steps_max == 30
    assert first.limits.credit_steps == 100  # of 4 bytes each
    assert first.limits.credit_bytes == 400
    assert first.limits.unacknowledged_steps_max == 7


async def test_a_client_beyond_its_credit_stays_correct_and_the_server_small(sums) -> None:
    served = await sums(stream_queue_steps_max=64, run_steps_max=4)
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.open(1)
    peak = 0

    async def write() -> None:
        for _ in range(300):
            data = np.ones((20, 1), np.float32)
            await wire.send(lane=[0, 1], steps=[10, 10], inputs=[Tensor(data=data.tobytes())])

    async def watch() -> None:
        nonlocal peak
        (host,) = served.server.hosts.values()
        while True:
            peak = max(peak, *(s.queued_steps for s in host._streams))
            await asyncio.sleep(0)

    watching, writing = asyncio.ensure_future(watch()), asyncio.ensure_future(write())
    for lane in (0, 1):
        assert (await _totals(wire, lane, 3000))[-1] == 3000
    async with asyncio.timeout(SECONDS):
        await writing
    watching.cancel()
    # One message more than the credit, at the most.
    assert 0 < peak <= 64 + 20


async def test_all_credit_comes_back(sums) -> None:
    served = await sums(unacknowledged_steps_max=8, run_steps_max=3)
    wire = served.wire("accumulator")
    await wire.open(0, "credit", **MINE)
    await wire.push(0, floats([1] * 20), first=0)  # stalls
    await wire.open(1)
    await wire.push(1, floats([1, np.nan]))  # faulty
    await wire.next_fault(1)
    await wire.push(1, floats([1] * 5), first=9)  # dropped behind the fault
    await wire.open(2)
    await wire.push(2, floats([1] * 5), first=9)  # a gap
    await wire.next_fault(2)
    await wire.open(3)
    await wire.push(3, floats([1] * 5), first=0)
    await wire.push(3, floats([1] * 5), first=3)  # three of them again
    await wire.send(lane=[3, 99], steps=[2, 2], inputs=[Tensor(data=floats([1] * 4).tobytes())])
    await wire.next_fault(99)
    await wire.send(lane=[3], steps=[4], inputs=[])
    await wire.next_fault(3)
    await wire.send(park=[0])
    for step in (8, 16):
        await wire.rows(0, 8)
        await wire.send(received=[Received(lane=0, step=step)])
    await wire.next_closed(0)
    await wire.settle()
    (host,) = served.server.hosts.values()
    assert [stream.queued_steps for stream in host._streams] == [0]


async def test_what_has_no_steps_takes_credit_too(sums) -> None:
    served = await sums(unacknowledged_steps_max=8)
    wire = served.wire("accumulator")
    await wire.open(0, "s", **MINE)
    await wire.push(0, floats([1] * 20))
    await wire.rows(0, 8)
    (host,) = served.server.hosts.values()
    (stream,) = host._streams
    await wire.send(lane=[0, 0], steps=[0, 0], inputs=[Tensor()])
    await wire.send(park=[0, 0])
    await wire.settle()
    assert stream.queued_steps == 12 + 2 + 1
    for step in (8, 16):
        await wire.send(received=[Received(lane=0, step=step)])
    await wire.next_closed(0)
    assert (await wire.next_fault(0)).expected_step == 20
    await wire.settle()
    assert stream.queued_steps == 0


async def test_who_does_not_read_is_not_read_from(sums) -> None:
    served = await sums()
    wire = served.wire("accumulator")
    lanes = range(1, 40_001)
    await wire.send(lane=lanes, inputs=[Tensor(data=bytes(4 * len(lanes)))])
    (host,) = served.server.hosts.values()
    await eventually(lambda: [one for one in host._streams if one.is_ahead])
    (stream,) = host._streams
    assert len(stream.outbox) < 25_000
    await wire.until(lambda: len(wire.faults) == len(lanes))


async def test_what_is_acknowledged_twice_or_for_nobody_counts_once(sums) -> None:
    served = await sums()
    wire = served.wire("accumulator")
    for lane, name in enumerate("ab"):
        await wire.open(lane, name, **MINE)
        await wire.push(lane, floats([1] * 5))
        await wire.rows(lane, 5)
    received = [(1, 4), (0, 1), (0, 3), (77, 5), (0, 2), (1, 1)]
    await wire.send(received=[Received(lane=lane, step=step) for lane, step in received])
    wire.cut()
    await served.parked("accumulator", "a", "b")
    held = {name: info.held_steps for name, info in (await served.list("accumulator")).items()}
    assert held == {"a": 2, "b": 1}


async def test_a_step_that_waits_for_long_does_not_keep_the_messages_it_came_in(
    sums, monkeypatch
) -> None:
    compacted_bytes_min = 1 << 18
    monkeypatch.setattr("sluice_service.batching.queues._COMPACTED_BYTES_MIN", compacted_bytes_min)
    monkeypatch.setattr("sluice_service.batching.queues._COMPACTED_FRAME_BYTES_MIN", 16 << 10)
    served = await sums(unacknowledged_steps_max=8)
    (host,) = served.server.hosts.values()
    wire = served.wire("accumulator")
    await wire.open(0, "slow", **MINE)
    await wire.open(1)
    frames, peak = host._scheduler._queues.frames, 0
    for number in range(1, 41):
        data = np.r_[np.float32(1), np.zeros(5_000, np.float32)]
        await wire.send(lane=[0, 1], steps=[1, 5_000], inputs=[Tensor(data=data.tobytes())])
        await wire.until(lambda number=number: wire.steps(1) == 5_000 * number)
        peak = max(peak, sum(rows.bytes for rows in frames.values()))
    assert peak < 1.5 * compacted_bytes_min  # of 0.8 MB
    totals = list[float]()
    for step in range(8, 48, 8):
        totals += await _totals(wire, 0, 8)
        await wire.send(received=[Received(lane=0, step=step)])
    assert totals == list(range(1, 41))


async def test_sequences_that_come_and_go_unacknowledged_leave_nothing_behind(sums) -> None:
    served = await sums()
    wire = served.wire("accumulator")
    await wire.open(1, "idle", **MINE)
    await wire.push(1, floats([1]))
    await wire.rows(1, 1)  # never acknowledged: it stays due
    for number in range(300):
        await wire.open(0, f"brief-{number}", **MINE)
        await wire.push(0, floats([1]))
        await wire.rows(0, 1)
        await wire.send(close=[0])
        await wire.next_closed(0)
    (host,) = served.server.hosts.values()
    (stream,) = host._streams
    assert len(stream.unacknowledged) < 100
    wire.cut()
    await served.parked("accumulator", "idle")
    again = served.wire("accumulator")
    await again.open(0, "idle", mode=RESUME, attempt=1, received=0, **MINE)
    assert await _totals(again, 0, 1) == [1]


# Draining.


async def test_a_stop_finishes_what_is_queued_then_tells_every_lane(sums, unhurried) -> None:
    served = await sums(run_steps_max=1)
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.open(1, "stalled", **MINE)
    await wire.push(0, floats([1] * 2000))
    await wire.settle()
    served.is_stopped = True
    stopping = asyncio.ensure_future(served.server.stop())
    assert await wire.next_closed(0) == Closed.DRAINING
    assert await wire.next_closed(1) == Closed.DRAINING
    assert (await _totals(wire, 0, 2000))[-1] == 2000
    assert await wire.status() == StatusCode.OK
    async with asyncio.timeout(SECONDS):
        await stopping


async def test_a_server_that_stops_opens_nothing_new(sums) -> None:
    served = await sums()
    (host,) = served.server.hosts.values()
    await host.drain()
    wire = served.wire("accumulator")
    fault = await wire.refused(0, "late")
    assert (fault.reason, fault.code) == (Fault.DRAINING, StatusCode.UNAVAILABLE.value[0])
    assert "another" in fault.message
    (info,) = (await served.models.ListModels(ListModelsRequest(), timeout=SECONDS)).models
    assert not info.is_ready


async def test_a_client_may_send_all_its_credit_before_it_reads(serve, lstm_file) -> None:
    served = await serve({"lstm": lstm_file.path}, stream_queue_steps_max=40_000)
    # With a window that does not grow, the connection itself takes 64 kB and no more.
    channel = grpc.aio.insecure_channel(served.address, options=[("grpc.http2.bdp_probe", 0)])
    wire = Wire(channel, model="lstm")
    await wire.open(0)
    for _ in range(40):
        await wire.push(0, np.zeros((1000, 8), np.float32))
    # A lane that is opened behind all that is served before anything is read.
    await wire.send(open=[OpenSequence(lane=1, sequence_id="behind-all")])
    await eventually(lambda: served.find("lstm", "behind-all"))
    assert (await wire.rows(0, 40_000)).shape == (40_000, 4)
    await channel.close()


@pytest.mark.parametrize("writes", [1, 3, 30])
async def test_a_client_that_goes_away_unread_is_no_defect(served, writes, caplog) -> None:
    name = f"unread-{writes}"
    gc.collect()  # what other tests have left is told now
    await asyncio.sleep(0)
    caplog.clear()
    with structlog.testing.capture_logs() as logs:
        wire = served.wire("lstm")
        await wire.open(0, name, **MINE)
        for _ in range(writes):
            await wire.push(0, np.zeros((3900 // writes, 8), np.float32))
        await eventually(lambda: served.find("lstm", name).step == 3900)
        wire.cut()
        await served.parked("lstm", name)
        gc.collect()  # an error that nobody looked at is told when it is forgotten
        await asyncio.sleep(0)
    assert [line for line in logs if line["log_level"] == "error"] == []
    assert caplog.records == []
    again = served.wire("lstm")
    opened = await again.open(0, name, mode=RESUME, attempt=1, received=0, **MINE)
    assert opened.applied == 3900
    assert (await again.rows(0, 3900)).shape == (3900, 4)


async def test_a_client_that_never_reads_takes_no_memory_without_bound(serve, lstm_file) -> None:
    bound = 64 * 2**10
    served = await serve({"lstm": lstm_file.path}, stream_queue_bytes_max=bound)
    # With a window that does not grow, the connection itself takes 64 kB and no more.
    channel = grpc.aio.insecure_channel(served.address, options=[("grpc.http2.bdp_probe", 0)])
    wire = Wire(channel, model="lstm")
    await wire.open(0, "unread")
    x = np.zeros((500, 8), np.float32)
    messages = 400  # of 16 kB each; their outputs are half of that
    writing = asyncio.ensure_future(_push(wire, x, messages))
    (stream,) = served.server.hosts["lstm"]._streams

    def waiting() -> int:
        deliveries = [item for item in stream.outbox if isinstance(item, Outputs)]
        return sum(len(output) for item in deliveries for output in item.outputs)

    await eventually(lambda: waiting() > bound // 2)
    peak = 0
    for _ in range(200):
        peak = max(peak, waiting())
        await asyncio.sleep(0.001)
    # Once beyond the bound nothing more is read, and what was read is little.
    assert peak < 3 * bound
    assert served.find("lstm", "unread").step < 500 * messages // 2
    await wire.rows(0, 500 * messages)
    await writing
    await channel.close()


async def _push(wire: Wire, x: np.ndarray, messages: int) -> None:
    for _ in range(messages):
        await wire.push(0, x)
