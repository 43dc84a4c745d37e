"""What the checkpointer does when a store answers late, or not, or to others."""

import asyncio

import numpy as np
import pytest

from sluice_protos.sequences_pb2 import (
    OFF,
    PERIODIC,
    RESUME,
    STRICT,
    Closed,
    OpenSequence,
)
from sluice_service.models.host import Host
from sluice_service.sequences.table import SequenceTable
from sluice_service.store import Key
from tests.service.hands import Away, Late
from tests.service.wire import Served, eventually, floats

MODEL = "accumulator"
ME = b"me"


def host_of(served: Served) -> Host:
    return served.server.hosts[MODEL]


async def failures(served: Served, count: int) -> None:
    """Wait until the store has not answered so often."""
    await eventually(lambda: served.metric("sluice_store_failures_total", model=MODEL) >= count)


async def test_a_store_that_is_away_is_asked_again_until_it_answers(kept, monkeypatch) -> None:
    served = await kept(checkpoint_seconds=0.5)
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    store = Away(served, monkeypatch, "write")
    await wire.push(0, floats([1]), first=0)
    await failures(served, 1)
    checkpointer = host_of(served)._durable.checkpointer
    since = checkpointer._down_since
    assert since is not None
    # It never counts as back only because there was nothing to ask it for a while.
    await failures(served, 5)
    assert checkpointer._down_since == since
    store.come_back()
    await eventually(lambda: served.metric("sluice_store_down_seconds", model=MODEL) == 0)


async def test_strict_sequences_leave_room_for_the_checkpoints_of_others(kept) -> None:
    served = await kept(durability="strict")
    strict, periodic = 300, 100
    wire = served.wire(MODEL)
    count = strict + periodic
    await wire.send(
        open=[
            OpenSequence(lane=lane, durability=STRICT if lane % 4 else PERIODIC)
            for lane in range(count)
        ]
    )
    await wire.until(lambda: len(wire.opened) == count)
    host = host_of(served)
    table, pending = host._table, host._durable.pending
    written = np.zeros(len(table.step), np.int64)
    for _ in range(12):
        # Whoever was written has gone on by the next time.
        alive = np.flatnonzero(table.is_alive)
        _go_on(table, alive, table.durable[alive] + host._settings.checkpoint_steps)
        chosen = pending.choose()
        assert len(chosen) == 256
        assert len(np.unique(chosen)) == len(chosen)
        written[chosen] += 1
    _go_on(table, alive, table.durable[alive])
    assert written[alive].min() >= 6


def _go_on(table: SequenceTable, slots: np.ndarray, steps: np.ndarray) -> None:
    """Let sequences stand at `steps` [n]."""
    table.apply(slots, steps, table.states.take(slots), None)


async def test_a_slot_that_changed_hands_is_not_written_for_its_last_owner(
    kept, monkeypatch
) -> None:
    served = await kept()
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    host = host_of(served)
    slot = host._table.get("s").slot
    writes = Late(served, "write", monkeypatch)
    await wire.send(park=[0])
    await eventually(lambda: writes.done == 1)
    # Meanwhile it has turned out to live elsewhere, and one that is in no store has its slot.
    host._attachments.lose(host._table.get("s"))
    wire = served.wire(MODEL)
    await wire.open(0, "off", durability=OFF)
    assert host._table.get("off").slot == slot
    wire.cut()
    await served.parked(MODEL, "off")
    writes.answer()
    # Else it would be written for ever, for there is nothing to write.
    await eventually(lambda: host._durable.pending.is_safe(slot))


async def test_a_write_that_an_open_here_has_overtaken_loses_nothing(kept, monkeypatch) -> None:
    served = await kept(checkpoint_steps=1)
    old, new = served.wire(MODEL), served.wire(MODEL)
    await old.open(0, "s", writer=ME, attempt=1)
    await old.push(0, floats([1]), first=0)
    await old.rows(0, 1)
    host = host_of(served)
    await eventually(lambda: host._durable.checkpointer.undurable_steps == 0)
    claims = Late(served, "claim", monkeypatch)
    again = OpenSequence(lane=0, sequence_id="s", mode=RESUME, writer=ME, attempt=2, received=1)
    await new.send(open=[again])
    await eventually(lambda: claims.done == 1)
    # The store has given the sequence to the new lane; here it is still on the old one.
    writes = Late(served, "write", monkeypatch)
    writes.answer()
    await old.push(0, floats([2]), first=1)
    await old.rows(0, 1)
    await eventually(lambda: writes.done == 1)
    for _ in range(20):
        await asyncio.sleep(0)
    claims.answer()
    assert (await new.next_opened(0)).applied == 2
    assert served.metric("sluice_sequences_fenced_total", model=MODEL) == 0
    await eventually(lambda: host._durable.checkpointer.undurable_steps == 0)


async def test_a_stop_waits_for_what_was_applied_while_the_last_write_was_under_way(
    kept, monkeypatch
) -> None:
    served = await kept(durability="strict")
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    writes = Late(served, "write", monkeypatch)
    await wire.push(0, floats([1]), first=0)
    await eventually(lambda: writes.done == 1)
    await wire.push(0, floats([2]), first=1)
    await eventually(lambda: served.find(MODEL, "s").step == 2)
    host = host_of(served)
    drained = asyncio.ensure_future(host.drain())
    await eventually(lambda: not host._durable.pending.is_safe(host._table.get("s").slot))
    writes.answer()
    await drained
    stored = await served.server.store.read(Key(MODEL, "s"))
    assert stored.checkpoint.step == 2
    assert await wire.next_closed(0) == Closed.DRAINING
    assert (await wire.rows(0, 2)).ravel().tolist() == [1, 3]


@pytest.mark.parametrize("method", ["write", "read"])
async def test_a_sequence_that_waits_for_the_store_does_not_idle(
    kept, hands, monkeypatch, method
) -> None:
    served = await kept(checkpoint_steps=1, undurable_steps_max=2, sequence_idle_seconds_max=10)
    wire = served.wire(MODEL)
    await wire.open(0, "s", writer=ME, attempt=1)
    await wire.open(1, "off", durability=OFF)
    # Away for writes alone, it is known to be away; otherwise nobody has had to ask it yet.
    store = Away(served, monkeypatch, method)
    if method == "write":
        await wire.push(0, floats([1, 1, 1]), first=0)
        await failures(served, 1)
    host = host_of(served)
    hands.go(host, 11)
    await host.expire()
    assert await wire.next_closed(1) == Closed.IDLE
    store.come_back()
    await eventually(lambda: host.store_down_seconds == 0)
    # Whatever was to be closed is closed before another sequence is opened.
    await wire.settle()
    assert served.find(MODEL, "s") is not None
    if method == "write":
        await wire.rows(0, 3)
    # What it has waited does not count later on either.
    await host.expire()
    assert served.find(MODEL, "s") is not None
    hands.go(host, 11)
    await host.expire()
    assert await wire.next_closed(0) == Closed.IDLE
