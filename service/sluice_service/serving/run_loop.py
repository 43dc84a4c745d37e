"""The run loop: when a run ends, the next one takes everything that is ready."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

import structlog

from sluice_service.batching.arrivals import Arrivals
from sluice_service.batching.engine import Outcome
from sluice_service.batching.run import Run
from sluice_service.batching.scheduler import Scheduler
from sluice_service.batching.versions import Versions
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.stream import Streams
from sluice_service.serving.landing import Landing

log = structlog.get_logger()
T = TypeVar("T")

# Shorter runs are executed on the event loop, because a thread would cost more than it gains.
# With only one stream, there is little other work during a run.
_INLINE_SECONDS_MAX = 0.0003
_INLINE_ALONE_SECONDS_MAX = 0.003
# If several runs may be in flight, a run of at least two such parts is split.
_PART_SECONDS_MIN = 0.001


class RunLoop:
    """Takes runs from the scheduler, executes them, and lands their outcomes."""

    def __init__(
        self,
        scheduler: Scheduler,
        versions: Versions,
        landing: Landing,
        streams: Streams,
        metrics: ModelMetrics,
        executor: Executor,
        *,
        runs_at_once_max: int,
    ) -> None:
        self._scheduler = scheduler
        self._versions = versions
        self._landing = landing
        self._streams = streams
        self._metrics = metrics
        self._executor = executor
        self._runs_at_once_max = runs_at_once_max
        self._in_flight = 0
        self._is_pump_due = False
        self._arrivals = Arrivals()
        self._waiting: list[Callable[[], None]] = []
        self._idle = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """True if nothing runs and nothing can."""
        return not self._in_flight and not self._scheduler.has_ready

    async def idle(self) -> None:
        """Return when nothing runs and nothing can."""
        while not self.is_idle:
            self._idle.clear()
            self._pump_soon()
            await self._idle.wait()

    def wake(self, *, is_alone: bool = False) -> None:
        """Chunks have arrived: start a run after this turn of the event loop.

        Chunks that arrive in the same turn join the run. If waiting has helped before, so do
        those of a few more turns. A single stream (`is_alone`) does not wait.
        """
        self._arrivals.count += 1
        if is_alone and not self._is_pump_due and not self._arrivals.may_bring_more():
            self._pump()
        else:
            self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._is_pump_due and self._may_start:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump_unless_more)

    def _pump_unless_more(self) -> None:
        if self._arrivals.may_bring_more():
            asyncio.get_running_loop().call_soon(self._pump_unless_more)
        else:
            self._pump()

    @property
    def _may_start(self) -> bool:
        """False while the most runs are in flight, or while an action waits for their end."""
        return self._in_flight < self._runs_at_once_max and not self._waiting

    def settle(self) -> None:
        """Handle what was found since the last run; for callers outside of a run."""
        self._landing.settle()

    async def between_runs(self, action: Callable[[], T]) -> T:
        """Call `action` at an instant when no run is in flight. Returns its result."""
        if not self._in_flight:
            done = action()
            self._landing.settle()
            return done
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def act() -> None:
            if result.cancelled():  # its stream has ended
                return
            try:
                result.set_result(action())
            except Exception as error:
                result.set_exception(error)

        self._waiting.append(act)
        return await result

    def _pump(self) -> None:
        """Start the next run, if there is one and it may start."""
        self._is_pump_due = False
        if not self._may_start:
            return
        began = time.monotonic()
        run = self._scheduler.next_run()
        self._landing.settle()
        if run is None:
            if not self._in_flight:
                self._idle.set()
            return
        self._metrics.run_started(began, run.arrived, run.weights)
        sequences, steps = run.inputs[0].shape[:2]
        is_alone = len(self._streams) == 1
        inline_max = _INLINE_ALONE_SECONDS_MAX if is_alone else _INLINE_SECONDS_MAX
        estimate = self._versions.estimate(sequences, steps)
        if estimate <= inline_max:
            self._land(run, self._execute(run))
            return
        parts = min(
            self._runs_at_once_max - self._in_flight, sequences, estimate // _PART_SECONDS_MIN
        )
        for part in run.split(int(parts)) if parts > 1 else [run]:
            self._start(part)
        if self._scheduler.has_ready:
            self._pump_soon()

    def _start(self, run: Run) -> None:
        """Execute a run in a thread."""
        self._in_flight += 1
        self._scheduler.set_apart(run)
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._execute, run)
        future.add_done_callback(lambda done: self._land(run, done.result()))

    def _execute(self, run: Run) -> Outcome:
        try:
            return self._versions.execute(run)
        except Exception:
            # A defect of the server: the rows get a fault, and the server continues.
            log.exception("run_broke")
            return self._versions.failed(run)

    def _land(self, run: Run, outcome: Outcome) -> None:
        """Apply a run, then the actions that waited for an instant between runs."""
        if run.is_apart:
            self._in_flight -= 1
        self._landing.apply(run, outcome)
        self._landing.settle()
        if self._waiting and not self._in_flight:
            waiting, self._waiting = self._waiting, []
            for act in waiting:
                act()
            self._landing.settle()
        if self._scheduler.has_ready:
            self._pump_soon()
        elif not self._in_flight:
            self._idle.set()
