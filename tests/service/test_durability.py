"""Sequences that outlive their server: two servers, one store, and all that comes between."""

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest

from sluice_protos.sequences_pb2 import (
    OFF,
    PERIODIC,
    RESTART,
    RESUME,
    START,
    START_OR_RESUME,
    STRICT,
    TAKEOVER,
    Closed,
    Fault,
    ForkRequest,
    OpenSequence,
    Tensor,
)
from sluice_service.store import StoreError
from tests.service.wire import Served, eventually, floats

MODEL = "accumulator"
ME, HER = b"me", b"her"
# So far away that only what a test does makes a checkpoint.
NEVER = 1e6

Replicas = Callable[..., Awaitable[Served]]


async def crash(served: Served) -> None:
    """End a server as kill -9 would: nothing is finished, and the store hears no more of it."""
    store = served.server.store
    for method in ("claim", "read", "write", "close", "renew_leases"):
        setattr(store, method, _fail)
    served.server.hosts.stop()
    await store.stop()
    await served.server._grpc.stop(0)
    await served.server._pages.stop()
    await served.channel.close()
    served.is_stopped = True


@pytest.fixture
async def replica(serve, accumulator_file, tmp_path) -> AsyncIterator[Replicas]:
    """`await replica(**settings)`: one more server over the same store."""

    async def start(**settings: Any) -> Served:
        fields = {"durability": "strict", "checkpoint_seconds": NEVER, **settings}
        store = f"sqlite:///{tmp_path}/sequences.db"
        return await serve({MODEL: accumulator_file}, store=store, **fields)

    return start


@pytest.fixture
async def sums_only(serve, accumulator_file) -> Served:
    """A server that keeps nothing."""
    return await serve({MODEL: accumulator_file})


@pytest.fixture
def held_writes(monkeypatch) -> Callable[[Served], asyncio.Event]:
    """`held_writes(served)`: checkpoints reach the store of a server once that event is set."""

    def hold(served: Served) -> asyncio.Event:
        store, may_write = served.server.store, asyncio.Event()
        write = store.write

        async def write_late(writes):
            await may_write.wait()
            return await write(writes)

        monkeypatch.setattr(store, "write", write_late)
        return may_write

    return hold


async def sums(wire, lane: int, first: int, values: list[float]) -> list[float]:
    """Run a chunk and wait for its outputs."""
    await wire.push(lane, floats(values), first=first)
    return (await wire.rows(lane, len(values))).ravel().tolist()


# What survives.


async def test_strict_every_output_that_left_survives_the_server(replica) -> None:
    first = await replica()
    wire = first.wire(MODEL)
    opened = await wire.open(0, "s", writer=ME, attempt=1)
    assert opened.durability == STRICT
    assert await sums(wire, 0, 0, [1, 2, 3]) == [1, 3, 6]
    await crash(first)

    wire = (await replica()).wire(MODEL)
    opened = await wire.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=3)
    assert (opened.applied, opened.durable) == (3, 3)
    assert await sums(wire, 0, 3, [4]) == [10]


async def test_strict_what_was_not_acknowledged_is_sent_again_by_the_next_server(replica) -> None:
    first = await replica()
    wire = first.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2, 3])
    await crash(first)

    wire = (await replica()).wire(MODEL)
    opened = await wire.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=1)
    assert (opened.applied, opened.held_from) == (3, 1)
    assert (await wire.rows(0, 2)).ravel().tolist() == [3, 6]
    assert await sums(wire, 0, 3, [4]) == [10]


async def test_a_parked_lane_is_stored_with_its_outputs_once_while_its_stream_goes_on(
    replica,
) -> None:
    first = await replica()
    wire = first.wire(MODEL)
    await wire.open(0, "parked", writer=ME, attempt=1)
    await wire.open(1, "goes on", writer=ME, attempt=1)
    # The outputs of both lanes go out as one, and nobody acknowledges them.
    both = Tensor(data=floats([1, 10]).tobytes())
    await wire.send(lane=[0, 1], inputs=[both])
    await wire.rows(1, 1)
    await wire.send(park=[0])
    await wire.next_closed(0)
    # Both are stored once more, in one go.
    host = first.server.hosts[MODEL]
    await host._keeper.flush()
    await crash(first)

    wire = (await replica()).wire(MODEL)
    for lane, name, value in ((0, "parked", 1), (1, "goes on", 10)):
        await wire.open(lane, name, mode=RESUME, writer=ME, attempt=2, received=0)
        await wire.settle()
        assert (await wire.rows(lane, 1)).ravel().tolist() == [value]
        assert await sums(wire, lane, 1, [1]) == [value + 1]


@pytest.mark.parametrize(("ending", "reason"), [("close", Closed.CLIENT), ("park", Closed.PARKED)])
async def test_strict_an_ending_in_the_message_of_the_last_chunk_lets_its_outputs_leave(
    replica, ending, reason
) -> None:
    wire = (await replica()).wire(MODEL)
    await wire.open(0, "s")
    chunk = {"lane": [0], "steps": [3], "inputs": [Tensor(data=floats([1, 2, 3]).tobytes())]}
    await wire.send(**chunk, **{ending: [0]})
    assert await wire.next_closed(0) == reason
    assert [(first, steps) for first, steps, *_ in wire.pieces[0]] == [(0, 3)]
    assert (await wire.rows(0, 3)).ravel().tolist() == [1, 3, 6]


async def test_a_client_that_has_sent_all_gets_all_however_slow_the_store(
    replica, held_writes
) -> None:
    served = await replica(
        durability="periodic", checkpoint_steps=16, undurable_steps_max=64, run_steps_max=16
    )
    wire = served.wire(MODEL)
    await wire.open(0, "s")
    may_write = held_writes(served)
    await wire.push(0, floats([1] * 300))
    await wire.until(lambda: wire.steps(0) == 64)
    (stream,) = served.server.hosts[MODEL]._lanes._streams.values()
    ending = asyncio.ensure_future(wire.end())
    await eventually(lambda: stream.is_half_closed)
    may_write.set()
    assert await ending == grpc.StatusCode.OK
    assert wire.steps(0) == 300


async def test_a_stream_that_has_sent_all_ends_when_what_it_waits_for_is_anothers(
    replica, held_writes
) -> None:
    here, there = await replica(), await replica()
    (host,) = here.server.hosts.values()
    wire, other = here.wire(MODEL), there.wire(MODEL)
    epoch = (await wire.open(0, "s", writer=ME, attempt=1)).epoch
    may_write = held_writes(here)
    await wire.push(0, floats([1]), first=0)
    (stream,) = host._lanes._streams.values()
    ending = asyncio.ensure_future(wire.end())
    await eventually(lambda: stream.gated and stream.is_half_closed)
    await other.open(0, "s", mode=TAKEOVER, writer=HER, attempt=1, expected_epoch=epoch)
    await host._keeper._renew()
    assert await ending == grpc.StatusCode.OK
    assert wire.ended[0][0].reason == Closed.FENCED
    may_write.set()


async def test_a_stream_that_has_sent_all_ends_when_its_lane_goes_to_another_stream(
    replica, held_writes
) -> None:
    served = await replica()
    (host,) = served.server.hosts.values()
    wire, other = served.wire(MODEL), served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    may_write = held_writes(served)
    await wire.push(0, floats([1]), first=0)
    (stream,) = host._lanes._streams.values()
    ending = asyncio.ensure_future(wire.end())
    await eventually(lambda: stream.gated and stream.is_half_closed)
    await other.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=0)
    assert await ending == grpc.StatusCode.OK
    assert wire.ended[0][0].reason == Closed.FENCED
    may_write.set()
    assert (await other.rows(0, 1)) == 1


async def test_a_server_that_is_cut_off_calls_nothing_safe_that_is_not_stored(
    replica, held_writes, monkeypatch
) -> None:
    first = await replica(durability="periodic", drain_seconds_max=0.05)
    (host,) = first.server.hosts.values()
    wire = first.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    # It stops before what is queued is done, and before anything is written.
    monkeypatch.setattr(host._runs, "idle", asyncio.Event().wait)
    held_writes(first)
    await first.server.stop()
    first.is_stopped = True
    await wire.status()
    assert not wire.ended[0]
    wire = (await replica(durability="periodic")).wire(MODEL)
    opened = await wire.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=2)
    assert opened.applied == 0


async def test_strict_nothing_leaves_while_the_store_does_not_answer(replica, monkeypatch) -> None:
    served = await replica()
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    store = served.server.store
    write = store.write
    monkeypatch.setattr(store, "write", _fail)
    await wire.push(0, floats([1, 2]), first=0)
    await eventually(lambda: served.metric("sluice_store_failures_total", model=MODEL) >= 2)
    assert served.find(MODEL, "s").step == 2
    assert not wire.pieces[0]
    async with aiohttp.ClientSession() as session, session.get(f"{served.http}/readyz") as page:
        assert (page.status, "store" in await page.text()) == (200, True)
    monkeypatch.setattr(store, "write", write)
    assert (await wire.rows(0, 2)).ravel().tolist() == [1, 3]
    await eventually(lambda: served.metric("sluice_store_down_seconds", model=MODEL) == 0)


async def test_strict_a_lane_is_told_when_the_store_stays_away_and_loses_nothing(
    replica, monkeypatch
) -> None:
    monkeypatch.setattr("sluice_service.durability.checkpointer._PATIENCE_SECONDS", 0.0)
    served = await replica()
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    store = served.server.store
    write, claim = store.write, store.claim
    monkeypatch.setattr(store, "write", _fail)
    monkeypatch.setattr(store, "claim", _fail)
    await wire.push(0, floats([1, 2]), first=0)
    fault = await wire.next_fault(0)
    assert (fault.reason, fault.code) == (Fault.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE.value[0])
    refused = await wire.refused(1, "s", mode=RESUME, writer=ME, attempt=2, received=0)
    assert refused.reason == Fault.UNAVAILABLE
    monkeypatch.setattr(store, "write", write)
    monkeypatch.setattr(store, "claim", claim)
    await wire.open(2, "s", mode=RESUME, writer=ME, attempt=3, received=0)
    assert (await wire.rows(2, 2)).ravel().tolist() == [1, 3]


async def test_periodic_the_server_tells_how_far_inputs_may_be_forgotten(replica) -> None:
    served = await replica(durability="periodic", checkpoint_steps=2)
    wire = served.wire(MODEL)
    opened = await wire.open(0, "s", writer=ME, attempt=1)
    assert (opened.durability, opened.durable) == (PERIODIC, 0)
    await sums(wire, 0, 0, [1])
    await sums(wire, 0, 1, [2])
    await wire.until(lambda: any(response.durable for response in wire.responses))
    (durable,) = wire.responses[-1].durable
    assert (durable.lane, durable.step) == (0, 2)


async def test_periodic_a_checkpoint_is_made_in_time_however_few_steps_there_were(replica) -> None:
    served = await replica(durability="periodic", checkpoint_seconds=0.01)
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1])
    await wire.until(lambda: any(response.durable for response in wire.responses))


async def test_periodic_steps_after_the_checkpoint_are_replayed_with_the_same_bits(
    replica,
) -> None:
    first = await replica(durability="periodic", checkpoint_steps=2)
    wire = first.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    await wire.until(lambda: any(response.durable for response in wire.responses))
    assert await sums(wire, 0, 2, [3]) == [6]
    await crash(first)

    wire = (await replica(durability="periodic")).wire(MODEL)
    opened = await wire.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=3)
    assert (opened.applied, opened.durable) == (2, 2)
    assert await sums(wire, 0, 2, [3, 4]) == [6, 10]


async def test_periodic_a_sequence_waits_when_it_is_too_far_ahead_of_the_store(
    replica, monkeypatch
) -> None:
    served = await replica(durability="periodic", checkpoint_steps=1, undurable_steps_max=4)
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    store = served.server.store
    write = store.write
    monkeypatch.setattr(store, "write", _fail)
    await wire.push(0, floats(range(10)), first=0)
    assert len(await wire.rows(0, 4)) == 4
    assert served.find(MODEL, "s").step == 4
    assert served.metric("sluice_undurable_steps", model=MODEL) == 4
    monkeypatch.setattr(store, "write", write)
    assert (await wire.rows(0, 6)).ravel()[-1] == 45


async def test_off_nothing_is_asked_of_the_store(replica) -> None:
    served = await replica()
    wire = served.wire(MODEL)
    opened = await wire.open(0, "s", durability=OFF, writer=ME, attempt=1)
    assert (opened.durability, opened.durable) == (OFF, 0)
    assert await sums(wire, 0, 0, [1]) == [1]
    assert served.metric("sluice_checkpoints_total", model=MODEL) == 0
    await crash(served)
    wire = (await replica()).wire(MODEL)
    fault = await wire.refused(0, "s", mode=RESUME, writer=ME, attempt=2)
    assert fault.reason == Fault.NOT_FOUND


async def test_more_durability_than_the_server_gives_is_refused(replica) -> None:
    wire = (await replica(durability="periodic")).wire(MODEL)
    fault = await wire.refused(0, "s", durability=STRICT, writer=ME)
    assert fault.reason == Fault.INVALID_INPUT
    assert "--durability" in fault.message


# Opening where the sequence is in memory.


async def test_a_resume_on_the_same_server_goes_on_from_memory(replica) -> None:
    served = await replica(durability="periodic")
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    wire.cut()
    await served.parked(MODEL, "s")
    wire = served.wire(MODEL)
    opened = await wire.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=1)
    assert (opened.applied, opened.durable, opened.held_from) == (2, 0, 1)
    assert (await wire.rows(0, 1)).ravel().tolist() == [3]
    assert await sums(wire, 0, 2, [3]) == [6]


async def test_a_takeover_on_the_same_server_is_durable_before_it_is_told(replica) -> None:
    served = await replica(durability="periodic")
    mine, hers = served.wire(MODEL), served.wire(MODEL)
    await mine.open(0, "s", writer=ME, attempt=1)
    await sums(mine, 0, 0, [1, 2])
    fault = await hers.refused(0, "s", mode=TAKEOVER, writer=HER, attempt=1)
    assert fault.reason == Fault.CONFLICT
    opened = await hers.open(
        1, "s", mode=TAKEOVER, writer=HER, attempt=2, expected_epoch=fault.epoch
    )
    assert (opened.applied, opened.durable, opened.held_from) == (2, 2, 2)
    assert opened.epoch > fault.epoch
    assert await mine.next_closed(0) == Closed.FENCED
    assert await sums(hers, 1, 2, [3]) == [6]
    assert (await mine.refused(1, "s", mode=RESUME, writer=ME, attempt=2)).reason == Fault.FENCED


async def test_a_restart_begins_at_the_initial_state_in_the_store_too(replica) -> None:
    first = await replica()
    wire = first.wire(MODEL)
    opened = await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    await wire.open(1, "s", mode=RESTART, writer=HER, attempt=1, expected_epoch=opened.epoch)
    assert await wire.next_closed(0) == Closed.FENCED
    await crash(first)
    wire = (await replica()).wire(MODEL)
    opened = await wire.open(0, "s", mode=RESUME, writer=HER, attempt=2, received=0)
    assert opened.applied == 0
    assert await sums(wire, 0, 0, [5]) == [5]


async def test_two_opens_of_one_sequence_in_a_message_are_taken_one_after_the_other(
    replica,
) -> None:
    wire = (await replica()).wire(MODEL)
    await wire.send(
        open=[
            OpenSequence(lane=lane, sequence_id="s", writer=ME, attempt=lane, mode=START)
            for lane in range(3)
        ]
    )
    assert [(await wire.next_opened(lane)).lane for lane in range(3)] == [0, 1, 2]
    assert [await wire.next_closed(lane) for lane in range(2)] == [Closed.FENCED] * 2


# Another server.


async def test_a_server_that_lost_a_sequence_to_another_says_fenced(replica) -> None:
    here, there = await replica(), await replica()
    mine, hers = here.wire(MODEL), there.wire(MODEL)
    await mine.open(0, "s", writer=ME, attempt=1)
    await sums(mine, 0, 0, [1])
    opened = await hers.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=1)
    assert opened.applied == 1
    # The former owner runs the step, but nothing of it leaves.
    await mine.push(0, floats([100]), first=1)
    assert await mine.next_closed(0) == Closed.FENCED
    assert not mine.pieces[0]
    assert here.find(MODEL, "s") is None
    assert here.metric("sluice_sequences_fenced_total", model=MODEL) == 1
    assert await sums(hers, 0, 1, [2]) == [3]


async def test_a_sequence_that_comes_back_is_read_anew(replica) -> None:
    here, there = await replica(), await replica()
    mine, hers = here.wire(MODEL), there.wire(MODEL)
    await mine.open(0, "s", writer=ME, attempt=1)
    await sums(mine, 0, 0, [1])
    await hers.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=1)
    await sums(hers, 0, 1, [2])
    # What `here` has in memory is of step 1; the truth is at 2.
    opened = await mine.open(1, "s", mode=RESUME, writer=ME, attempt=3, received=2)
    assert opened.applied == 2
    assert await sums(mine, 1, 2, [3]) == [6]


async def test_a_sequence_moves_a_hundred_times_and_never_forks(replica) -> None:
    wires = [(await replica()).wire(MODEL) for _ in range(2)]
    total = 0.0
    await wires[0].open(0, "s", writer=ME, attempt=0)
    for step in range(100):
        wire = wires[step % 2]
        opened = await wire.open(
            step + 1, "s", mode=START_OR_RESUME, writer=ME, attempt=step + 1, received=step
        )
        assert opened.applied == step
        total += step
        assert await sums(wire, step + 1, step, [step]) == [total]


# Parting.


async def test_a_park_is_told_when_it_is_safe(replica) -> None:
    first = await replica(durability="periodic")
    wire = first.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    await wire.send(park=[0])
    assert await wire.next_closed(0) == Closed.PARKED
    await crash(first)
    wire = (await replica(durability="periodic")).wire(MODEL)
    opened = await wire.open(0, "s", mode=RESUME, writer=ME, attempt=2, received=2)
    assert opened.applied == 2


async def test_a_park_is_told_however_busy_the_store_is_with_others(replica, monkeypatch) -> None:
    served = await replica()
    write = served.server.store.write

    async def write_slowly(writes: Any) -> Any:
        await asyncio.sleep(0.02)
        return await write(writes)

    monkeypatch.setattr(served.server.store, "write", write_slowly)
    busy, wire = served.wire(MODEL), served.wire(MODEL)
    await busy.open(0, "busy")
    await wire.open(0, "s", writer=ME, attempt=1)

    async def push_on() -> None:
        for _ in itertools.count():
            await busy.push(0, floats([1] * 8))

    async def read_on() -> None:
        while await busy.read():
            pass

    load = asyncio.gather(push_on(), read_on())
    # By now there is always something that is not durable yet.
    await eventually(lambda: served.metric("sluice_checkpoints_total", model=MODEL) > 5)
    await wire.send(park=[0])
    assert await wire.next_closed(0) == Closed.PARKED
    assert not load.done()
    load.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await load


async def test_a_close_is_told_when_the_store_has_dropped_the_sequence(replica) -> None:
    first = await replica()
    wire = first.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1])
    await wire.send(close=[0])
    assert await wire.next_closed(0) == Closed.CLIENT
    await crash(first)
    wire = (await replica()).wire(MODEL)
    fault = await wire.refused(0, "s", mode=RESUME, writer=ME, attempt=2)
    assert fault.reason == Fault.SEQUENCE_CLOSED
    fault = await wire.refused(0, "s", mode=START, writer=HER, attempt=1)
    assert fault.reason == Fault.CONFLICT
    opened = await wire.open(0, "s", writer=HER, attempt=2, expected_epoch=fault.epoch)
    assert opened.applied == 0


async def test_a_close_that_the_store_did_not_hear_is_said_again(replica, monkeypatch) -> None:
    served = await replica()
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    store = served.server.store
    close = store.close
    monkeypatch.setattr(store, "close", _fail)
    await wire.send(close=[0])
    await eventually(lambda: served.metric("sluice_store_failures_total", model=MODEL) >= 2)
    assert not wire.ended[0]
    monkeypatch.setattr(store, "close", close)
    assert await wire.next_closed(0) == Closed.CLIENT
    assert served.find(MODEL, "s") is None


async def test_a_server_that_stops_leaves_every_sequence_to_the_next(replica, unhurried) -> None:
    first = await replica(durability="periodic")
    wire = first.wire(MODEL)
    for lane in range(5):
        await wire.open(lane, f"s{lane}", writer=ME, attempt=1)
        await sums(wire, lane, 0, [1, lane])
    await first.server.stop()
    first.is_stopped = True
    await wire.status()
    assert [wire.ended[lane][0].reason for lane in range(5)] == [Closed.DRAINING] * 5
    wire = (await replica(durability="periodic")).wire(MODEL)
    for lane in range(5):
        opened = await wire.open(lane, f"s{lane}", mode=RESUME, writer=ME, attempt=2, received=2)
        assert opened.applied == 2
        assert await sums(wire, lane, 2, [1]) == [lane + 2]


async def test_what_comes_when_a_server_has_begun_to_stop_is_not_applied(
    replica, held_writes, unhurried, monkeypatch
) -> None:
    first = await replica(durability="periodic")
    (host,) = first.server.hosts.values()
    wire = first.wire(MODEL)
    await wire.open(0, "s")  # without a writer: it counts what it has been answered
    await sums(wire, 0, 0, [1])
    may_write = held_writes(first)
    stopping = asyncio.ensure_future(first.server.stop())
    await eventually(lambda: host.is_draining)
    submit, has_come = host.submit_singles, asyncio.Event()

    def submit_and_tell(*arguments) -> None:
        submit(*arguments)
        has_come.set()

    monkeypatch.setattr(host, "submit_singles", submit_and_tell)
    # The reader stands at the next message already.
    await wire.push(0, floats([2]))
    await has_come.wait()
    may_write.set()
    assert await wire.next_closed(0) == Closed.DRAINING
    await stopping
    first.is_stopped = True
    assert wire.steps(0) == 0  # beside those it has taken
    wire = (await replica(durability="periodic")).wire(MODEL)
    assert (await wire.open(0, "s", mode=RESUME)).applied == 1
    assert await sums(wire, 0, 1, [2]) == [3]


async def test_a_server_that_stops_finishes_what_had_waited_for_its_store(
    replica, held_writes, unhurried
) -> None:
    settings = {"durability": "periodic", "undurable_steps_max": 64, "checkpoint_steps": 16}
    first = await replica(**settings)
    (host,) = first.server.hosts.values()
    wire = first.wire(MODEL)
    await wire.open(0, "s")
    may_write = held_writes(first)
    await wire.push(0, floats([1] * 300))
    await wire.until(lambda: wire.steps(0) == 64)
    stopping = asyncio.ensure_future(first.server.stop())
    await eventually(lambda: host.is_draining)
    may_write.set()
    assert await wire.next_closed(0) == Closed.DRAINING
    await stopping
    first.is_stopped = True
    assert wire.steps(0) == 300
    wire = (await replica(**settings)).wire(MODEL)
    assert (await wire.open(0, "s", mode=RESUME)).applied == 300


async def test_a_sequence_that_idles_ends_in_the_store_too(replica, hands) -> None:
    served = await replica(sequence_idle_seconds_max=10)
    host = served.server.hosts[MODEL]
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    hands.go(host._clock, 11)
    await host.expire()
    assert await wire.next_closed(0) == Closed.IDLE
    fault = await wire.refused(1, "s", mode=RESUME, writer=ME, attempt=2)
    assert (fault.reason, "no step for 10 seconds" in fault.message) == (
        Fault.SEQUENCE_CLOSED,
        True,
    )


async def test_close_sequence_ends_what_another_server_has(replica) -> None:
    here, there = await replica(), await replica()
    wire = here.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    assert await there.close(MODEL, "s") == 2
    await wire.push(0, floats([3]), first=2)
    assert await wire.next_closed(0) == Closed.FENCED
    fault = await wire.refused(1, "s", mode=RESUME, writer=ME, attempt=2)
    assert fault.reason == Fault.SEQUENCE_CLOSED


# A caller that cannot replay.


async def test_a_caller_without_a_writer_goes_on_from_a_strict_checkpoint(replica) -> None:
    first = await replica()
    wire = first.wire(MODEL)
    await wire.open(0, "s")
    await sums(wire, 0, 0, [1, 2])
    await crash(first)
    second = await replica()
    wire = second.wire(MODEL)
    opened = await wire.open(0, "s", mode=RESUME)
    assert opened.applied == 2
    assert await sums(wire, 0, 2, [3]) == [6]


async def test_a_caller_without_a_writer_goes_on_from_a_park_but_once(replica) -> None:
    first = await replica(durability="periodic")
    wire = first.wire(MODEL)
    await wire.open(0, "s")
    await sums(wire, 0, 0, [1, 2])
    await wire.send(park=[0])
    assert await wire.next_closed(0) == Closed.PARKED
    await crash(first)

    second = await replica(durability="periodic")
    wire = second.wire(MODEL)
    assert (await wire.open(0, "s", mode=RESUME)).applied == 2
    assert await sums(wire, 0, 2, [3]) == [6]
    await crash(second)

    wire = (await replica(durability="periodic")).wire(MODEL)
    fault = await wire.refused(0, "s", mode=RESUME)
    assert fault.reason == Fault.NOT_FOUND
    assert "after step 2" in fault.message


async def test_a_caller_without_a_writer_does_not_end_a_sequence_it_cannot_have(replica) -> None:
    here, there = await replica(durability="periodic"), await replica(durability="periodic")
    wire = here.wire(MODEL)
    await wire.open(0, "s")
    await sums(wire, 0, 0, [1, 2])
    fault = await there.wire(MODEL).refused(0, "s", mode=RESUME)
    assert (fault.reason, fault.expected_step) == (Fault.NOT_FOUND, 0)
    await wire.send(park=[0])
    assert await wire.next_closed(0) == Closed.PARKED
    assert here.find(MODEL, "s").step == 2


# State as a value.


@pytest.mark.parametrize("durability", ["off", "periodic", "strict"])
async def test_a_fork_goes_on_from_the_same_state(replica, durability) -> None:
    served = await replica(durability=durability)
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    request = ForkRequest(model=MODEL, sequence_id="s", fork_id="f", writer=HER)
    forked = await served.sequences.Fork(request)
    assert (forked.fork_id, forked.step) == ("f", 2)
    opened = await wire.open(1, "f", writer=HER, attempt=1)
    assert opened.applied == 2
    assert await sums(wire, 0, 2, [10]) == [13]
    assert await sums(wire, 1, 2, [20]) == [23]


async def test_a_fork_that_is_to_be_more_durable_than_the_server_is_refused(sums_only) -> None:
    wire = sums_only.wire(MODEL)
    await wire.open(0, "s")
    for durability in (STRICT, 99):
        request = ForkRequest(model=MODEL, sequence_id="s", fork_id="f", durability=durability)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await sums_only.sequences.Fork(request)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sums_only.find(MODEL, "f") is None


async def test_a_fork_to_an_id_that_lives_is_refused(replica) -> None:
    served = await replica()
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await wire.open(1, "f", writer=HER, attempt=1)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served.sequences.Fork(ForkRequest(model=MODEL, sequence_id="s", fork_id="f"))
    assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_the_state_of_a_sequence_elsewhere_is_its_last_durable_one(replica) -> None:
    here, there = await replica(), await replica()
    wire = here.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    mine, hers = await here.state(MODEL, "s"), await there.state(MODEL, "s")
    assert (hers.step, hers.row) == (mine.step, mine.row) == (2, np.float32(3).tobytes())


async def test_a_list_has_what_lives_here_and_what_only_the_store_knows(replica) -> None:
    here, there = await replica(), await replica()
    wire = here.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    await there.wire(MODEL).open(0, "t", writer=ME, attempt=1)
    listed = await there.list(MODEL)
    assert {name: (info.step, info.is_elsewhere) for name, info in listed.items()} == {
        "s": (2, True),
        "t": (0, False),
    }


async def test_a_start_from_a_state_is_durable_at_once(replica) -> None:
    first = await replica(durability="periodic")
    wire = first.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1, 2])
    state = await first.state(MODEL, "s")
    opened = await wire.open(1, "t", writer=HER, attempt=1, state=state)
    assert (opened.applied, opened.durable) == (2, 2)
    await crash(first)
    wire = (await replica(durability="periodic")).wire(MODEL)
    await wire.open(0, "t", mode=RESUME, writer=HER, attempt=2, received=2)
    assert await sums(wire, 0, 2, [3]) == [6]


# Records that cannot be used.


async def test_a_record_that_fails_its_checksum_is_refused(replica, tmp_path) -> None:
    first = await replica()
    wire = first.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await sums(wire, 0, 0, [1])
    await crash(first)
    with sqlite3.connect(tmp_path / "sequences.db") as database:
        (table, column) = _checkpoint_column(database)
        ((data,),) = database.execute(f"SELECT {column} FROM {table}").fetchall()
        spoilt = data[:-1] + bytes([data[-1] ^ 1])
        database.execute(f"UPDATE {table} SET {column} = ?", (spoilt,))
    wire = (await replica()).wire(MODEL)
    fault = await wire.refused(0, "s", mode=RESUME, writer=ME, attempt=2, received=1)
    assert fault.reason == Fault.DATA_LOSS
    assert "checksum" in fault.message


async def test_a_record_of_another_model_is_refused(replica, serve, lstm_file, tmp_path) -> None:
    first = await replica()
    wire = first.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await crash(first)
    store = f"sqlite:///{tmp_path}/sequences.db"
    other = await serve({MODEL: lstm_file.path}, store=store, durability="strict")
    fault = await other.wire(MODEL).refused(0, "s", mode=RESUME, writer=ME, attempt=2)
    assert fault.reason == Fault.WRONG_MODEL


def _checkpoint_column(database: sqlite3.Connection) -> tuple[str, str]:
    """Where the file keeps the bytes of checkpoints."""
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
        for _, name, *_ in database.execute(f"PRAGMA table_info({table})"):
            row = database.execute(f"SELECT {name} FROM {table} LIMIT 1").fetchone()
            if row and isinstance(row[0], bytes) and row[0].startswith(b"sluice\0"):
                return table, name
    raise AssertionError("the file has no checkpoint")


async def _fail(*_: Any) -> Any:
    await asyncio.sleep(0)
    raise StoreError("the disk is away")
