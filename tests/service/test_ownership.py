"""What the store is asked about ownership, and what it must not be told for nothing."""

import asyncio

import grpc
import pytest

from sluice_protos.sequences_pb2 import (
    OFF,
    PERIODIC,
    RESTART,
    RESUME,
    Closed,
    Fault,
    ForkRequest,
    OpenSequence,
)
from tests.service.hands import Away, Late
from tests.service.wire import SECONDS, eventually, floats

MODEL = "accumulator"
ME, HER = b"me", b"her"


async def test_an_open_beyond_the_limit_leaves_nothing_in_the_store(kept) -> None:
    here, there = await kept(sequences_max=2), await kept()
    wire = here.wire(MODEL)
    await wire.send(
        open=[
            OpenSequence(lane=lane, sequence_id=f"s{lane}", writer=ME, attempt=1)
            for lane in range(4)
        ]
    )
    await wire.until(lambda: len(wire.opened) == len(wire.faults) == 2)
    assert {wire.faults[lane][0].reason for lane in (2, 3)} == {Fault.LIMIT}
    other = there.wire(MODEL)
    for lane in (2, 3):
        await other.open(lane, f"s{lane}", writer=HER, attempt=1)


async def test_a_resume_beyond_the_limit_takes_nothing_from_the_server_that_has_it(kept) -> None:
    here, there = await kept(sequences_max=1), await kept()
    wire = there.wire(MODEL)
    for lane in range(3):
        await wire.open(lane, f"s{lane}", writer=ME, attempt=1)
    await here.wire(MODEL).send(
        open=[
            OpenSequence(lane=lane, sequence_id=f"s{lane}", mode=RESUME, writer=ME, attempt=2)
            for lane in range(3)
        ]
    )
    await eventually(lambda: here.find(MODEL, "s0"))
    host = there.server.hosts[MODEL]
    await host._durable.checkpointer.flush()
    assert {name: there.find(MODEL, name) is not None for name in ("s0", "s1", "s2")} == {
        "s0": False,
        "s1": True,
        "s2": True,
    }


async def test_close_sequence_ends_what_another_server_has_taken_unnoticed(kept) -> None:
    here, there = await kept(), await kept()
    old, new = here.wire(MODEL), there.wire(MODEL)
    await old.open(0, "s", writer=ME, attempt=1)
    await new.open(0, "s", mode=RESUME, writer=ME, attempt=2)
    await here.close(MODEL, "s")
    fault = await new.refused(1, "s", mode=RESUME, writer=ME, attempt=3)
    assert fault.reason == Fault.SEQUENCE_CLOSED


async def test_a_sequence_that_is_closed_again_and_again_ends_once(kept, monkeypatch) -> None:
    served = await kept()
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    store = Away(served, monkeypatch, "close")
    for _ in range(5):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.close(MODEL, "s")
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    store.come_back()
    assert await wire.next_closed(0) == Closed.CLIENT
    await wire.settle()
    closed = {"model": MODEL, "reason": "client"}
    # The other one is what `settle` has opened and closed.
    assert served.metric("sluice_sequences_closed_total", **closed) == 2


async def test_a_fork_whose_caller_went_away_is_brought_to_its_end(kept, monkeypatch) -> None:
    served = await kept()
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    claims = Late(served, "claim", monkeypatch)
    request = ForkRequest(model=MODEL, sequence_id="s", fork_id="copy", writer=ME)
    call = served.sequences.Fork(request)
    await eventually(lambda: claims.done == 1)
    call.cancel()
    # The server has heard of it once it has answered another call.
    await served.list(MODEL)
    claims.answer()
    await eventually(lambda: served.find(MODEL, "copy"))
    await served.close(MODEL, "copy")


async def test_an_unloaded_model_waits_for_its_store_and_nobody_waits_for_it(
    kept, monkeypatch
) -> None:
    served = await kept()
    hosts = served.server.hosts
    host = hosts[MODEL]
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    store = Away(served, monkeypatch, "close")
    await wire.send(close=[0])
    await eventually(lambda: host.store_down_seconds > 0)
    # It is another server's now, but the store has not heard of its end here.
    host._attachments.lose(host._table.get("s"))
    async with asyncio.timeout(SECONDS):
        await hosts.unload(MODEL)
    assert MODEL in hosts
    store.come_back()
    await wire.next_closed(0)
    await hosts.sweep()
    assert MODEL not in hosts


async def test_a_model_that_is_loaded_while_its_unloading_ends_is_served_whole(
    kept, monkeypatch
) -> None:
    served = await kept()
    hosts = served.server.hosts
    host, version = hosts[MODEL], hosts[MODEL].version
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    writes = Late(served, "write", monkeypatch)
    await wire.send(park=[0])
    await eventually(lambda: writes.done == 1)
    # It turns out to be another server's while its checkpoint is under way.
    host._attachments.lose(host._table.get("s"))
    unloading = asyncio.ensure_future(hosts.unload(MODEL))
    await eventually(lambda: MODEL not in hosts)
    await hosts.adopt(MODEL, version)
    await hosts.sweep()
    writes.answer()
    await unloading
    await served.wire(MODEL).open(0, "t", writer=ME, attempt=1)
    assert served.metric("sluice_sequences_live", model=MODEL) == 1
    assert set(hosts._threads) == {MODEL}


async def test_a_start_that_a_stop_has_overtaken_leaves_its_id_to_the_next_server(
    kept, monkeypatch
) -> None:
    here, there = await kept(), await kept()
    wire = here.wire(MODEL)
    claims = Late(here, "claim", monkeypatch)
    # Without a writer it cannot say that it is the same one who asks again.
    await wire.send(open=[OpenSequence(lane=0, sequence_id="s")])
    await eventually(lambda: claims.done == 1)
    host = here.server.hosts[MODEL]
    await host.drain()
    claims.answer()
    await host._durable.ownership.answered(["s"])
    assert here.find(MODEL, "s") is None
    opened = await there.wire(MODEL).open(0, "s")
    assert opened.applied == 0


async def test_a_place_that_is_promised_is_taken_until_the_store_has_answered(
    kept, monkeypatch
) -> None:
    served = await kept(sequences_max=1)
    (host,) = served.server.hosts.values()
    free = list[int]()
    host.watch_room(lambda: free.append(host.room))
    claims = Late(served, "claim", monkeypatch)
    wire = served.wire(MODEL)
    await wire.open(0, "live", durability=OFF)
    await wire.send(close=[0])
    await wire.next_closed(0)
    await wire.send(open=[OpenSequence(lane=1, sequence_id="s", writer=ME, attempt=1)])
    await eventually(lambda: claims.done)
    assert host.room == 0
    claims.answer()
    await wire.next_opened(1)
    assert host.room == 0
    # Where the store does not answer, whoever waits for a place is told that it is free.
    await wire.send(close=[1])
    await wire.next_closed(1)
    free.clear()
    Away(served, monkeypatch, "claim")
    await wire.send(open=[OpenSequence(lane=2, sequence_id="t", writer=ME, attempt=1)])
    assert (await wire.next_fault(2)).reason == Fault.UNAVAILABLE
    await eventually(lambda: free == [1])


async def test_an_open_does_not_take_what_became_durable_while_the_store_was_asked_about_others(
    kept, monkeypatch
) -> None:
    served = await kept()
    store, may_answer, names = served.server.store, asyncio.Event(), list[str]()
    claim = store.claim

    async def answer_the_first_late(claims):
        is_first = not names
        names.extend(one.key.sequence_id for one in claims)
        answers = await claim(claims)
        if is_first:
            await may_answer.wait()
        return answers

    monkeypatch.setattr(store, "claim", answer_the_first_late)
    wire, other = served.wire(MODEL), served.wire(MODEL)
    await wire.open(0, "s", durability=OFF)
    await other.send(
        open=[
            OpenSequence(lane=0, sequence_id="another"),
            OpenSequence(lane=1, sequence_id="s", mode=RESUME),
        ]
    )
    await eventually(lambda: names == ["another"])
    await wire.send(close=[0])
    await wire.next_closed(0)
    await wire.open(1, "s", mode=RESTART, durability=PERIODIC)
    may_answer.set()
    await other.next_opened(0)
    assert (await other.next_fault(1)).reason == Fault.UNAVAILABLE
    await wire.push(1, floats([5]))
    assert (await wire.rows(1, 1)) == 5
