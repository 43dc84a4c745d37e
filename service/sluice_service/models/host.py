"""One model and every live sequence of it: open, submit, acknowledge, close, drain.

All methods run on one event loop; only the model's own run may be in another
thread, and what could disturb it waits until it has been applied.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import structlog

from sluice_protos.contract_pb2 import ModelContract
from sluice_service.arrays import Array, Buffers, Integers, is_ones, starts_of
from sluice_service.batching.inputs import InputRules
from sluice_service.batching.queues import Frame, Kind, Single
from sluice_service.batching.scheduler import Scheduler
from sluice_service.batching.versions import Version, Versions
from sluice_service.durability.checkpointer import Keeper
from sluice_service.durability.ownership import Answer, Custody
from sluice_service.durability.snapshots import Snapshots
from sluice_service.errors import ExistsError, InvalidInputError, LaneError, StoreDownError
from sluice_service.metrics import ModelMetrics
from sluice_service.models.queries import Listing
from sluice_service.runtime.clock import AwakeClock
from sluice_service.runtime.cooperative import rest, take_turn, take_turns
from sluice_service.sequences.events import EndReason, Limits
from sluice_service.sequences.states import Arena, Slots
from sluice_service.sequences.stream import Stream
from sluice_service.sequences.table import ALL, Sequence, Sequences
from sluice_service.serving.attachments import Lanes, Parting
from sluice_service.serving.opening import Openings
from sluice_service.serving.run_loop import RunLoop
from sluice_service.settings import Settings
from sluice_service.store import Store, StoreError, Verdict
from sluice_service.store.claims import OpenRequest

log = structlog.get_logger()
T = TypeVar("T")

_TICK_SECONDS = 1.0


class Forked(NamedTuple):
    """The copy of a sequence: its id, the steps it holds, its epoch."""

    sequence_id: str
    step: int
    epoch: int


class Host:
    """A model being served."""

    def __init__(
        self,
        name: str,
        version: Version,
        settings: Settings,
        metrics: ModelMetrics,
        executor: Executor,
        store: Store | None,
    ) -> None:
        """Serve `version`, until another one is adopted."""
        slots = settings.sequences_max
        self.name = name
        self._settings = settings
        self._metrics = metrics
        self._clock = AwakeClock(gap_max=2 * _TICK_SECONDS)
        self.inputs = InputRules(
            version.contract,
            chunk_steps_max=settings.chunk_steps_max,
            refuses_non_finite=settings.non_finite == "refuse",
        )
        self.limits = _limits(settings, self.inputs)
        self._arena = Arena(slots, version.model.initial_state)
        self._versions = Versions(version, self._arena)
        self._sequences = Sequences(
            slots,
            tombstones_max=slots,
            tombstone_seconds=settings.tombstone_seconds,
            unacknowledged_steps_max=self.limits.unacknowledged_steps_max,
            undurable_steps_max=settings.undurable_steps_max,
        )
        self._scheduler = Scheduler(
            self._sequences,
            slots,
            rules=self.inputs,
            run_sequences_max=settings.run_sequences_max,
            run_steps_max=settings.run_steps_max,
            run_cells_max=self._versions.cells_within(settings.run_seconds_max),
        )
        self._lanes = Lanes(
            self._arena,
            self._sequences,
            self._scheduler,
            self.limits,
            self._clock,
            metrics,
            outbox_rows_max=settings.stream_queue_bytes_max
            // max(1, self.inputs.output_step_bytes),
        )
        self._runs = RunLoop(
            self._arena,
            self._sequences,
            self._scheduler,
            self._lanes,
            self._versions,
            self._clock,
            metrics,
            executor,
            self._applied if store is not None else None,
            runs_at_once_max=settings.runs_at_once_max,
        )
        self._openings = Openings(
            self._arena,
            self._sequences,
            self._lanes,
            self.inputs,
            self._versions,
            self._clock,
            metrics,
            durability=settings.durability,
        )
        self._keeper = self._keep(store) if store is not None else None
        self._listing = Listing(
            name,
            self._arena,
            self._sequences,
            self._versions,
            self._keeper.custody if self._keeper is not None else None,
            self._clock,
        )
        # What goes on even where its stream has ended.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._follow()

    def _keep(self, store: Store) -> Keeper:
        """What keeps this model's sequences in the store."""
        snapshots = Snapshots(
            self._arena, self._sequences, self._lanes, self.inputs, self._versions
        )
        custody = Custody(store, self.name, self._sequences, self._openings, snapshots, self._runs)
        return Keeper(
            store,
            self.name,
            self._sequences,
            self._scheduler,
            self._lanes,
            snapshots,
            custody,
            self._settings,
            self._metrics,
            self._runs,
        )

    def _applied(self, slots: Slots) -> None:
        assert self._keeper is not None
        self._keeper.notice(slots)

    def _follow(self) -> None:
        """Let the gauges read from here."""
        metrics = self._metrics.all
        metrics.follow(
            self.name,
            {
                metrics.sequences_live: lambda: len(self._sequences),
                metrics.sequences_parked: lambda: self._sequences.parked,
                metrics.sequences_max: lambda: self._settings.sequences_max,
                metrics.state_bytes: lambda: self._versions.state_bytes(
                    np.flatnonzero(self._sequences.is_alive)
                ),
                metrics.streams: lambda: len(self._lanes),
                metrics.is_bit_exact: lambda: self.version.self_test.is_bit_exact,
                metrics.version: lambda: self.version.number,
                metrics.versions_loaded: lambda: len(self._versions),
            },
        )
        if (keeper := self._keeper) is not None:
            metrics.follow(
                self.name,
                {
                    metrics.store_down_seconds: lambda: keeper.down_seconds,
                    metrics.undurable_steps: lambda: keeper.undurable_steps,
                },
            )

    # What is here.

    @property
    def sequences_live(self) -> int:
        """How many sequences have a state here."""
        return len(self._sequences)

    @property
    def activity(self) -> tuple[float, int]:
        """The runs so far, and the live sequences."""
        return self._metrics.runs.value, len(self._sequences)

    @property
    def is_welcoming(self) -> bool:
        """True until the model is unloaded or the server stops: new sequences may be opened."""
        return not self._lanes.is_unloading and not self._lanes.is_draining

    @property
    def is_draining(self) -> bool:
        """True once the server stops: nothing that comes now is run."""
        return self._lanes.is_draining

    @property
    def version(self) -> Version:
        """On which sequences begin."""
        return self._versions.newest

    @property
    def versions(self) -> list[Version]:
        """All on which sequences run or begin, oldest first."""
        return list(self._versions)

    @property
    def contract(self) -> ModelContract:
        """What the version on which sequences begin says of itself."""
        return self.version.contract

    def version_of(self, stream: Stream, lane: int) -> Version:
        """The version on which the sequence of an open lane runs."""
        return self._versions.of(stream.slot(lane))

    @property
    def store_down_seconds(self) -> float:
        """For how long the store has not answered; 0 while it does, or is not used."""
        return self._keeper.down_seconds if self._keeper is not None else 0.0

    @property
    def listing(self) -> Listing:
        """What may be asked about its sequences."""
        return self._listing

    # Its places.

    @property
    def room(self) -> int:
        """How many more sequences may live here."""
        return self._openings.room

    def is_live(self, sequence_id: str) -> bool:
        """True when a sequence lives here, on a stream or parked."""
        return self._sequences.get(sequence_id) is not None

    def watch_room(self, on_room: Callable[[], None]) -> None:
        """Have `on_room` called whenever a sequence has left its place."""
        self._sequences.on_gone = on_room

    def now(self) -> float:
        """Seconds in which this process was awake."""
        return self._clock.now()

    # What a stream does.

    def attach(self, on_change: Callable[[], None]) -> Stream:
        """A new stream; `on_change` is called when it has something to send or may be read on."""
        return self._lanes.attach(on_change)

    def detach(self, stream: Stream) -> None:
        """Park every lane of a stream that has ended; of very many, some a little later."""
        parking = self._lanes.detach(stream)
        if not take_turn(parking):
            self._start(self._go_on_parking(parking))
        self._runs.settle()

    async def _go_on_parking(self, parking: Iterator[None]) -> None:
        await rest()
        await take_turns(parking)
        self._runs.settle()

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def open(
        self, stream: Stream, requests: Iterable[OpenRequest], *, closing: Collection[int] = ()
    ) -> None:
        """Give each request its lane and its sequence, or tell its fault.

        Before that, drop the sequences of the lanes `closing`, on which nothing is queued.
        """

        between_runs = self._runs.between_runs
        ending = map(partial(self._end_lane, stream), closing)
        if self._keeper is None:
            opening = map(partial(self._openings.open_here, stream), requests)
            # Few of both are one turn, not two: each may have to wait for a run to end.
            await take_turns(itertools.chain(ending, opening), instant=between_runs)
        else:
            if closing:
                await take_turns(ending, instant=between_runs)
            # Where the stream ends meanwhile: what the store was asked is brought to its end.
            work = self._open_in_store(self._keeper, stream, requests)
            await asyncio.shield(self._start(work))

    def _end_lane(self, stream: Stream, lane: int) -> None:
        if (slot := stream.slot(lane)) >= 0:
            self._lanes.end(self._sequences.at(slot), EndReason.CLIENT, "its client ended it")

    async def _open_in_store(
        self, keeper: Keeper, stream: Stream, requests: Iterable[OpenRequest]
    ) -> None:
        """As `open`, with the store's word on every sequence that it has or gets."""
        with contextlib.suppress(StoreError):
            await keeper.close_pending()
        await keeper.custody.open_all(stream, requests)

    def restart(self, stream: Stream, lanes: Iterable[int]) -> None:
        """Set the states of `lanes`, on which nothing is queued or runs, to the initial one."""
        for lane in lanes:
            if (slot := stream.slot(lane)) >= 0:
                self._arena.reset(slot)

    def submit(
        self,
        stream: Stream,
        lanes: Integers,
        steps: Integers,
        first: Integers | None,
        inputs: list[Array] | InvalidInputError,
    ) -> None:
        """Queue chunks: `lanes`, `steps` and `first` are [chunks], `inputs` [sum(steps), …] each.

        An InvalidInputError in place of the inputs faults every lane with a chunk here.
        """
        if stream.is_draining:
            return  # read in the very moment: it is neither run nor answered
        self._metrics.chunks.add(len(lanes))
        arrived = time.monotonic()
        slots, starts = stream.slots(lanes), starts_of(steps)
        is_whole = int(slots.min()) >= 0
        if not is_whole:
            for lane in set(lanes.tolist()):
                if stream.is_unknown(lane):
                    self._lanes.tell_unknown(stream, lane)
            is_open = slots >= 0
            lanes, slots = lanes[is_open], slots[is_open]
            steps, starts = steps[is_open], starts[is_open]
            first = None if first is None else first[is_open]
            if not len(slots):
                return
        errors: dict[int, LaneError] | None = None
        if isinstance(inputs, InvalidInputError):
            errors, inputs = dict.fromkeys(range(len(slots)), inputs), []
        if is_ones(steps):
            total, each = len(steps), 1
        else:
            total = int(np.maximum(steps, 1).sum())
            each = int(steps[0]) if (steps == steps[0]).all() else 0
        if not is_whole:
            each = 0  # rows of other lanes lie between: only the queues tell them apart
        stream.queued_steps += total
        self._scheduler.push(
            Frame(stream.number, lanes, slots, steps, starts, first, inputs, errors, each, arrived)
        )
        self._runs.wake(is_alone=len(self._lanes) == 1)

    def submit_singles(
        self, stream: Stream, chunks: Iterable[tuple[int, int, int, Buffers]]
    ) -> None:
        """Queue chunks that came one by one: of each its lane, its steps, the steps before it
        (or NONE), and its rows for each input, checked.
        """
        if stream.is_draining:
            return
        arrived = time.monotonic()
        for lane, steps, first, data in chunks:
            self._metrics.chunks.value += 1
            slot = stream.slot(lane)
            if slot >= 0:
                stream.queued_steps += steps
                self._scheduler.push_single(
                    Single(stream.number, lane, slot, steps, first, data, arrived)
                )
            elif stream.is_unknown(lane):
                self._lanes.tell_unknown(stream, lane)
        self._runs.wake(is_alone=len(self._lanes) == 1)

    def end_after(self, stream: Stream, lanes: Integers, kind: Kind) -> None:
        """Close or park `lanes` [n] behind the chunks they have sent."""
        if stream.is_draining:
            return
        slots = stream.slots(lanes)
        for lane in lanes[slots < 0].tolist():
            if stream.is_unknown(lane):
                self._lanes.tell_unknown(stream, lane)
        slots = np.unique(slots[slots >= 0])
        if len(slots):
            stream.queued_steps += len(slots)
            self._scheduler.push_endings(slots, kind)
            self._runs.wake()

    def acknowledge(self, stream: Stream, lanes: Integers, received: Integers) -> None:
        """The client has the outputs of `lanes` [n] up to `received` [n]."""
        self._lanes.acknowledge(stream, lanes, received)
        self._wake_if_ready()

    def acknowledge_responses(self, stream: Stream, responses: int) -> None:
        """The client has read that many responses of the stream."""
        self._lanes.acknowledge_responses(stream, responses)
        self._wake_if_ready()

    @property
    def lanes(self) -> Lanes:
        """Where a stream's sender reports what has gone out."""
        return self._lanes

    def is_finished(self, stream: Stream) -> bool:
        """True when nothing more will come of a stream whose client sends no more."""
        is_waiting = stream.ending_lanes > 0 or self._lanes.has_gated(stream)
        return not is_waiting and self._scheduler.is_stuck(stream.live_slots())

    def _wake_if_ready(self) -> None:
        if self._scheduler.has_ready:
            self._runs.wake()

    # The life of the versions.

    async def adopt(self, version: Version) -> None:
        """Let sequences begin on `version`; those that live finish on theirs. Raises ModelError."""

        def take_up() -> None:
            self._versions.adopt(version)
            self._lanes.is_unloading = False
            self.inputs.state_sizes = self._versions.state_sizes()
            cells_max = self._versions.cells_within(self._settings.run_seconds_max)
            self._scheduler.run_cells_max = cells_max

        await self._runs.between_runs(take_up)

    def close(self) -> None:
        """Let no sequence begin; those that live go on."""
        self._lanes.is_unloading = True

    @property
    def is_deserted(self) -> bool:
        """True when no sequence lives, none may begin, and the store has heard of every end."""
        is_empty = not len(self._sequences) and not self._lanes.closings
        return self._lanes.is_unloading and is_empty

    async def sweep(self) -> None:
        """Unload the versions on which nothing runs any more."""
        if len(self._versions) == 1:
            return
        alive = self._sequences.is_alive
        gone = await self._runs.between_runs(lambda: self._versions.sweep(np.flatnonzero(alive)))
        self.inputs.state_sizes = self._versions.state_sizes()
        for version in gone:
            log.info("version_unloaded", model=self.name, version=version.number)

    # The life of the sequences.

    async def fork(self, sequence_id: str, copy: OpenRequest) -> Forked:
        """Copy a live sequence to what `copy` opens; the copy is parked. Raises LaneError."""
        # Where its caller goes away meanwhile, what the store was asked is brought to its end.
        return await asyncio.shield(self._start(self._fork(sequence_id, copy)))

    async def _fork(self, sequence_id: str, copy: OpenRequest) -> Forked:
        copy.state = await self._listing.state(sequence_id)
        self._openings.check(copy)
        self._openings.durability(copy)
        if self._sequences.get(copy.sequence_id) is not None:
            raise ExistsError(f"sequence {copy.sequence_id!r} is alive; fork to another id")
        forked: list[Sequence] = []

        def land(opening: OpenRequest, answer: Answer) -> None:
            if isinstance(answer, LaneError):
                raise answer
            forked.append(self._openings.land(opening, answer))

        if self._keeper is None:
            await self._runs.between_runs(lambda: land(copy, None))
        else:
            await self._keeper.custody.open([copy], land)
        sequence = forked[0]
        return Forked(
            sequence.sequence_id, int(self._sequences.step[sequence.slot]), sequence.record.epoch
        )

    async def close_sequence(self, sequence_id: str) -> int:
        """Drop a live sequence, whoever holds it; its steps. Raises LaneError."""
        # Where its caller goes away meanwhile it is brought to its end.
        return await asyncio.shield(self._start(self._close(sequence_id)))

    async def _close(self, sequence_id: str) -> int:
        keeper, ending = self._keeper, "CloseSequence closed it"

        def close() -> tuple[int, Parting | None]:
            sequence = self._listing.find(sequence_id)
            step = int(self._sequences.step[sequence.slot])
            if sequence.is_durable:
                # The store is asked from here, for its answer is the caller's.
                return step, self._lanes.begin_end(sequence, EndReason.CLIENT, ending)
            self._lanes.end(sequence, EndReason.CLIENT, ending)
            return step, None

        if keeper is not None and not self.is_live(sequence_id):
            return await keeper.custody.close_elsewhere(sequence_id, ending)
        step, parting = await self._runs.between_runs(close)
        if keeper is not None and parting is not None:
            try:
                (verdict,) = await keeper.close([parting])
            except StoreError as error:
                raise StoreDownError(
                    f"the store does not answer ({error}); the sequence has left its lane, and "
                    "ends once the store is back"
                ) from error
            if verdict is Verdict.REFUSED:
                return await keeper.custody.close_elsewhere(sequence_id, ending)
        return step

    async def live(self) -> None:
        """Expire what is idle, forget what is over, keep what is durable; until cancelled."""
        if self._keeper is not None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keeper.keep())
                tasks.create_task(self._tick())
        else:
            await self._tick()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            try:
                await self.expire()
                await self.sweep()
            except Exception:
                # A defect of ours must not keep sequences alive for ever: look again.
                log.exception("expiry_broke", model=self.name)

    async def expire(self) -> None:
        """Close the sequences that were idle for too long and tell their clients."""
        now = self._clock.now()
        while self._sequences.forget_tombstones(now):
            await rest()
        idle_max = self._settings.sequence_idle_seconds_max
        await self._excuse(before=now - idle_max)
        ending = f"it had no step for {idle_max:g} seconds"
        expired = 0

        def end(sequence: Sequence) -> None:
            nonlocal expired
            expired += 1
            self._lanes.end(sequence, EndReason.IDLE, ending)

        await take_turns(map(end, self._sequences.idle(before=now - idle_max)))
        self._runs.settle()
        if expired:
            log.info("sequences_expired", model=self.name, sequences=expired)

    async def _excuse(self, *, before: float) -> None:
        """Where the store is away: whoever waits for it has not been idle, his time begins anew."""
        table, keeper = self._sequences, self._keeper
        if keeper is None or not any(one.is_durable for one in table.idle(before)):
            return
        if not await keeper.is_answered():
            table.active[table.durable < ALL] = self._clock.now()

    async def drain(self) -> None:
        """Open nothing new, finish what is queued, then tell every lane that the server stops.

        Cancelled, it finishes nothing more and tells them at once.
        """
        self._lanes.stop_reading()
        try:
            await self._runs.idle()
            if self._keeper is not None:
                await self._keeper.flush()
        finally:
            self._lanes.drain(self._is_safe)

    def _is_safe(self, slot: int) -> bool:
        return self._keeper is None or self._keeper.is_safe(slot)


def _limits(settings: Settings, inputs: InputRules) -> Limits:
    """What a client must keep to, with bytes turned into steps of this model."""
    credit = min(
        settings.stream_queue_steps_max,
        settings.stream_queue_bytes_max // max(1, inputs.step_bytes),
    )
    unacknowledged = min(
        settings.unacknowledged_steps_max,
        settings.unacknowledged_bytes_max // max(1, inputs.output_step_bytes),
    )
    return Limits(
        request_bytes_max=settings.request_bytes_max,
        chunk_steps_max=settings.chunk_steps_max,
        credit_steps=max(1, credit),
        credit_bytes=max(1, credit) * inputs.step_bytes,
        unacknowledged_steps_max=max(1, unacknowledged),
    )
