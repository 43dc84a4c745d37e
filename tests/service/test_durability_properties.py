"""Two servers, one store, writers that follow the rules: every output once, whatever happens.

A hypothesis state machine without sockets. Servers crash, calls to the store are
held, fail before or after they had their effect, streams break, sequences change
servers and writers; and every output that a writer takes is the running sum of the
inputs of all steps, in order, each once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sluice_service.batching.queues import Kind
from sluice_service.batching.versions import ONLY, load_version
from sluice_service.errors import ConflictError, FencedError, StoreDownError
from sluice_service.metrics import Metrics
from sluice_service.models.host import Host
from sluice_service.sequences.events import Durable, Ended, Failed, Opened, Outputs
from sluice_service.sequences.stream import Stream
from sluice_service.settings import Settings
from sluice_service.store import StoreError
from sluice_service.store.claims import OpenMode, OpenRequest
from tests.service.store.memory import MemoryStore

MODEL = "accumulator"
WRITERS = 2
SERVERS = 2
CHUNK_MAX = 4
# How many turns of the event loop let everything happen that can.
TURNS = 60


def value(step: int) -> float:
    """The input of a step: whoever writes it, it is the same."""
    return float(step % 7 + 1)


def total(step: int) -> float:
    """The output of a step: the sum of all inputs up to it."""
    return sum(map(value, range(step + 1)))


class Weather:
    """What befalls every call to the store, whichever server makes it."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.breaks: list[bool] = []  # of the calls to come: True breaks it afterwards


class Strait:
    """A server's way to the store: it can be held, break before or after a call, or be no more."""

    def __init__(self, store: MemoryStore, weather: Weather) -> None:
        self._store = store
        self._weather = weather
        self.is_dead = False

    def __getattr__(self, name: str) -> Any:
        call: Callable[..., Awaitable[Any]] = getattr(self._store, name)

        async def pass_through(*arguments: Any) -> Any:
            await self._weather.is_open.wait()
            if self.is_dead:
                await asyncio.Event().wait()  # whoever asked is dead
            happens = self._weather.breaks.pop(0) if self._weather.breaks else None
            if happens is False:
                raise StoreError("broken before it happened")
            answer = await call(*arguments)
            if happens is True:
                raise StoreError("broken after it happened")
            return answer

        return pass_through


class Writer:
    """A client that keeps the rules: what it has sent, what has arrived, what it may forget."""

    def __init__(self, number: int) -> None:
        self.name = f"writer {number}".encode()
        self.attempt = 0
        self.received = 0
        self.durable = 0  # the least that no server may ever fall below
        self.is_started = False
        self.expected_epoch = 0
        self.host: Host | None = None
        self.stream: Stream | None = None
        self.lane = 0
        self.sent = -1  # -1: not attached
        self.is_strict = False

    def leave(self) -> None:
        """Process nothing of an abandoned stream."""
        self.stream = self.host = None
        self.sent = -1


class Durability(RuleBasedStateMachine):
    """What may happen to one sequence."""

    path: Path

    @initialize(durability=st.sampled_from(["periodic", "strict"]), every=st.integers(1, 5))
    def start(self, durability: str, every: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.executor = ThreadPoolExecutor(1)
        self.stored = MemoryStore(tombstone_seconds=1e6, record_seconds=1e6)
        self.weather = Weather()
        self.straits: list[Strait] = []
        self.settings = Settings(
            model={MODEL: "unused"},
            durability=durability,
            checkpoint_steps=every,
            checkpoint_seconds=1e6,
            sequences_max=8,
            unacknowledged_steps_max=6,
            undurable_steps_max=12,
        )
        self.hosts: list[Host] = []
        self.lives: list[asyncio.Task[None]] = []
        for _ in range(SERVERS):
            self._boot(len(self.hosts))
        self.writers = [Writer(number) for number in range(WRITERS)]
        self.lanes = 0

    def _boot(self, place: int) -> None:
        strait = Strait(self.stored, self.weather)
        self.straits[place : place + 1] = [strait]
        version = load_version(self.path, ONLY, threads=1, refuses_non_finite=True)
        version.warm_up()
        host = Host(
            MODEL,
            version,
            self.settings,
            Metrics().model(MODEL),
            self.executor,
            strait,
        )
        self.hosts[place : place + 1] = [host]
        self.lives[place : place + 1] = [self.loop.create_task(host.live())]

    def _turn(self, turns: int = TURNS) -> None:
        async def pass_time() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(pass_time())

    def _do(self, action: Callable[[], object]) -> None:
        """Call a host from inside its loop, as a session does."""

        async def do() -> None:
            action()

        self.loop.run_until_complete(do())

    # What a writer does.

    @rule(number=st.integers(0, WRITERS - 1), place=st.integers(0, SERVERS - 1))
    def open(self, number: int, place: int) -> None:
        writer = self.writers[number]
        writer.leave()
        mode = OpenMode.RESUME if writer.is_started else OpenMode.START_OR_RESUME
        writer.attempt += 1
        self.lanes += 1
        host = writer.host = self.hosts[place]
        writer.stream, writer.lane = host.attach(lambda: None), self.lanes
        request = OpenRequest(
            lane=writer.lane,
            sequence_id="s",
            mode=mode,
            writer=writer.name,
            attempt=writer.attempt,
            expected_epoch=writer.expected_epoch,
        )
        if writer.is_started:
            request.received = writer.received
        self.loop.create_task(host.open(writer.stream, [request]))

    @rule(number=st.integers(0, WRITERS - 1), place=st.integers(0, SERVERS - 1))
    def move(self, number: int, place: int) -> None:
        """On to another server, as after a lost connection."""
        self.open(number, place)
        self._turn()

    @rule(number=st.integers(0, WRITERS - 1), place=st.integers(0, SERVERS - 1))
    def take_over(self, number: int, place: int) -> None:
        """Take over with a new handle, which knows nothing of an older handle's outputs."""
        self._begin_anew(number)
        for _ in range(2):  # the first time it learns the epoch
            self.move(number, place)
            self.every_output_comes_once_and_is_right()

    def _begin_anew(self, number: int) -> None:
        known = self.writers[number]
        known.leave()
        writer = self.writers[number] = Writer(number)
        writer.name = known.name + b"'"
        writer.expected_epoch = known.expected_epoch

    @rule(number=st.integers(0, WRITERS - 1), steps=st.integers(1, CHUNK_MAX))
    def push(self, number: int, steps: int) -> None:
        writer = self.writers[number]
        if writer.sent < 0:
            return
        assert writer.host is not None
        assert writer.stream is not None
        inputs = np.array([[value(writer.sent + k)] for k in range(steps)], np.float32)
        self._submit(writer, writer.sent, inputs)
        writer.sent += steps

    @rule(
        number=st.integers(0, WRITERS - 1),
        place=st.integers(0, SERVERS - 1),
        sizes=st.lists(st.integers(1, CHUNK_MAX), max_size=3),
        acknowledges=st.booleans(),
    )
    def work(self, number: int, place: int, sizes: list[int], acknowledges: bool) -> None:
        """What clients mostly do: open where that is needed, send, read."""
        writer = self.writers[number]
        self.weather.is_open.set()
        if writer.stream is None:
            self.move(number, place)
            self.every_output_comes_once_and_is_right()
        for steps in sizes:
            self.push(number, steps)
            self._turn()
            self.every_output_comes_once_and_is_right()
        if acknowledges:
            self.acknowledge(number)

    @rule(data=st.data())
    def work_on(self, data: st.DataObject) -> None:
        """The same, so that it is drawn as often as all trouble together."""
        number = data.draw(st.integers(0, WRITERS - 1))
        self.work(number, data.draw(st.integers(0, SERVERS - 1)), [1, 2], True)

    @rule(number=st.integers(0, WRITERS - 1), back=st.integers(1, CHUNK_MAX))
    def push_again(self, number: int, back: int) -> None:
        """What was sent before, as a network that repeats itself would."""
        writer = self.writers[number]
        first = max(0, writer.sent - back)
        if writer.sent > first:
            inputs = np.array([[value(k)] for k in range(first, writer.sent)], np.float32)
            self._submit(writer, first, inputs)

    def _submit(self, writer: Writer, first: int, inputs: np.ndarray) -> None:
        assert writer.host is not None
        assert writer.stream is not None
        lanes, steps = np.array([writer.lane]), np.array([len(inputs)])
        host, stream = writer.host, writer.stream
        self._do(lambda: host.submit(stream, lanes, steps, np.array([first]), [inputs]))

    @rule(number=st.integers(0, WRITERS - 1))
    def acknowledge(self, number: int) -> None:
        writer = self.writers[number]
        if writer.sent >= 0:
            assert writer.host is not None
            assert writer.stream is not None
            host, stream = writer.host, writer.stream
            lanes, received = np.array([writer.lane]), np.array([writer.received])
            self._do(lambda: host.acknowledge(stream, lanes, received))

    @rule(number=st.integers(0, WRITERS - 1))
    def park(self, number: int) -> None:
        writer = self.writers[number]
        if writer.sent >= 0:
            assert writer.host is not None
            assert writer.stream is not None
            host, stream = writer.host, writer.stream
            self._do(lambda: host.end_after(stream, np.array([writer.lane]), Kind.PARK))
            writer.sent = -1

    @rule(number=st.integers(0, WRITERS - 1))
    def cut(self, number: int) -> None:
        writer = self.writers[number]
        if writer.stream is not None:
            assert writer.host is not None
            host, stream = writer.host, writer.stream
            self._do(lambda: host.detach(stream))
            writer.leave()

    # What befalls servers and store.

    @rule(place=st.integers(0, SERVERS - 1))
    def crash(self, place: int) -> None:
        gone = self.hosts[place]
        self.straits[place].is_dead = True
        self.lives[place].cancel()
        for writer in self.writers:
            if writer.host is gone:
                writer.leave()
        self._boot(place)

    @rule(number=st.integers(0, WRITERS - 1), steps=st.integers(1, CHUNK_MAX))
    def push_while_the_store_is_slow(self, number: int, steps: int) -> None:
        self.weather.is_open.clear()
        self.push(number, steps)
        self._turn()

    @rule(
        steps=st.integers(1, CHUNK_MAX),
        turns=st.sampled_from([0, 0, 1, 2, 5]),
        place=st.integers(0, SERVERS - 1),
        dies=st.sampled_from([True, True, False]),
    )
    def lose_the_server_in_the_midst(self, steps: int, turns: int, place: int, dies: bool) -> None:
        """It dies, or its client loses it and it goes on unknowing, while the store is slow."""
        self.work(0, place, [1], False)
        self.push_while_the_store_is_slow(0, steps)
        self.every_output_comes_once_and_is_right()
        if turns:
            self.weather.is_open.set()
            self._turn(turns)
        host = self.writers[0].host
        if dies and host is not None:
            self.crash(self.hosts.index(host))
        self.weather.is_open.set()
        self.work(0, 1 - place, [1], True)

    @rule()
    def hold_store(self) -> None:
        self.weather.is_open.clear()

    @rule()
    def let_store_go_on(self) -> None:
        self.weather.is_open.set()

    @rule(happens=st.booleans())
    def break_store(self, happens: bool) -> None:
        self.weather.breaks.append(happens)

    @rule(place=st.integers(0, SERVERS - 1))
    def time_comes(self, place: int) -> None:
        durable = self.hosts[place]._durable
        assert durable is not None
        durable.pending.note_time()
        durable.pending.signal.set()

    @rule(turns=st.integers(0, 12))
    def go_on(self, turns: int) -> None:
        self._turn(turns)

    @rule()
    def settle(self) -> None:
        self._turn()

    # What must hold.

    @invariant()
    def every_output_comes_once_and_is_right(self) -> None:
        for writer in list(getattr(self, "writers", ())):
            while writer.stream is not None and writer.stream.outbox:
                item = writer.stream.outbox[0]
                if isinstance(item, Outputs):
                    assert writer.host is not None
                    delivery = writer.stream.take_outputs()
                    writer.host.note_sent(writer.stream, delivery, 0)
                    self._receive(writer, delivery)
                else:
                    writer.stream.outbox.popleft()
                    self._read(writer, item)

    def _receive(self, writer: Writer, delivery: Outputs) -> None:
        for _, first, steps, (data,) in delivery.chunks():
            assert first <= writer.received, "an output is missing"
            outputs = np.frombuffer(data, "<f4")
            for step, output in zip(range(first, first + steps), outputs, strict=True):
                assert output == total(step), f"step {step} was lost, doubled or crossed"
            writer.received = max(writer.received, first + steps)
            if writer.is_strict:
                writer.durable = max(writer.durable, first + steps)

    def _read(self, writer: Writer, item: Any) -> None:
        match item:
            case Opened():
                assert item.applied >= writer.durable, "what was durable is gone"
                assert item.durable <= item.applied
                if not writer.is_started:
                    writer.received = item.held_from
                writer.is_started = True
                writer.expected_epoch = item.epoch
                writer.is_strict = self.settings.durability == "strict"
                writer.sent = item.applied
                writer.durable = max(writer.durable, item.durable)
            case Durable():
                assert item.step >= writer.durable
                writer.durable = item.step
            case Failed(error=ConflictError()):
                writer.expected_epoch = item.error.epoch
                writer.leave()
            case Failed():
                assert isinstance(item.error, StoreDownError | FencedError), item
                if isinstance(item.error, FencedError):
                    self._begin_anew(self.writers.index(writer))
                writer.leave()
            case Ended():
                writer.leave()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        # The end of all trouble: everything that can be answered is.
        self.weather.is_open.set()
        self.weather.breaks.clear()
        self._turn()
        self.every_output_comes_once_and_is_right()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self._turn(5)
        self.loop.close()
        self.executor.shutdown()


def test_every_output_comes_once_through_crashes_and_takeovers(
    accumulator_file, monkeypatch
) -> None:
    monkeypatch.setattr("sluice_service.durability.checkpointer._RETRY_SECONDS", (0.0, 0.0))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    # One look is enough where no run is long enough for a thread, whatever was measured.
    monkeypatch.setattr("sluice_service.batching.engine._REPEATS", 1)
    monkeypatch.setattr("sluice_service.batching.engine.Engine.estimate", lambda *_: 0.0)
    Durability.path = accumulator_file
    machine = Durability.TestCase
    machine.settings = hypothesis_settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
    )
    machine().runTest()
