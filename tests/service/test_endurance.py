"""What has ended is gone: no object of it is left, however often everything has lived and died."""

import gc
from collections import Counter
from collections.abc import Iterator

import pytest
from grpc import StatusCode

from sluice_protos.sequences_pb2 import RESUME, Closed, OpenSequence, Tensor
from sluice_service.batching.queues import Frame
from sluice_service.rpc.native.session import Session
from sluice_service.sequences.events import Outputs
from sluice_service.sequences.lifecycle import Held, Sequence
from sluice_service.sequences.stream import Stream
from sluice_service.serving.attachments import Departure
from sluice_service.store.claims import Record
from tests.service.wire import Served, eventually, floats

MODEL = "accumulator"
KINDS = (Sequence, Record, Held, Departure, Outputs, Frame, Stream, Session)
ROUNDS = 10


def _count(kinds: tuple[type, ...] = KINDS) -> Counter[str]:
    return Counter(type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds))


def _count_collected() -> Counter[str]:
    gc.collect()
    return _count()


async def _live(served: Served, name: str) -> None:
    """Close, park and come back, be closed from outside, break off, send nonsense, fall asleep."""
    wire, broken, gone = (served.wire(MODEL) for _ in range(3))
    mine = {"writer": name.encode()}
    for lane in range(4):
        await wire.open(lane, f"{name}-{lane}", attempt=1, **mine)
        await wire.push(lane, floats([1] * 100))
        await wire.rows(lane, 100)
    await wire.send(close=[0], park=[1])
    assert await wire.next_closed(0) == Closed.CLIENT
    assert await wire.next_closed(1) == Closed.PARKED
    await wire.open(1, f"{name}-1", mode=RESUME, attempt=2, received=0, **mine)
    await wire.rows(1, 100)
    await served.close(MODEL, f"{name}-2")
    assert await wire.next_closed(2) == Closed.CLIENT
    await wire.send(lane=[3], inputs=[Tensor(data=b"nonsense!")])
    await wire.next_fault(3)

    await broken.open(0, f"{name}-broken", **mine)
    await broken.push(0, floats([1] * 10_000))
    await broken.read()
    broken.cut()
    await gone.send(open=[OpenSequence(lane=0)])
    assert await gone.end() == StatusCode.OK
    bad = served.wire("nobody")
    await bad.send()
    assert await bad.status() == StatusCode.NOT_FOUND
    # What is left on this stream falls asleep there, what was on the others in the dark.
    await eventually(lambda: served.metric("sluice_streams_open", model=MODEL) == 1)
    await served.expire()
    assert await wire.next_closed(1) == Closed.IDLE
    assert await wire.next_closed(3) == Closed.IDLE
    await wire.end()


async def test_what_has_ended_leaves_nothing_behind(sums, hands) -> None:
    served = await sums(sequence_idle_seconds_max=60, tombstone_seconds=100)
    (host,) = served.server.hosts.values()

    async def expire() -> None:
        hands.go(host, 61)
        await host.expire()

    served.expire = expire
    await _live(served, "warm")
    hands.go(host, 101)
    await host.expire()
    await eventually(lambda: not len(host._streams))
    before = _count_collected()
    for number in range(ROUNDS):
        await _live(served, f"round{number}")
    # What runs does not expire, though its stream has ended.
    await eventually(lambda: host._runs.is_idle)
    hands.go(host, 101)
    await host.expire()
    assert not host._table.states.live
    assert not host._scheduler._queues.frames
    assert not host._streams._ending
    # A task that has ended may hold something for one more turn.
    await eventually(lambda: _count_collected() <= before)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_a_stream_that_has_ended_leaves_nothing_to_the_collector(sums, no_collector) -> None:
    served = await sums()
    kinds = (Outputs, Frame, Stream, Session)
    before = _count(kinds)
    for is_cut in (False, True):
        wire = served.wire(MODEL)
        await wire.open(0, writer=b"mine")
        await wire.push(0, floats([1, 2, 3]))
        await wire.rows(0, 3)
        await wire.send(lane=[0], inputs=[Tensor(data=b"nonsense!")])
        await wire.next_fault(0)
        await wire.push(0, floats([4]), first=3)
        await wire.rows(0, 1)
        if is_cut:
            wire.cut()
        else:
            await wire.end()
    await eventually(lambda: not served.metric("sluice_streams_open", model=MODEL))
    await eventually(lambda: _count(kinds) <= before)
