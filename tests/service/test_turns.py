"""Long work takes turns with others, and what others do in between disturbs neither."""

import asyncio
import itertools

import pytest

from sluice_protos.sequences_pb2 import RESUME, OpenSequence, Tensor
from sluice_service.runtime.cooperative import take_turns
from tests.service.wire import eventually, floats

MODEL = "accumulator"
MINE = {"writer": b"mine"}


@pytest.fixture
def short_turns(monkeypatch) -> None:
    """Each turn does the least there is to do."""
    monkeypatch.setattr("sluice_service.runtime.cooperative._TURN_SECONDS", -1.0)


class Rests:
    """Rests that end at once, until the test has them last."""

    def __init__(self) -> None:
        self._is_over = asyncio.Event()
        self._is_over.set()
        self._waiting = 0

    async def __call__(self) -> None:
        self._waiting += 1
        await self._is_over.wait()
        self._waiting -= 1

    def begin(self) -> None:
        """All long work stands still after its next turn."""
        self._is_over.clear()

    async def reached(self) -> None:
        await eventually(lambda: self._waiting)

    def end(self) -> None:
        self._is_over.set()


@pytest.fixture
def rests(monkeypatch, short_turns) -> Rests:
    """In the test's hands, with turns that do the least there is to do."""
    rests = Rests()
    monkeypatch.setattr("sluice_service.runtime.cooperative.rest", rests)
    monkeypatch.setattr("sluice_service.models.host.rest", rests)
    monkeypatch.setattr("sluice_service.models.expiry.rest", rests)
    return rests


async def test_short_work_is_one_turn(monkeypatch) -> None:
    monkeypatch.setattr("sluice_service.runtime.cooperative._TURN_SECONDS", 1e6)
    done, turns = list[int](), list[int]()

    async def instant(turn):
        turns.append(len(done))
        return turn()

    await take_turns(map(done.append, range(5)), instant=instant)
    assert (done, turns) == ([0, 1, 2, 3, 4], [0])


async def test_between_two_turns_others_have_theirs(short_turns) -> None:
    log = list[str]()

    async def go_on() -> None:
        while True:
            log.append("other")
            await asyncio.sleep(0)

    other = asyncio.ensure_future(go_on())
    await take_turns(map(log.append, ("first", "second", "third")))
    other.cancel()
    places = [log.index(item) for item in ("first", "second", "third")]
    for before, after in itertools.pairwise(places):
        assert "other" in log[before:after]


async def test_the_lanes_of_a_stream_that_ended_are_parked_in_turns_and_lose_nothing(
    sums, rests
) -> None:
    served = await sums()
    (host,) = served.server.hosts.values()
    wire, again = served.wire(MODEL), served.wire(MODEL)
    names = [f"s{lane}" for lane in range(4)]
    for lane, name in enumerate(names):
        await wire.open(lane, name, attempt=1, **MINE)
        for value in (1, 2, 3):
            await wire.push(lane, floats([value]))
        await wire.until(lambda lane=lane: wire.steps(lane) == 3)
    rests.begin()
    wire.cut()
    await rests.reached()
    # Half of them are taken by another stream while the server has hardly begun to park them.
    taken = [
        OpenSequence(lane=lane, sequence_id=name, mode=RESUME, attempt=2, received=0, **MINE)
        for lane, name in enumerate(names[:2])
    ]
    await again.send(open=taken[:1])
    await again.next_opened(0)
    rests.end()
    await again.send(open=taken[1:])
    await again.next_opened(1)
    await eventually(lambda: not host._streams._ending)
    assert [served.find(MODEL, name).is_parked for name in names] == [False, False, True, True]
    for lane, name in enumerate(names[2:], 2):
        await again.open(lane, name, mode=RESUME, attempt=2, received=0, **MINE)
    await again.settle()
    for lane in range(4):
        assert [first for first, *_ in again.pieces[lane]] == [0, 1, 2]
        assert (await again.rows(lane, 3)).ravel().tolist() == [1, 3, 6]
        await again.push(lane, floats([4]))
        assert (await again.rows(lane, 1)) == 10


async def test_a_run_that_lands_while_lanes_are_parked_is_held_behind_what_came_before(
    sums, gate, rests
) -> None:
    served = await sums()
    wire, again = served.wire(MODEL), served.wire(MODEL)
    await wire.open(0, "a", attempt=1, **MINE)
    await wire.open(1, "b", attempt=1, **MINE)
    for value in (1, 2):
        for lane in (0, 1):
            await wire.push(lane, floats([value]))
            await gate.let_through()
            await wire.until(lambda lane=lane, value=value: wire.steps(lane) == value)
    await wire.push(0, floats([3]))
    await gate.reached()
    rests.begin()
    wire.cut()
    await rests.reached()
    await gate.let_through()
    await eventually(lambda: served.find(MODEL, "a").step == 3)
    rests.end()
    await served.parked(MODEL, "a", "b")
    for lane, name in enumerate("ab"):
        await again.open(lane, name, mode=RESUME, attempt=2, received=0, **MINE)
    await again.settle()
    assert (await again.rows(0, 3)).ravel().tolist() == [1, 3, 6]
    assert (await again.rows(1, 2)).ravel().tolist() == [1, 3]
    assert not again.pieces[0] and not again.pieces[1]


async def test_a_run_that_lands_when_its_lane_is_parked_already_is_held_for_the_next_one(
    sums, gate, rests
) -> None:
    served = await sums()
    wire, again = served.wire(MODEL), served.wire(MODEL)
    for lane, name in enumerate("abc"):
        await wire.open(lane, name, attempt=1, **MINE)
    await wire.send(lane=[0, 1, 2], inputs=[Tensor(data=floats([1, 2, 3]).tobytes())])
    await gate.reached()
    rests.begin()
    wire.cut()
    await rests.reached()
    # The last is parked, the others are not; it is asked for before its run has landed.
    assert [served.find(MODEL, name).is_parked for name in "abc"] == [False, False, True]
    await again.send(
        open=[OpenSequence(lane=0, sequence_id="c", mode=RESUME, attempt=2, received=0, **MINE)]
    )
    (host,) = served.server.hosts.values()
    await eventually(lambda: host._runs._waiting)
    await gate.let_through()
    assert (await again.next_opened(0)).applied == 1
    assert (await again.rows(0, 1)) == 3
    rests.end()
    await served.parked(MODEL, "a", "b")


async def test_opens_of_a_stream_that_ends_meanwhile_leave_nothing_attached(sums, rests) -> None:
    served = await sums()
    wire = served.wire(MODEL)
    opens = [OpenSequence(lane=lane, sequence_id=f"s{lane}", **MINE) for lane in range(4)]
    rests.begin()
    await wire.send(open=opens)
    await rests.reached()
    other = served.wire(MODEL)
    await other.send(lane=[3], inputs=[])  # the event loop is free: an unknown lane is told
    await other.next_fault(3)
    wire.cut()
    rests.end()
    await eventually(lambda: served.metric("sluice_streams_open", model=MODEL) == 1)
    await served.parked(MODEL, *await served.list(MODEL))
    assert served.find(MODEL, "s0") is not None


async def test_who_goes_on_while_others_expire_lives_on(sums, hands, rests) -> None:
    served = await sums(sequence_idle_seconds_max=60)
    (host,) = served.server.hosts.values()
    wire = served.wire(MODEL)
    for lane in range(4):
        await wire.open(lane, f"s{lane}", **MINE)
    rests.begin()
    hands.go(host, 61)
    expiry = asyncio.ensure_future(host.expire())
    await rests.reached()
    await wire.push(3, floats([1]))
    assert (await wire.rows(3, 1)) == 1
    rests.end()
    await expiry
    assert set(await served.list(MODEL)) == {"s3"}
