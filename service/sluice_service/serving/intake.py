"""Takes the chunks and ends that streams send, and hands them to the scheduler."""

import time
from collections.abc import Iterable

import numpy as np

from sluice_service.arrays import Array, Buffers, Integers, is_ones, starts_of
from sluice_service.batching.queues import Frame, Kind, Single
from sluice_service.batching.scheduler import Scheduler
from sluice_service.errors import InvalidInputError, LaneError
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.stream import Stream, Streams
from sluice_service.serving.faults import Faults
from sluice_service.serving.run_loop import RunLoop


class Intake:
    """The way of one model's chunks from their streams to the scheduler."""

    def __init__(
        self,
        streams: Streams,
        scheduler: Scheduler,
        runs: RunLoop,
        faults: Faults,
        metrics: ModelMetrics,
    ) -> None:
        self._streams = streams
        self._scheduler = scheduler
        self._runs = runs
        self._faults = faults
        self._metrics = metrics

    def submit(
        self,
        stream: Stream,
        lanes: Integers,
        steps: Integers,
        first: Integers | None,
        inputs: list[Array] | InvalidInputError,
    ) -> None:
        """Queue chunks: `lanes`, `steps` and `first` are [chunks], `inputs` [sum(steps), …] each.

        An InvalidInputError instead of the inputs faults every lane that has a chunk here.
        """
        if stream.is_draining:
            return  # read when the drain began: neither run nor answered
        self._metrics.chunks.add(len(lanes))
        arrived = time.monotonic()
        slots, starts = stream.slots(lanes), starts_of(steps)
        is_whole = int(slots.min()) >= 0
        if not is_whole:
            for lane in set(lanes.tolist()):
                if stream.is_unknown(lane):
                    self._faults.tell_unknown(stream, lane)
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
            each = 0  # rows of other lanes lie between, so use the queues
        stream.queued_steps += total
        self._scheduler.push(
            Frame(stream.number, lanes, slots, steps, starts, first, inputs, errors, each, arrived)
        )
        self._runs.wake(is_alone=len(self._streams) == 1)

    def submit_singles(
        self, stream: Stream, chunks: Iterable[tuple[int, int, int, Buffers]]
    ) -> None:
        """Queue single chunks: of each its lane, its steps, the steps before it
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
                self._faults.tell_unknown(stream, lane)
        self._runs.wake(is_alone=len(self._streams) == 1)

    def end_after(self, stream: Stream, lanes: Integers, kind: Kind) -> None:
        """Close or park `lanes` [n] after the chunks that they have sent."""
        if stream.is_draining:
            return
        slots = stream.slots(lanes)
        for lane in lanes[slots < 0].tolist():
            if stream.is_unknown(lane):
                self._faults.tell_unknown(stream, lane)
        slots = np.unique(slots[slots >= 0])
        if len(slots):
            stream.queued_steps += len(slots)
            self._scheduler.push_endings(slots, kind)
            self._runs.wake()
