"""What the store is asked about ownership, and what it must not be told for nothing."""

import grpc
import pytest

from sluice_protos.sequences_pb2 import RESUME, Closed, Fault, OpenSequence
from tests.service.hands import Away
from tests.service.wire import eventually

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
    host = there.server._hosts[MODEL]
    await host._keeper.flush()
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
