"""The direct path: makes a run of all chunks that have arrived, without queues.

If every chunk that arrived since the last run is the next one of its sequence, and all are equally
long, they become the next run. Closed-loop traffic always does. The cost is a few array operations
per run for any number of sequences.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from sluice_service.arrays import Array, Buffers, Integers, is_distinct, ones
from sluice_service.batching.inputs import InputRules
from sluice_service.batching.queues import Frame, Single
from sluice_service.batching.run import Run, RunSizes
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import NONE, SequenceTable


class DirectPath:
    """Chunks that have arrived and are in no queue yet."""

    def __init__(self, table: SequenceTable, rules: InputRules, sizes: RunSizes) -> None:
        self._table = table
        self._rules = rules
        self._sizes = sizes
        # Either messages of one chunk with the same steps, or frames.
        self._singles: list[Single] = []
        self._frames: list[Frame] = []
        self._rank = np.zeros(table.slots, np.int64)  # scratch

    def __bool__(self) -> bool:
        return bool(self._singles or self._frames)

    def push(self, frame: Frame) -> None:
        """Take in the chunks of a message."""
        self._as_frames()
        self._frames.append(frame)

    def push_single(self, single: Single) -> None:
        """Take in a message of one chunk."""
        singles = self._singles
        if self._frames or (singles and singles[0].steps != single.steps):
            self.push(single.as_frame(self._rules))
        else:
            singles.append(single)

    def take(self) -> list[Frame]:
        """Take out everything that has arrived."""
        self._as_frames()
        frames, self._frames = self._frames, []
        return frames

    def compose(self) -> Run | None:
        """The next run, of all chunks that have arrived; None if they need the queues.

        None changes nothing.
        """
        if self._singles:
            return self._compose_singles()
        return self._compose_frames() if self._frames else None

    def _as_frames(self) -> None:
        """Convert all messages of one chunk to frames."""
        if self._singles:
            self._frames += [single.as_frame(self._rules) for single in self._singles]
            self._singles = []

    def _compose_singles(self) -> Run | None:
        """A run of messages of one chunk; None if one is not the next of its sequence."""
        singles, table = self._singles, self._table
        count, steps = len(singles), singles[0].steps
        if not self._fits(count, steps):
            return None
        slots = np.array([single.slot for single in singles])
        step = table.step[slots]
        if count == 1:
            # Plain numbers: arrays of one element cost ten times as much.
            slot, named, now = singles[0].slot, singles[0].first, int(step[0])
            is_next = table.is_direct[slot] and now + steps <= table.limit[slot]
            if not is_next or named not in (NONE, now):
                return None
        else:
            first = np.array([single.first for single in singles])
            if not self._are_next(slots, step, steps):
                return None
            if ((first != step) & (first != NONE)).any():
                return None
        data = singles[0].data if count == 1 else _join([single.data for single in singles])
        rows = self._rules.as_rows(data)
        if not self._rules.are_fine(rows):
            return None
        self._singles = []
        streams = _borders([(single.stream, end) for end, single in enumerate(singles, 1)])
        arrived = [single.arrived for single in singles]
        lanes = np.array([single.lane for single in singles])
        return self._run(slots, step, steps, rows, lanes, streams, arrived, [1] * count)

    def _compose_frames(self) -> Run | None:
        """A run of frames; None if a chunk is not the next one of its sequence."""
        frames, table = self._frames, self._table
        steps = frames[0].steps_each
        for frame in frames:
            if frame.errors or frame.steps_each != steps:
                return None
        weights = [len(frame.slots) for frame in frames]
        if not self._fits(sum(weights), steps):
            return None
        slots = _concatenate([frame.slots for frame in frames])
        step = table.step[slots]
        if not self._are_next(slots, step, steps):
            return None
        ends = list(itertools.accumulate(weights))
        for frame, end in zip(frames, ends, strict=True):
            first = frame.first
            if first is not None and (first != step[end - len(first) : end]).any():
                return None
        rows = [_concatenate(arrays) for arrays in zip(*[f.arrays for f in frames], strict=True)]
        if not self._rules.are_fine(rows):
            return None
        self._frames = []
        streams = _borders([(frame.stream, end) for frame, end in zip(frames, ends, strict=True)])
        arrived = [frame.arrived for frame in frames]
        lanes = _concatenate([frame.lanes for frame in frames])
        return self._run(slots, step, steps, rows, lanes, streams, arrived, weights)

    def _fits(self, count: int, steps: int) -> bool:
        """True if one run may have that many chunks of that many steps."""
        if not 1 <= steps <= min(self._sizes.steps_max, self._rules.chunk_steps_max):
            return False
        is_small = steps == 1 or count * steps <= self._sizes.cells_max
        return is_small and count <= self._sizes.sequences_max

    def _are_next(self, slots: Slots, step: Integers, steps: int) -> bool:
        """True if `slots` [n] are all different, wait for nothing and may run `steps`."""
        table = self._table
        return (
            bool(table.is_direct[slots].all())
            and is_distinct(slots, self._rank)
            and not (step + steps > table.limit[slots]).any()
        )

    def _run(
        self,
        slots: Slots,
        step: Integers,
        steps: int,
        rows: list[Array],
        lanes: Integers,
        streams: list[tuple[int, int]],
        arrived: list[float],
        weights: list[int],
    ) -> Run:
        """A run of chunks of `steps` steps that were in no queue; `rows` [n × steps, …]."""
        count = len(slots)
        self._table.note_direct(slots, step + steps)
        lengths = ones(count) if steps == 1 else np.full(count, steps)
        inputs = [array.reshape(count, steps, *array.shape[1:]) for array in rows]
        return Run(slots, None, step, lengths, steps, inputs, lanes, streams, arrived, weights)


def _join(parts: Sequence[Buffers]) -> list[bytes]:
    """The rows for each input, of several messages."""
    return [b"".join(rows) for rows in zip(*parts, strict=True)]


def _borders(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The streams of consecutive parts and their ends; adjacent parts of a stream are merged."""
    following = [number for number, _ in parts[1:]]
    return [part for part, after in zip(parts, [*following, None], strict=True) if part[0] != after]


def _concatenate(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
