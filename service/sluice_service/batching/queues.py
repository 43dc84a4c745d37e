"""Holds waiting chunks in one queue per sequence, in arrays, without a Python object per chunk.

A node is a chunk, a chunk that is known to be bad, a close or a park; `following`
links it by index to the next one of its sequence.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from sluice_service.arrays import Array, Buffers, Integers, starts_of
from sluice_service.batching.inputs import InputRules
from sluice_service.errors import LaneError
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import NONE

_NODES_START = 1024
# When this many bytes of inputs wait, they are compacted: rows still needed are copied …
_COMPACTED_BYTES_MIN = 64 << 20
# … out of frames of at least this size …
_COMPACTED_FRAME_BYTES_MIN = 64 << 10
# … of which at most one row in so many is still needed.
_SPARSE = 4


@dataclass(slots=True)
class Frame:
    """The chunks of one message, and their rows."""

    stream: int
    lanes: Integers  # [chunks]
    slots: Slots  # [chunks]
    steps: Integers  # [chunks]
    starts: Integers  # [chunks] where each begins in the arrays
    first: Integers | None  # [chunks] the steps before each, if the client named them
    arrays: list[Array]  # [rows, …] for each model input
    # Errors of chunks that cannot be applied, by index; None: not checked yet.
    errors: dict[int, LaneError] | None
    steps_each: int  # of every chunk; 0 if they differ
    arrived: float  # seconds, time.monotonic


@dataclass(slots=True)
class Rows:
    """The part of a frame that is kept while some of its chunks wait."""

    arrays: list[Array]  # [rows, …] for each model input
    bytes: int  # of all arrays
    arrived: float  # seconds, time.monotonic
    pending: int  # chunks in queues; the frame is dropped at 0


@dataclass(slots=True)
class Single:
    """A message of one valid chunk, as plain numbers."""

    stream: int
    lane: int
    slot: int
    steps: int
    first: int  # the steps before it, or NONE if the client did not name them
    data: Buffers  # the rows for each model input, checked
    arrived: float  # seconds, time.monotonic

    def as_frame(self, rules: InputRules) -> Frame:
        """The same chunk as a frame."""
        return Frame(
            self.stream,
            np.array([self.lane]),
            np.array([self.slot]),
            np.array([self.steps]),
            np.zeros(1, np.int64),
            None if self.first == NONE else np.array([self.first]),
            rules.as_rows(self.data),
            None,
            self.steps,
            self.arrived,
        )


class Kind(IntEnum):
    """The kinds of nodes."""

    CHUNK = 0
    FAULTY = 1  # a chunk with an error of its own
    CLOSE = 2
    PARK = 3


class Queues:
    """The queues of all slots, their nodes and the frames their rows lie in."""

    def __init__(self, slots: int) -> None:
        # By slot.
        self.head = np.full(slots, NONE, np.int64)
        self._tail = np.full(slots, NONE, np.int64)
        # By node.
        self.kind = np.zeros(_NODES_START, np.int8)
        self.frame = np.zeros(_NODES_START, np.int64)
        self.row = np.zeros(_NODES_START, np.int64)  # where it begins in the frame
        self.first = np.zeros(_NODES_START, np.int64)  # steps before it
        self.steps = np.zeros(_NODES_START, np.int64)
        self.is_named = np.zeros(_NODES_START, np.bool_)  # the client gave its first step
        self.following = np.zeros(_NODES_START, np.int64)
        self._free = np.arange(_NODES_START - 1, -1, -1)
        self._free_count = _NODES_START
        self.errors: dict[int, LaneError] = {}
        self.frames: dict[int, Rows] = {}
        self._frame_number = 0
        self._bytes = 0  # of all frames
        self._compact_at = _COMPACTED_BYTES_MIN

    def add(self, frame: Frame) -> Integers:
        """New nodes [chunks] for the chunks of a frame, on no queue yet."""
        rows = Rows(frame.arrays, _bytes(frame.arrays), frame.arrived, len(frame.slots))
        number = self._frame_number = self._frame_number + 1
        self.frames[number] = rows
        self._bytes += rows.bytes
        nodes = self._allocate(rows.pending)
        self.kind[nodes] = Kind.CHUNK
        self.frame[nodes] = number
        self.row[nodes] = frame.starts
        self.steps[nodes] = frame.steps
        self.is_named[nodes] = frame.first is not None
        for index, error in (frame.errors or {}).items():
            node = int(nodes[index])
            self.kind[node] = Kind.FAULTY
            self.errors[node] = error
        if self._bytes > self._compact_at:
            self._compact()
        return nodes

    def add_endings(self, kind: Kind, count: int) -> Integers:
        """New nodes [count] that close or park."""
        nodes = self._allocate(count)
        self.kind[nodes] = kind
        self.frame[nodes] = NONE
        self.steps[nodes] = 0
        self.is_named[nodes] = False
        return nodes

    def append(self, slots: Slots, heads: Integers, tails: Integers) -> Slots:
        """Append a chain of nodes, from `heads` [n] to `tails` [n], to the queue of each of `slots`
        [n], which are all different.

        Returns those whose queue was empty.
        """
        self.following[tails] = NONE
        before = self._tail[slots]
        self._tail[slots] = tails
        was_empty = before == NONE
        if was_empty.all():
            self.head[slots] = heads
            return slots
        self.following[before[~was_empty]] = heads[~was_empty]
        slots = slots[was_empty]
        self.head[slots] = heads[was_empty]
        return slots

    def pop(self, slots: Slots) -> None:
        """Remove the first node from the queue of each of `slots`, which are all different."""
        nodes = self.head[slots]
        heads = self.following[nodes]
        self.head[slots] = heads
        self._tail[slots[heads == NONE]] = NONE
        self._release(nodes)

    def pop_one(self, slot: int) -> None:
        """As `pop`, for one queue: plain numbers cost far less than arrays of one element."""
        node = int(self.head[slot])
        following = int(self.following[node])
        self.head[slot] = following
        if following == NONE:
            self._tail[slot] = NONE
        self._free[self._free_count] = node
        self._free_count += 1
        self.errors.pop(node, None)
        self._leave(int(self.frame[node]), 1)

    def consume(self, nodes: Integers, steps: Integers) -> None:
        """Drop the first `steps` [n] of each chunk, which are applied."""
        self.row[nodes] += steps
        self.first[nodes] += steps
        self.steps[nodes] -= steps

    def clear(self, slot: int) -> int:
        """Empty one queue. Returns its steps, counting one for each node without steps."""
        chain = list[int]()
        node = int(self.head[slot])
        while node != NONE:
            chain.append(node)
            node = int(self.following[node])
        if not chain:
            return 0
        self.head[slot] = self._tail[slot] = NONE
        nodes = np.array(chain)
        self._release(nodes)
        return int(np.maximum(self.steps[nodes], 1).sum())

    def _allocate(self, count: int) -> Integers:
        while self._free_count < count:
            self._grow()
        self._free_count -= count
        return self._free[self._free_count : self._free_count + count].copy()

    def _release(self, nodes: Integers) -> None:
        self._free[self._free_count : self._free_count + len(nodes)] = nodes
        self._free_count += len(nodes)
        if self.errors:
            for node in nodes[self.kind[nodes] == Kind.FAULTY].tolist():
                del self.errors[node]
        numbers = self.frame[nodes]
        if len(numbers) and (numbers == numbers[0]).all():
            self._leave(int(numbers[0]), len(numbers))
        else:
            for number in numbers.tolist():
                self._leave(number, 1)

    def _leave(self, number: int, chunks: int) -> None:
        """Drop a frame when none of its chunks is left."""
        if number == NONE:
            return
        rows = self.frames[number]
        rows.pending -= chunks
        if not rows.pending:
            del self.frames[number]
            self._bytes -= rows.bytes
            if not self.frames:
                self._compact_at = _COMPACTED_BYTES_MIN

    def _compact(self) -> None:
        """Copy the rows that are still needed out of frames that are mostly done.

        Otherwise a step that waits for long, such as one of a client that does not acknowledge,
        would keep its whole message in memory.
        """
        is_waiting = self.frame != NONE
        is_waiting[self._free[: self._free_count]] = False
        nodes = np.flatnonzero(is_waiting)
        nodes = nodes[np.argsort(self.frame[nodes], kind="stable")]
        numbers = self.frame[nodes]
        for number, rows in self.frames.items():
            if rows.bytes < _COMPACTED_FRAME_BYTES_MIN:
                continue
            start, end = np.searchsorted(numbers, (number, number + 1))
            mine = nodes[start:end]
            steps = self.steps[mine]
            count = int(steps.sum())
            if any(_SPARSE * count > len(array) for array in rows.arrays):
                continue
            starts = starts_of(steps)
            index = np.repeat(self.row[mine] - starts, steps) + np.arange(count)
            rows.arrays = [array[index] for array in rows.arrays]
            self.row[mine] = starts
            self._bytes -= rows.bytes
            rows.bytes = _bytes(rows.arrays)
            self._bytes += rows.bytes
        # Compact again only after as many bytes have arrived, to keep this cheap.
        self._compact_at = max(_COMPACTED_BYTES_MIN, 2 * self._bytes)

    def _grow(self) -> None:
        """Double the nodes."""
        count = len(self.kind)

        def double(column: NDArray[np.generic]) -> NDArray[np.generic]:
            return np.concatenate([column, np.zeros_like(column)])

        for name in ("kind", "frame", "row", "first", "steps", "is_named", "following", "_free"):
            setattr(self, name, double(getattr(self, name)))
        self._free[self._free_count : self._free_count + count] = np.arange(count, 2 * count)
        self._free_count += count


def _bytes(arrays: list[Array]) -> int:
    return sum(array.nbytes for array in arrays)
