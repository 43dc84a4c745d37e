"""One model and every live sequence of it, put together from its parts.

All methods run on one event loop. Only the model's own run may be in another thread. Everything
that could disturb a run waits until it has landed.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import structlog

from sluice_protos.contract_pb2 import ModelContract
from sluice_service.arrays import Integers
from sluice_service.batching.inputs import InputRules
from sluice_service.batching.run import RunSizes
from sluice_service.batching.scheduler import Scheduler
from sluice_service.batching.versions import Version, Versions
from sluice_service.durability.assembly import DurableParts, assemble
from sluice_service.metrics import ModelMetrics
from sluice_service.models.commands import Commands, Forked
from sluice_service.models.expiry import Expiry
from sluice_service.models.queries import Queries, SequenceInfo
from sluice_service.runtime.clock import AwakeClock
from sluice_service.runtime.cooperative import rest, take_turn, take_turns
from sluice_service.sequences.events import EndReason, Limits, Outputs
from sluice_service.sequences.states import States
from sluice_service.sequences.stream import Stream, Streams
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.admission import Admission, Lifecycle
from sluice_service.serving.attachments import Attachments
from sluice_service.serving.faults import Faults
from sluice_service.serving.intake import Intake
from sluice_service.serving.landing import Landing
from sluice_service.serving.opening import Opening
from sluice_service.serving.outputs import OutputBuffer
from sluice_service.serving.placement import Placement
from sluice_service.serving.run_loop import RunLoop
from sluice_service.settings import Settings
from sluice_service.store import Store, StoreError
from sluice_service.store.claims import Durability, OpenRequest, State

log = structlog.get_logger()
T = TypeVar("T")

_TICK_SECONDS = 1.0


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
        self.name = name
        self._settings = settings
        self._metrics = metrics
        self._clock = AwakeClock(gap_max=2 * _TICK_SECONDS)
        self._lifecycle = Lifecycle()
        self.inputs = InputRules(
            version.contract,
            chunk_steps_max=settings.chunk_steps_max,
            refuses_non_finite=settings.non_finite == "refuse",
        )
        self.limits = _limits(settings, self.inputs)
        states = States(settings.sequences_max, version.model.initial_state)
        self._versions = Versions(
            version, states, refuses_non_finite=settings.non_finite == "refuse"
        )
        self._table = SequenceTable(
            states,
            settings.sequences_max,
            now=self._clock.now,
            tombstone_seconds=settings.tombstone_seconds,
            unacknowledged_steps_max=self.limits.unacknowledged_steps_max,
            undurable_steps_max=settings.undurable_steps_max,
        )
        self._streams = Streams(
            self.limits,
            outbox_rows_max=settings.stream_queue_bytes_max
            // max(1, self.inputs.output_step_bytes),
        )
        self._run_sizes = RunSizes(
            sequences_max=settings.run_sequences_max,
            steps_max=settings.run_steps_max,
            cells_max=self._versions.cells_within(settings.run_seconds_max),
        )
        self._scheduler = Scheduler(self._table, rules=self.inputs, sizes=self._run_sizes)
        self._faults = Faults(self._table, self._streams, metrics)
        self._outputs = OutputBuffer(self._table, self._streams, self._faults)
        self._attachments = Attachments(
            self._table, self._streams, self._scheduler, self._outputs, self._faults, metrics
        )
        landing = Landing(
            self._table,
            self._streams,
            self._scheduler,
            self._attachments,
            self._outputs,
            self._faults,
            metrics,
        )
        self._runs = RunLoop(
            self._scheduler,
            self._versions,
            landing,
            self._streams,
            metrics,
            executor,
            runs_at_once_max=settings.runs_at_once_max,
        )
        # What streams send goes to the intake directly: every message takes this way.
        intake = Intake(self._streams, self._scheduler, self._runs, self._faults, metrics)
        self.submit = intake.submit
        self.submit_singles = intake.submit_singles
        self.end_after = intake.end_after
        self._admission = Admission(
            self._table,
            self._versions,
            self._lifecycle,
            durability=Durability[settings.durability.upper()],
        )
        placement = Placement(
            self._table, self._versions, self._attachments, self._admission, metrics
        )
        self._opening = Opening(
            self._table, self._streams, self._admission, placement, self._outputs, self._faults
        )
        self._durable: DurableParts | None = None
        if store is not None:
            self._durable = assemble(
                store,
                self._table,
                self._versions,
                self._admission,
                self._opening,
                self._attachments,
                self._outputs,
                landing,
                self._runs,
                metrics=metrics,
                settings=settings,
            )
        ownership = self._durable.ownership if self._durable else None
        self._queries = Queries(name, self._table, self._versions, ownership)
        self._commands = Commands(
            self._table,
            self._admission,
            placement,
            self._attachments,
            self._queries,
            self._runs,
            ownership,
            self._durable.checkpointer if self._durable else None,
        )
        self._expiry = Expiry(
            self._table,
            self._attachments,
            self._runs,
            self._durable.checkpointer if self._durable else None,
            idle_seconds_max=settings.sequence_idle_seconds_max,
        )
        # Tasks that continue after their stream has ended.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._follow()

    def _follow(self) -> None:
        """Let the gauges read from this host."""
        metrics = self._metrics.all
        table = self._table
        metrics.follow(
            self.name,
            {
                metrics.sequences_live: lambda: len(table),
                metrics.sequences_parked: lambda: table.parked,
                metrics.sequences_max: lambda: table.slots,
                metrics.state_bytes: lambda: self._versions.state_bytes(
                    np.flatnonzero(table.is_alive)
                ),
                metrics.streams: lambda: len(self._streams),
                metrics.is_bit_exact: lambda: self.version.self_test.is_bit_exact,
                metrics.version: lambda: self.version.number,
                metrics.versions_loaded: lambda: len(self._versions),
            },
        )
        if self._durable is not None:
            checkpointer = self._durable.checkpointer
            metrics.follow(
                self.name,
                {
                    metrics.store_down_seconds: lambda: checkpointer.down_seconds,
                    metrics.undurable_steps: lambda: checkpointer.undurable_steps,
                },
            )

    # Status.

    @property
    def sequences_live(self) -> int:
        """How many sequences have a state at this server."""
        return len(self._table)

    @property
    def activity(self) -> tuple[float, int]:
        """The runs so far, and the live sequences."""
        return self._metrics.runs.value, len(self._table)

    @property
    def is_welcoming(self) -> bool:
        """True while new sequences may be opened: no unload has begun, and no drain."""
        return self._lifecycle.is_welcoming

    @property
    def is_draining(self) -> bool:
        """True when the server stops: chunks that arrive now are not run."""
        return self._lifecycle.is_draining

    @property
    def version(self) -> Version:
        """The version on which sequences begin."""
        return self._versions.newest

    @property
    def versions(self) -> list[Version]:
        """All versions on which sequences run or begin, oldest first."""
        return list(self._versions)

    @property
    def contract(self) -> ModelContract:
        """The contract of the version on which sequences begin."""
        return self.version.contract

    def version_of(self, stream: Stream, lane: int) -> Version:
        """The version on which the sequence of an open lane runs."""
        return self._versions.of(stream.slot(lane))

    @property
    def store_down_seconds(self) -> float:
        """For how long the store has not answered; 0 while it answers, or without a store."""
        return self._durable.checkpointer.down_seconds if self._durable is not None else 0.0

    @property
    def room(self) -> int:
        """How many more sequences may live here."""
        return self._admission.room

    def is_live(self, sequence_id: str) -> bool:
        """True if a sequence lives here, on a stream or parked."""
        return self._table.get(sequence_id) is not None

    def watch_room(self, on_room: Callable[[], None]) -> None:
        """Call `on_room` whenever a sequence has gone, or reserved room is free again."""
        self._table.on_gone = on_room

    def now(self) -> float:
        """Seconds in which this process was awake."""
        return self._clock.now()

    def sequences(self) -> Iterator[SequenceInfo]:
        """Every live sequence of this server, as it stands now."""
        return self._queries.here()

    def all_sequences(self) -> AsyncIterator[SequenceInfo]:
        """Every live sequence of this server, then those that only the store knows."""
        return self._queries.all()

    async def state(self, sequence_id: str) -> State:
        """The state after the last applied step; of a sequence elsewhere, the last durable one.

        Raises LaneError.
        """
        return await self._queries.state(sequence_id)

    # Calls of streams.

    def attach(self, on_change: Callable[[], None]) -> Stream:
        """A new stream; `on_change` is called when it has something to send or may read again."""
        return self._streams.open(on_change)

    def detach(self, stream: Stream) -> None:
        """Park every lane of a stream that has ended, in turns if there are many."""
        parking = self._attachments.detach(stream)
        if not take_turn(parking):
            self._start(self._continue_parking(parking))
        self._runs.settle()

    async def _continue_parking(self, parking: Iterator[None]) -> None:
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
        if self._durable is None:
            opening = map(partial(self._opening.open_in_memory, stream), requests)
            # Do few of both in one turn, because each turn may have to wait for a run to end.
            await take_turns(itertools.chain(ending, opening), instant=between_runs)
        else:
            if closing:
                await take_turns(ending, instant=between_runs)
            # Not cancelled with the stream: the store must not be left with half of an open.
            work = self._open_in_store(self._durable, stream, requests)
            await asyncio.shield(self._start(work))

    def _end_lane(self, stream: Stream, lane: int) -> None:
        if (slot := stream.slot(lane)) >= 0:
            self._attachments.end(self._table.at(slot), EndReason.CLIENT, "its client ended it")

    async def _open_in_store(
        self, durable: DurableParts, stream: Stream, requests: Iterable[OpenRequest]
    ) -> None:
        """As `open`, after asking the store about every sequence that it has or gets."""
        with contextlib.suppress(StoreError):
            await durable.checkpointer.close_pending()
        await durable.ownership.open_all(stream, requests)

    def restart(self, stream: Stream, lanes: Iterable[int]) -> None:
        """Set the states of `lanes`, on which nothing is queued or runs, to the initial one."""
        for lane in lanes:
            if (slot := stream.slot(lane)) >= 0:
                self._table.states.reset(slot)

    def note_sent(self, stream: Stream, outputs: Outputs, responses: int) -> None:
        """Outputs have gone out, the last of them in response number `responses`."""
        self._outputs.note_sent(stream, outputs, responses)

    def hold_outputs(
        self, stream: Stream, lane: int, first: int, steps: int, rows: list[bytes]
    ) -> None:
        """Hold outputs that have gone to a client that counts its steps, until acknowledged."""
        self._outputs.hold_counted(stream, lane, first, steps, rows)

    def acknowledge(self, stream: Stream, lanes: Integers, received: Integers) -> None:
        """The client has the outputs of `lanes` [n] up to `received` [n]."""
        self._outputs.acknowledge(stream, lanes, received)
        self._wake_if_ready()

    def acknowledge_responses(self, stream: Stream, responses: int) -> None:
        """The client has read that many responses of the stream."""
        self._outputs.acknowledge_responses(stream, responses)
        self._wake_if_ready()

    def is_finished(self, stream: Stream) -> bool:
        """True if a stream whose client sends no more has nothing left to send."""
        is_waiting = stream.ending_lanes > 0 or self._outputs.has_gated(stream)
        return not is_waiting and self._scheduler.is_stuck(stream.live_slots())

    def _wake_if_ready(self) -> None:
        if self._scheduler.has_ready:
            self._runs.wake()

    # Commands.

    async def fork(self, sequence_id: str, copy: OpenRequest) -> Forked:
        """Copy a live sequence to what `copy` opens; the copy is parked. Raises LaneError."""
        # Not cancelled with the call: the store must not be left with half of it.
        return await asyncio.shield(self._start(self._commands.fork(sequence_id, copy)))

    async def close_sequence(self, sequence_id: str) -> int:
        """Drop a live sequence, whoever owns it; its steps. Raises LaneError."""
        # Not cancelled with the call: the store must not be left with half of it.
        return await asyncio.shield(self._start(self._commands.close(sequence_id)))

    # Versions.

    async def adopt(self, version: Version) -> None:
        """Let sequences begin on `version`. Live ones finish on theirs. Raises ModelError."""

        def take_up() -> None:
            self._versions.adopt(version)
            self._lifecycle.is_unloading = False
            self._run_sizes.cells_max = self._versions.cells_within(self._settings.run_seconds_max)

        await self._runs.between_runs(take_up)

    def close(self) -> None:
        """Let no sequence begin; live ones continue."""
        self._lifecycle.is_unloading = True

    @property
    def is_deserted(self) -> bool:
        """True if no sequence lives, none may begin, and the store knows of every end."""
        has_ends = self._durable is not None and self._durable.pending.has_ends
        return self._lifecycle.is_unloading and not len(self._table) and not has_ends

    async def sweep(self) -> None:
        """Unload the versions on which nothing runs any more."""
        if len(self._versions) == 1:
            return
        alive = self._table.is_alive
        gone = await self._runs.between_runs(lambda: self._versions.sweep(np.flatnonzero(alive)))
        for version in gone:
            log.info("version_unloaded", model=self.name, version=version.number)

    # Background work and drain.

    async def live(self) -> None:
        """Expire what is idle and write what is durable; until cancelled."""
        if self._durable is not None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._durable.checkpointer.run())
                tasks.create_task(self._tick())
        else:
            await self._tick()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            try:
                if expired := await self.expire():
                    log.info("sequences_expired", model=self.name, sequences=expired)
                await self.sweep()
            except Exception:
                # A defect of the server must not keep sequences for ever: try again.
                log.exception("expiry_broke", model=self.name)

    async def expire(self) -> int:
        """Close sequences that were idle for too long and tell their clients. Returns how many."""
        return await self._expiry.run(self._clock.now())

    async def drain(self) -> None:
        """Open nothing new, finish what is queued, then tell every lane that the server stops.

        Cancelled, it finishes nothing more and tells them at once.
        """
        self._lifecycle.is_draining = True
        self._streams.stop_reading()
        try:
            await self._runs.idle()
            if self._durable is not None:
                await self._durable.checkpointer.flush()
        finally:
            self._attachments.drain(self._is_safe)

    def _is_safe(self, slot: int) -> bool:
        return self._durable is None or self._durable.pending.is_safe(slot)


def _limits(settings: Settings, inputs: InputRules) -> Limits:
    """The limits for clients, with bytes converted to steps of this model."""
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
