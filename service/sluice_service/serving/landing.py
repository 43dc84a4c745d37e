"""Applies the outcome of a run: states and steps to the table, outputs to the streams."""

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sluice_service.arrays import unpad
from sluice_service.batching.engine import Outcome
from sluice_service.batching.run import Run
from sluice_service.batching.scheduler import Ending, Scheduler
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.events import EndReason, Outputs
from sluice_service.sequences.states import Slots
from sluice_service.sequences.stream import Streams
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.attachments import Attachments
from sluice_service.serving.faults import Faults
from sluice_service.serving.outputs import OutputBuffer

T = TypeVar("T")


class Landing:
    """Applies the runs of one model. Before that, a run has changed nothing."""

    def __init__(
        self,
        table: SequenceTable,
        streams: Streams,
        scheduler: Scheduler,
        attachments: Attachments,
        outputs: OutputBuffer,
        faults: Faults,
        metrics: ModelMetrics,
    ) -> None:
        self._table = table
        self._streams = streams
        self._scheduler = scheduler
        self._attachments = attachments
        self._outputs = outputs
        self._faults = faults
        self._metrics = metrics
        # Called with the slots [batch] of each run that was applied.
        self.on_applied: Callable[[Slots], None] | None = None

    def apply(self, run: Run, outcome: Outcome) -> None:
        """Store a run's states and hand its outputs to their streams."""
        began = time.monotonic()
        slots = run.slots
        is_applied: NDArray[np.bool_] | None = None
        if outcome.errors:
            is_applied = np.ones(len(slots), np.bool_)
            is_applied[list(outcome.errors)] = False
        self._table.apply(slots, run.first + run.lengths, outcome.states, is_applied)
        self._scheduler.finish(run, is_applied)
        if self.on_applied is not None:
            self.on_applied(slots)
        steps = self._deliver(run, outcome, is_applied)
        for index, error in outcome.errors.items():
            self._faults.stop(int(slots[index]), error)
        cells = run.inputs[0].shape[0] * run.inputs[0].shape[1]
        self._metrics.run_ended(len(slots), steps, cells, outcome.seconds)
        self._metrics.delivered(began, run.arrived, run.weights)

    def settle(self) -> None:
        """Handle what the scheduler has found: faults, endings, steps that will never run."""
        scheduler = self._scheduler
        if scheduler.faults:
            for slot, error in _drain(scheduler.faults):
                self._faults.stop(slot, error)
        if scheduler.endings:
            for slot, ending in _drain(scheduler.endings):
                sequence = self._table.at(slot)
                if ending is Ending.CLOSE:
                    self._attachments.end(sequence, EndReason.CLIENT, "its writer closed it")
                else:
                    self._attachments.park(sequence)
        if scheduler.dropped:
            for number, steps in _drain(scheduler.dropped):
                self._streams.finish_steps(number, steps)

    def _deliver(self, run: Run, outcome: Outcome, is_applied: NDArray[np.bool_] | None) -> int:
        """Cut a run's outputs at the borders between streams. Returns the steps applied."""
        generations = self._table.generation[run.slots]
        each = run.steps_each
        rows = [
            unpad(output, run.lengths, is_whole=bool(each)).tobytes() for output in outcome.outputs
        ]
        ends = np.cumsum(run.lengths) if not each else None
        total = each * len(run.slots) if ends is None else int(ends[-1])
        row_bytes = [len(output) // total for output in rows]
        start = row_start = applied_steps = 0
        for number, stop in run.streams:
            row_stop = stop * each if ends is None else int(ends[stop - 1])
            outputs = Outputs(
                run.slots[start:stop],
                generations[start:stop],
                run.lanes[start:stop],
                run.first[start:stop],
                run.lengths[start:stop],
                row_stop - row_start,
                [
                    output[row_start * size : row_stop * size]
                    for output, size in zip(rows, row_bytes, strict=True)
                ],
            )
            self._streams.finish_steps(number, outputs.rows)
            if is_applied is not None:
                outputs = outputs.only(is_applied[start:stop])
            if outputs.rows:
                self._outputs.deliver(outputs, number)
            applied_steps += outputs.rows
            start, row_start = stop, row_stop
        return applied_steps


def _drain(items: list[T]) -> list[T]:
    """Take the items out of their list."""
    taken = items.copy()
    items.clear()
    return taken
