"""The run loop: when a run ends, the next one takes whatever is ready, without a timer."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np
import structlog

from sluice_protos.sequences_pb2 import Closed
from sluice_service.arena import Arena
from sluice_service.clock import AwakeClock
from sluice_service.engine import Engine, Outcome
from sluice_service.lanes import Lanes
from sluice_service.metrics import ModelMetrics
from sluice_service.ragged import unpad
from sluice_service.scheduler import Ending, Run, Scheduler
from sluice_service.sequences import Sequences
from sluice_service.streams import Delivery

log = structlog.get_logger()
T = TypeVar("T")

# Below this a hop to a thread and back costs more than it can overlap.
_INLINE_SECONDS_MAX = 0.0003


class RunLoop:
    """Takes runs from the scheduler, has the engine execute them, applies what comes out."""

    def __init__(
        self,
        arena: Arena,
        sequences: Sequences,
        scheduler: Scheduler,
        lanes: Lanes,
        engine: Engine,
        clock: AwakeClock,
        metrics: ModelMetrics,
        executor: Executor,
    ) -> None:
        self._arena = arena
        self._sequences = sequences
        self._scheduler = scheduler
        self._lanes = lanes
        self._engine = engine
        self._clock = clock
        self._metrics = metrics
        self._executor = executor
        self._is_in_flight = False
        self._is_pump_due = False
        self._waiting: list[Callable[[], None]] = []
        self._idle = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """True when nothing runs and nothing could."""
        return not self._is_in_flight and not self._scheduler.has_ready

    async def idle(self) -> None:
        """Return once nothing runs and nothing could."""
        while not self.is_idle:
            self._idle.clear()
            self.wake()
            await self._idle.wait()

    def wake(self) -> None:
        """Something may have become ready: look, once this turn of the event loop is over.

        Whatever else arrives in the same turn joins the run.
        """
        if not self._is_pump_due and not self._is_in_flight:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    async def between_runs(self, action: Callable[[], T]) -> T:
        """What `action` returns, called at an instant when no run is in flight."""
        if not self._is_in_flight:
            return action()
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def act() -> None:
            try:
                value = action()
            except Exception as error:
                if not result.cancelled():
                    result.set_exception(error)
            else:
                if not result.cancelled():
                    result.set_result(value)

        self._waiting.append(act)
        return await result

    def settle(self) -> None:
        """Act on what the scheduler met: faults, endings, steps that will never run."""
        scheduler, lanes = self._scheduler, self._lanes
        for slot, error in _drain(scheduler.faults):
            lanes.fault(slot, error)
        for slot, ending in _drain(scheduler.endings):
            sequence = self._sequences.at(slot)
            if ending is Ending.CLOSE:
                lanes.end(sequence, Closed.CLIENT, "its writer closed it")
            else:
                lanes.part(sequence, Closed.PARKED)
        for number, steps in _drain(scheduler.dropped):
            stream = lanes.stream(number)
            if stream is not None:
                stream.finish_steps(steps)

    def _pump(self) -> None:
        """Start the next run, if there is one."""
        self._is_pump_due = False
        if self._is_in_flight:
            return
        run = self._scheduler.next_run()
        self.settle()
        if run is None:
            self._idle.set()
            return
        self._metrics.run_started(time.monotonic() - run.arrived)
        sequences, steps = run.inputs[0].shape[:2]
        if self._engine.estimate(sequences, steps) <= _INLINE_SECONDS_MAX:
            self._apply_all(self._execute(run))
            return
        self._is_in_flight = True
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._execute, run)
        future.add_done_callback(self._land)

    def _execute(self, run: Run) -> list[Outcome]:
        try:
            return self._engine.execute(run)
        except Exception:
            # A defect of ours: its rows get a fault, the server goes on.
            log.exception("run_broke")
            return [self._engine.failed(run, 0.0)]

    def _land(self, future: "asyncio.Future[list[Outcome]]") -> None:
        """Apply a run that was in flight, then what waited for that instant."""
        self._is_in_flight = False
        self._apply_all(future.result())
        waiting, self._waiting = self._waiting, []
        for act in waiting:
            act()
        self.settle()

    def _apply_all(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._apply(outcome)
        self.settle()
        if self._scheduler.has_ready:
            self.wake()

    def _apply(self, outcome: Outcome) -> None:
        """Make a run's states the sequences' own and hand its outputs to their streams."""
        run, applied = outcome.run, outcome.is_applied
        table = self._sequences
        self._give_back_credit(run)
        slots, lengths = run.slots, run.lengths
        if outcome.error is None:
            self._arena.put(slots, outcome.states)
        elif applied.any():
            self._arena.put(slots[applied], outcome.states[applied])
        table.step[slots] += np.where(applied, lengths, 0)
        table.active[slots] = self._clock.now()
        self._scheduler.finish(run, applied)
        if outcome.outputs:
            self._deliver(outcome)
        if outcome.error is None:
            self._metrics.run_ended(
                sequences=len(slots),
                steps=int(lengths.sum()),
                cells=run.inputs[0].shape[0] * run.inputs[0].shape[1],
                seconds=outcome.seconds,
            )
        else:
            self._metrics.run_failed()
            for slot in slots[~applied].tolist():
                self._lanes.fault(slot, outcome.error)

    def _give_back_credit(self, run: Run) -> None:
        streams = self._sequences.stream[run.slots]
        for number in np.unique(streams).tolist():
            stream = self._lanes.stream(number)
            if stream is not None:
                stream.finish_steps(int(run.lengths[streams == number].sum()))

    def _deliver(self, outcome: Outcome) -> None:
        """Cut a run's outputs at the borders between streams: it is ordered by stream."""
        run, applied = outcome.run, outcome.is_applied
        flat = [unpad(output, run.lengths) for output in outcome.outputs]
        slots, first, lengths = run.slots, run.first, run.lengths
        if outcome.error is not None:
            rows = np.repeat(applied, lengths)
            flat = [array[rows] for array in flat]
            slots, first, lengths = slots[applied], first[applied], lengths[applied]
            if not len(slots):
                return
        table = self._sequences
        streams = table.stream[slots]
        lanes = table.lane[slots]
        generations = table.generation[slots]
        ends = np.cumsum(lengths)
        starts = np.flatnonzero(np.r_[True, streams[1:] != streams[:-1]]).tolist()
        for start, stop in zip(starts, [*starts[1:], len(slots)], strict=True):
            row_start = int(ends[start] - lengths[start])
            row_stop = int(ends[stop - 1])
            delivery = Delivery(
                slots[start:stop],
                generations[start:stop],
                lanes[start:stop],
                first[start:stop],
                lengths[start:stop],
                [array[row_start:row_stop].tobytes() for array in flat],
            )
            stream = self._lanes.stream(int(streams[start]))
            if stream is None:
                self._lanes.hold(delivery)
            else:
                stream.send(delivery)
        self._metrics.delivered(time.monotonic() - run.arrived)


def _drain(items: "list[T]") -> "list[T]":
    """The items, taken out of their list."""
    taken = items.copy()
    items.clear()
    return taken
