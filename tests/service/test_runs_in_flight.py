"""What happens while a run is in another thread: nothing that the run could disturb, or be
disturbed by, before it has landed."""

import asyncio
from collections.abc import Callable

import pytest
from grpc import StatusCode

from sluice_protos.sequences_pb2 import RESUME, TAKEOVER, Closed, Fault, OpenSequence, Tensor
from tests.service.wire import SECONDS, Served, Wire, eventually, floats

MINE = {"writer": b"mine"}


@pytest.fixture
async def gated(gate, sums) -> Served:
    return await sums()


async def _stays(condition: Callable[[], bool]) -> None:
    """The condition holds now and after others had their turn."""
    for _ in range(20):
        assert condition()
        await asyncio.sleep(0.001)


async def test_chunks_that_arrive_during_a_run_share_the_next_one(gate, gated) -> None:
    wires = [gated.wire("accumulator") for _ in range(4)]
    for wire in wires:
        await wire.open(0)
    await wires[0].push(0, floats([1]))
    await gate.reached()
    for wire in wires[1:]:
        await wire.push(0, floats([2]))
        await wire.push(0, floats([3]))
    await eventually(lambda: gated.metric("sluice_chunks_total", model="accumulator") == 7)
    for _ in range(3):
        await gate.let_through()
    assert (await wires[0].rows(0, 1)).ravel().tolist() == [1]
    for wire in wires[1:]:
        assert (await wire.rows(0, 2)).ravel().tolist() == [2, 5]
    assert gated.metric("sluice_runs_total", model="accumulator") == 3


async def test_the_state_is_read_as_it_was_before_the_run(gate, gated) -> None:
    wire = gated.wire("accumulator")
    await wire.open(0, "read")
    await wire.push(0, floats([5]))
    await gate.reached()
    state = await gated.state("accumulator", "read")
    assert (state.step, state.row) == (0, floats([0]).tobytes())
    await gate.let_through()
    await wire.rows(0, 1)
    state = await gated.state("accumulator", "read")
    assert (state.step, state.row) == (1, floats([5]).tobytes())


async def test_a_stream_without_more_to_send_still_gets_what_runs(gate, gated) -> None:
    wire = gated.wire("accumulator")
    await wire.open(0)
    await wire.push(0, floats([5]))
    await gate.reached()
    ending = asyncio.ensure_future(wire.end())
    await _stays(lambda: not ending.done())
    await gate.let_through()
    assert await ending == StatusCode.OK
    assert (await wire.rows(0, 1)) == 5


async def test_a_run_of_a_stream_that_is_cut_counts_and_its_outputs_are_held(gate, gated) -> None:
    wire, again = gated.wire("accumulator"), gated.wire("accumulator")
    await wire.open(0, "cut", **MINE)
    await wire.push(0, floats([5]), first=0)
    await wire.push(0, floats([6]), first=1)
    await gate.reached()
    wire.cut()
    await gated.parked("accumulator", "cut")
    # An open waits for the run.
    opening = asyncio.ensure_future(
        again.open(0, "cut", mode=RESUME, attempt=1, received=0, **MINE)
    )
    await _stays(lambda: not opening.done())
    await gate.let_through()
    opened = await opening
    assert (opened.applied, opened.held_from) == (1, 0)
    assert (await again.rows(0, 1)) == 5
    # What was queued behind the run went with the stream.
    await again.push(0, floats([6]), first=1)
    await gate.let_through()
    assert (await again.rows(0, 1)) == 11


async def test_a_takeover_waits_for_the_run_and_the_old_lane_gets_its_output(gate, gated) -> None:
    old, new = gated.wire("accumulator"), gated.wire("accumulator")
    first = await old.open(0, "taken", **MINE)
    await old.push(0, floats([5]))
    await gate.reached()
    opening = asyncio.ensure_future(
        new.open(0, "taken", mode=TAKEOVER, expected_epoch=first.epoch, writer=b"other")
    )
    await _stays(lambda: not opening.done())
    await gate.let_through()
    assert (await opening).applied == 1
    assert (await old.rows(0, 1)) == 5
    assert await old.next_closed(0) == Closed.FENCED


async def test_an_open_whose_stream_went_away_attaches_nothing(gate, gated) -> None:
    wire, gone, again = (gated.wire("accumulator") for _ in range(3))
    await wire.open(0, "busy", **MINE)
    await wire.open(1, "wanted", **MINE)
    await wire.send(park=[1])
    await wire.next_closed(1)
    await wire.push(0, floats([1]))
    await gate.reached()
    await gone.send(open=[OpenSequence(lane=0, sequence_id="wanted", mode=RESUME, **MINE)])
    (host,) = gated.server.hosts.values()
    await eventually(lambda: host._runs._waiting)
    gone.cut()
    await eventually(lambda: gated.metric("sluice_streams_open", model="accumulator") == 1)
    await gate.let_through()
    await wire.rows(0, 1)
    assert (await gated.list("accumulator"))["wanted"].is_parked
    opened = await again.open(0, "wanted", mode=RESUME, attempt=1, **MINE)
    assert opened.applied == 0


async def test_a_close_from_outside_waits_for_the_run(gate, gated) -> None:
    wire = gated.wire("accumulator")
    await wire.open(0, "closed", **MINE)
    await wire.push(0, floats([5, 6]))
    await gate.reached()
    closing = asyncio.ensure_future(gated.close("accumulator", "closed"))
    await _stays(lambda: not closing.done())
    await gate.let_through()
    assert await closing == 2
    assert (await wire.rows(0, 2)).ravel().tolist() == [5, 11]
    assert await wire.next_closed(0) == Closed.CLIENT


async def test_a_slot_that_is_freed_during_a_run_takes_nothing_of_it(hands, gate, gated) -> None:
    wire = gated.wire("accumulator")
    await wire.open(0, "runs")
    await wire.open(1, "rests")
    await wire.push(0, floats([5]))
    await gate.reached()
    (host,) = gated.server.hosts.values()
    # Everything expires but what runs.
    hands.go(host, 601)
    await host.expire()
    assert await wire.next_closed(1) == Closed.IDLE
    assert set(await gated.list("accumulator")) == {"runs"}
    await gate.let_through()
    assert (await wire.rows(0, 1)) == 5
    await wire.open(1, "newcomer")
    await wire.push(1, floats([1]))
    await gate.let_through()
    assert (await wire.rows(1, 1)) == 1


async def test_a_park_behind_a_run_waits_for_it(gate, gated) -> None:
    wire = gated.wire("accumulator")
    await wire.open(0, "park", **MINE)
    await wire.send(lane=[0], inputs=[Tensor(data=floats([5]).tobytes())], park=[0])
    await gate.reached()
    await _stays(lambda: not wire.ended[0])
    await gate.let_through()
    assert await wire.next_closed(0) == Closed.PARKED
    assert (await wire.rows(0, 1)) == 5


async def test_a_fault_in_a_run_whose_stream_is_gone_leaves_the_state(gate, gated) -> None:
    wire, again = gated.wire("accumulator"), gated.wire("accumulator")
    await wire.open(0, "overflow", **MINE)
    await wire.push(0, floats([3e38, 3e38]))
    await gate.reached()
    wire.cut()
    await gated.parked("accumulator", "overflow")
    await gate.let_through()
    opened = await again.open(0, "overflow", mode=RESUME, attempt=1, **MINE)
    assert opened.applied == 0
    await again.push(0, floats([1]))
    await gate.let_through()
    assert (await again.rows(0, 1)) == 1
    assert not again.faults[0]


async def test_what_follows_a_run_that_is_refused_is_dropped(gate, gated) -> None:
    wire = gated.wire("accumulator")
    await wire.open(0)
    await wire.open(1)
    await wire.send(lane=[0, 1], inputs=[Tensor(data=floats([3e38, 1]).tobytes())])
    await gate.let_through()
    await wire.send(lane=[0, 1], inputs=[Tensor(data=floats([3e38, 2]).tobytes())])
    await gate.reached()
    # Sent before the refusal was known.
    await wire.send(lane=[0, 1], inputs=[Tensor(data=floats([100, 3]).tobytes())])
    await gate.let_through()
    fault = await wire.next_fault(0)
    assert (fault.reason, fault.expected_step) == (Fault.NON_FINITE, 1)
    await gate.let_through()
    assert (await wire.rows(1, 3)).ravel().tolist() == [1, 3, 6]
    await wire.push(0, floats([-3e38]), first=1)
    await gate.let_through()
    assert (await wire.rows(0, 2)).ravel().tolist()[1] == 0


async def test_a_stop_waits_for_the_run(gate, gated, unhurried) -> None:
    wire = gated.wire("accumulator")
    await wire.open(0)
    await wire.push(0, floats([5]))
    await gate.reached()
    gated.is_stopped = True
    stopping = asyncio.ensure_future(gated.server.stop())
    await _stays(lambda: not stopping.done())
    await gate.let_through()
    assert (await wire.rows(0, 1)) == 5
    assert await wire.next_closed(0) == Closed.DRAINING
    async with asyncio.timeout(SECONDS):
        await stopping


async def test_a_stop_waits_no_longer_than_it_may(gate, sums, unhurried) -> None:
    served = await sums(drain_seconds_max=0.05)
    wire = served.wire("accumulator")
    await wire.open(0)
    await wire.push(0, floats([5]))
    await gate.reached()
    served.is_stopped = True
    async with asyncio.timeout(SECONDS):
        await served.server.stop()
    # What still ran is lost to this client, and it is told.
    assert await wire.next_closed(0) == Closed.DRAINING
    await gate.let_through()


async def test_a_defect_in_a_run_becomes_a_fault_that_tells_nothing(
    gate, gated, monkeypatch
) -> None:
    wire = gated.wire("accumulator")
    await wire.open(0, "defect")
    await wire.push(0, floats([5]))
    with monkeypatch.context() as patch:
        patch.setattr("sluice_model.Model.run", lambda *_: 1 // 0)
        await gate.let_through()
    fault = await wire.next_fault(0)
    assert (fault.reason, fault.code) == (Fault.RUN_FAILED, StatusCode.INTERNAL.value[0])
    assert "division" not in fault.message
    assert (await gated.state("accumulator", "defect")).step == 0
    await wire.push(0, floats([5]), first=0)
    await gate.let_through()
    assert (await wire.rows(0, 1)) == 5


async def _streams(served: Served, count: int) -> list[Wire]:
    """So many streams, each with a sequence on lane 0."""
    wires = [served.wire("accumulator") for _ in range(count)]
    for wire in wires:
        await wire.open(0)
    return wires


async def test_runs_in_flight_at_once_may_end_in_another_order_than_they_began(gate, sums) -> None:
    first, second, third = await _streams(await sums(runs_at_once_max=2), 3)
    await first.push(0, floats([5]))
    await gate.reached()
    await second.push(0, floats([7]))
    await eventually(lambda: len(gate.held) == 2)
    # A third has to wait, as have the next steps of what runs.
    await third.push(0, floats([9]))
    await first.push(0, floats([1]))
    await _stays(lambda: len(gate.held) == 2)
    gate.held.rotate(-1)
    await gate.let_through()
    assert (await second.rows(0, 1)).ravel().tolist() == [7]
    await eventually(lambda: len(gate.held) == 2)
    gate.held.rotate(-1)
    await gate.let_through()
    assert (await third.rows(0, 1)).ravel().tolist() == [9]
    for _ in range(2):
        await gate.let_through()
    assert (await first.rows(0, 2)).ravel().tolist() == [5, 6]


async def test_a_long_run_is_done_in_parts_where_several_may_be_in_flight(gate, sums) -> None:
    wire = (await sums(runs_at_once_max=3)).wire("accumulator")
    for lane in range(4):
        await wire.open(lane)
    await wire.send(lane=range(4), inputs=[Tensor(data=floats([1, 2, 3, 4]).tobytes())])
    await eventually(lambda: len(gate.held) == 3)
    for _ in range(3):
        await gate.let_through()
    assert [(await wire.rows(lane, 1)).item() for lane in range(4)] == [1, 2, 3, 4]


async def test_nothing_new_runs_while_somebody_waits_for_all_runs_to_end(gate, sums) -> None:
    served = await sums(runs_at_once_max=2)
    (host,) = served.server.hosts.values()
    first, second = await _streams(served, 2)
    await first.push(0, floats([5]))
    await gate.reached()
    await second.send(open=[OpenSequence(lane=1)])
    await eventually(lambda: host._runs._waiting)
    await first.push(0, floats([6]))
    await eventually(lambda: served.metric("sluice_chunks_total", model="accumulator") == 2)
    await _stays(lambda: len(gate.held) == 1 and 1 not in second.opened)
    await gate.let_through()
    await second.next_opened(1)
    await gate.let_through()
    assert (await first.rows(0, 2)).ravel().tolist() == [5, 11]
