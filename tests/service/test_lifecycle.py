"""How sequences end without their client's doing, and what can be asked about them."""

import asyncio

import numpy as np
import pytest
from grpc import StatusCode

from sluice_protos.sequences_pb2 import RESUME, Closed, Fault, OpenSequence, Tensor
from sluice_service.runtime.clock import AwakeClock
from tests.models import run_offline
from tests.service.hands import Hands
from tests.service.wire import SECONDS, Served, floats

MINE = {"writer": b"mine"}


def test_time_that_a_process_was_paused_does_not_count() -> None:
    hands = Hands()
    clock = AwakeClock(gap_max=2.0, monotonic=hands)
    assert clock.now() == 0
    hands.go(clock, 10)
    assert clock.now() == 10
    hands.seconds += 3600  # SIGSTOP, a suspended machine, a debugger
    assert clock.now() == 12
    hands.seconds += 1
    assert clock.now() == 13


@pytest.fixture
async def timed(sums, hands):
    """A server whose sequences may idle for 60 seconds of a clock in our hands."""
    served = await sums(sequence_idle_seconds_max=60, tombstone_seconds=100)
    (host,) = served.server.hosts.values()

    async def go(seconds: float) -> None:
        hands.go(host, seconds)
        await host.expire()

    served.go = go
    served.hands = hands
    served.host = host
    return served


async def test_an_idle_sequence_expires_and_its_client_and_the_metrics_are_told(timed) -> None:
    wire = timed.wire("accumulator")
    await wire.open(0, "idle", **MINE)
    await wire.open(1, "busy", **MINE)
    await wire.open(2, "parked", **MINE)
    await wire.send(park=[2])
    await wire.next_closed(2)
    await timed.go(59)
    await wire.push(1, floats([1]))
    await wire.rows(1, 1)
    assert set(await timed.list("accumulator")) == {"idle", "busy", "parked"}
    await timed.go(2)
    assert set(await timed.list("accumulator")) == {"busy"}
    assert await wire.next_closed(0) == Closed.IDLE

    def closed(reason: str) -> float:
        return timed.metric("sluice_sequences_closed_total", model="accumulator", reason=reason)

    assert (closed("idle"), closed("parked")) == (2, 1)
    # Its state is gone, and its writer is told why.
    fault = await wire.refused(3, "idle", mode=RESUME, attempt=1, **MINE)
    assert fault.reason == Fault.SEQUENCE_CLOSED
    assert "60 seconds" in fault.message
    await wire.push(0, floats([1]))
    await wire.settle()
    assert not wire.faults[0]
    await wire.push(1, floats([1]))
    assert (await wire.rows(1, 1)) == 2


async def test_a_pause_of_the_process_expires_nobody(timed) -> None:
    wire = timed.wire("accumulator")
    await wire.open(0, "survivor")
    timed.hands.seconds += 100_000
    await timed.go(1)
    await wire.push(0, floats([1]))
    assert (await wire.rows(0, 1)) == 1


async def test_an_expired_sequence_leaves_its_row_to_others_clean(timed) -> None:
    wire = timed.wire("accumulator")
    await wire.open(0, "first")
    await wire.push(0, floats([100]))
    await wire.rows(0, 1)
    await timed.go(61)
    await wire.open(1, "second")
    await wire.push(1, floats([1]))
    assert (await wire.rows(1, 1)) == 1


async def test_a_tombstone_is_forgotten_when_its_time_is_over(timed) -> None:
    wire = timed.wire("accumulator")
    await wire.open(0, "buried", **MINE)
    await timed.close("accumulator", "buried")
    assert await wire.next_closed(0) == Closed.CLIENT
    await timed.go(99)
    fault = await wire.refused(0, "buried", attempt=1, **MINE)
    assert fault.reason == Fault.SEQUENCE_CLOSED
    await timed.go(2)
    assert (await wire.open(0, "buried", attempt=2, **MINE)).applied == 0


async def test_a_server_looks_for_idle_sequences_by_itself(sums, monkeypatch) -> None:
    monkeypatch.setattr("sluice_service.models.host._TICK_SECONDS", 0.02)
    served = await sums(sequence_idle_seconds_max=0.05)
    wire = served.wire("accumulator")
    await wire.open(0, "idle")
    assert await wire.next_closed(0) == Closed.IDLE


async def test_a_defect_in_looking_for_idle_sequences_does_not_end_the_looking(
    sums, monkeypatch
) -> None:
    monkeypatch.setattr("sluice_service.models.host._TICK_SECONDS", 0.02)
    looks = []

    def forget(*_: object, **__: object) -> None:
        looks.append(len(looks))
        if len(looks) < 3:
            raise ZeroDivisionError

    monkeypatch.setattr("sluice_service.sequences.table.SequenceTable.drop_tombstones", forget)
    served = await sums(sequence_idle_seconds_max=0.03)
    wire = served.wire("accumulator")
    await wire.open(0, "idle")
    assert await wire.next_closed(0) == Closed.IDLE
    assert len(looks) >= 3


async def test_what_a_parked_lane_has_not_acknowledged_is_held_once_when_its_stream_ends(
    sums,
) -> None:
    served = await sums()
    wire, again = served.wire("accumulator"), served.wire("accumulator")
    await wire.open(0, "parked", attempt=1, **MINE)
    await wire.push(0, floats([1, 2, 3]))
    await wire.rows(0, 3)
    await wire.send(park=[0])
    await wire.next_closed(0)
    await wire.end()
    await again.open(0, "parked", mode=RESUME, attempt=2, received=0, **MINE)
    await again.settle()
    assert (await again.rows(0, 3)).ravel().tolist() == [1, 3, 6]
    assert not again.pieces[0]


async def test_at_the_limit_new_sequences_are_refused_and_none_is_evicted(sums) -> None:
    served = await sums(sequences_max=3)
    wire = served.wire("accumulator")
    for lane in range(3):
        await wire.open(lane, f"s{lane}")
        await wire.push(lane, floats([lane]))
        await wire.rows(lane, 1)
    fault = await wire.refused(3, "one-too-many")
    assert (fault.reason, fault.code) == (Fault.LIMIT, StatusCode.RESOURCE_EXHAUSTED.value[0])
    assert "sequences-max" in fault.message
    assert set(await served.list("accumulator")) == {"s0", "s1", "s2"}
    assert served.metric("sluice_sequences_max", model="accumulator") == 3
    # An open of one that lives needs no room.
    await wire.open(3, "s0", mode=RESUME)
    # Where one ends there is room for one.
    assert await served.close("accumulator", "s1") == 1
    await wire.open(4, "one-too-many")
    await wire.push(4, floats([7]))
    assert (await wire.rows(4, 1)) == 7
    for lane, value in ((3, 0), (2, 2)):
        await wire.push(lane, floats([10]))
        assert (await wire.rows(lane, 1)) == value + 10


async def test_close_from_outside_tells_the_lane(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "outside", **MINE)
    await wire.push(0, floats([1, 2, 3]))
    await wire.rows(0, 3)
    assert await served.close("accumulator", "outside") == 3
    assert await wire.next_closed(0) == Closed.CLIENT
    assert "outside" not in await served.list("accumulator")
    await wire.push(0, floats([1]))
    await wire.settle()
    assert not wire.pieces[0]
    fault = await wire.refused(0, "outside", mode=RESUME, attempt=1, **MINE)
    assert fault.reason == Fault.SEQUENCE_CLOSED


async def test_a_close_waits_for_what_was_sent_before_it(served) -> None:
    wire = served.wire("accumulator")
    await wire.open(0, "close-last", **MINE)
    await wire.send(
        lane=[0], steps=[500], inputs=[Tensor(data=floats([1] * 500).tobytes())], close=[0]
    )
    assert await wire.next_closed(0) == Closed.CLIENT
    assert (await wire.rows(0, 500))[-1] == 500


async def test_the_list_tells_where_each_sequence_stands(sums, lstm_file, serve) -> None:
    served = await sums()
    wire = served.wire("accumulator")
    first = await wire.open(0, "named", **MINE)
    second = await wire.open(1, "anonymous")
    for lane in (0, 1):
        await wire.push(lane, floats([1, 2, 3]))
        await wire.rows(lane, 3)
    await wire.send(park=[1])
    await wire.next_closed(1)
    infos = await served.list()
    assert set(infos) == {"named", "anonymous"}
    named, anonymous = infos["named"], infos["anonymous"]
    assert (named.model, named.step, named.epoch) == ("accumulator", 3, first.epoch)
    assert (named.is_parked, named.held_steps) == (False, 3)
    assert (anonymous.is_parked, anonymous.held_steps) == (True, 0)
    assert anonymous.epoch == second.epoch != first.epoch
    assert 0 <= named.idle_seconds < SECONDS


async def test_the_list_of_one_model_has_no_other(served) -> None:
    wires = {name: served.wire(name) for name in ("accumulator", "lstm")}
    for name, wire in wires.items():
        await wire.open(0, f"listed-{name}")
    assert "listed-lstm" not in await served.list("accumulator")
    assert {"listed-lstm", "listed-accumulator"} <= set(await served.list())


async def test_a_list_that_goes_out_slowly_tells_no_ones_numbers_as_anothers(sums) -> None:
    served = await sums()
    wire = served.wire("accumulator")
    await wire.open(0, "a")
    await wire.open(1, "b")
    (host,) = served.server.hosts.values()
    listing = host.sequences()
    assert next(listing).sequence_id == "a"
    await served.close("accumulator", "b")
    await wire.open(2, "c")
    await wire.push(2, floats([1]))
    await wire.rows(2, 1)
    assert list(listing) == []


async def test_the_state_is_that_of_the_steps_applied(served, lstm_file) -> None:
    wire = served.wire("lstm")
    x = np.random.default_rng(8).standard_normal((9, 8)).astype(np.float32)
    await wire.open(0, "state")
    empty = await served.state("lstm", "state")
    assert (empty.step, set(empty.row)) == (0, {0})
    await wire.push(0, x[:6])
    await wire.rows(0, 6)
    state = await served.state("lstm", "state")
    assert state.step == 6
    assert len(state.row) == 4 * 64  # h and c of 16 in two layers
    # It is the state from which the rest of the sequence follows.
    other = served.wire("lstm")
    await other.send(open=[OpenSequence(lane=0, state=state)])
    await other.push(0, x[6:])
    (offline,) = run_offline(lstm_file.path, {"x": x})
    assert (await other.rows(0, 3) == offline[6:]).all()


async def test_sequences_that_come_at_once_and_go_at_once_leave_no_trace(sums) -> None:
    served: Served = await sums(sequences_max=50)
    for _ in range(3):
        wires = [served.wire("accumulator") for _ in range(5)]
        for wire in wires:
            await wire.send(
                open=[OpenSequence(lane=n) for n in range(10)],
                lane=range(10),
                inputs=[Tensor(data=floats(range(10)).tobytes())],
                close=range(10),
            )
        for wire in wires:
            async with asyncio.timeout(SECONDS):
                for lane in range(10):
                    assert await wire.next_closed(lane) == Closed.CLIENT
            assert await wire.end() == StatusCode.OK
    assert served.metric("sluice_sequences_live", model="accumulator") == 0
    assert served.metric("sluice_steps_total", model="accumulator") == 150
    (host,) = served.server.hosts.values()
    assert host._table.states.live == 0
