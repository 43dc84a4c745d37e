"""The chunks that wait, one queue a sequence, kept in arrays: no Python object per chunk.

A node is a chunk, a chunk that is known to be bad, a close or a park; `following`
links it by index to the next one of its sequence.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from sluice_service.arena import Slots
from sluice_service.errors import LaneError
from sluice_service.inputs import InputRules
from sluice_service.ragged import Array, Buffers, Integers
from sluice_service.sequences import NONE

_NODES_START = 1024


@dataclass(slots=True)
class Frame:
    """What came in one message: chunks, and the rows they are made of."""

    stream: int
    lanes: Integers  # [chunks]
    slots: Slots  # [chunks]
    steps: Integers  # [chunks]
    starts: Integers  # [chunks] where each begins in the arrays
    first: Integers | None  # [chunks] the steps before each, where the client named them
    arrays: list[Array]  # [rows, …] for each model input
    # Of chunks, by index, that cannot be applied; None until somebody has looked.
    errors: dict[int, LaneError] | None
    steps_each: int  # what every chunk has; 0 where they differ
    arrived: float  # seconds, time.monotonic
    # Chunks in queues; at 0 the frame is forgotten.
    pending: int = 0


@dataclass(slots=True)
class Single:
    """What came in one message of one chunk, in which nothing is out of the ordinary."""

    stream: int
    lane: int
    slot: int
    steps: int
    first: int  # the steps before it, or NONE where the client did not say
    data: Buffers  # the rows for each model input, checked
    arrived: float  # seconds, time.monotonic

    def as_frame(self, rules: InputRules) -> Frame:
        """The same as a frame."""
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
    """What a node is."""

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
        self.row = np.zeros(_NODES_START, np.int64)  # where in the frame it begins
        self.first = np.zeros(_NODES_START, np.int64)  # steps before it
        self.steps = np.zeros(_NODES_START, np.int64)
        self.is_named = np.zeros(_NODES_START, np.bool_)  # the client gave its first step
        self.following = np.zeros(_NODES_START, np.int64)
        self._free = np.arange(_NODES_START - 1, -1, -1)
        self._free_count = _NODES_START
        self.errors: dict[int, LaneError] = {}
        self.frames: dict[int, Frame] = {}
        self._frame_number = 0

    def add(self, frame: Frame) -> Integers:
        """New nodes [chunks] for the chunks of a frame, on no queue yet."""
        frame.pending = len(frame.slots)
        number = self._frame_number = self._frame_number + 1
        self.frames[number] = frame
        nodes = self._allocate(frame.pending)
        self.kind[nodes] = Kind.CHUNK
        self.frame[nodes] = number
        self.row[nodes] = frame.starts
        self.steps[nodes] = frame.steps
        self.is_named[nodes] = frame.first is not None
        for index, error in (frame.errors or {}).items():
            node = int(nodes[index])
            self.kind[node] = Kind.FAULTY
            self.errors[node] = error
        return nodes

    def add_ending(self, kind: Kind) -> Integers:
        """One new node [1] that closes or parks."""
        node = self._allocate(1)
        self.kind[node] = kind
        self.frame[node] = NONE
        self.steps[node] = 0
        self.is_named[node] = False
        return node

    def append(self, slots: Slots, nodes: Integers) -> Slots:
        """Put one node [n] behind the queue of each of `slots` [n], all different.

        Returns those whose queue was empty.
        """
        self.following[nodes] = NONE
        tails = self._tail[slots]
        self._tail[slots] = nodes
        was_empty = tails == NONE
        if was_empty.all():
            self.head[slots] = nodes
            return slots
        self.following[tails[~was_empty]] = nodes[~was_empty]
        slots = slots[was_empty]
        self.head[slots] = nodes[was_empty]
        return slots

    def pop(self, slots: Slots) -> None:
        """Take the first node off the queue of each of `slots`, all different."""
        nodes = self.head[slots]
        heads = self.following[nodes]
        self.head[slots] = heads
        self._tail[slots[heads == NONE]] = NONE
        self._release(nodes)

    def consume(self, nodes: Integers, steps: Integers) -> None:
        """Leave out the first `steps` [n] of each chunk: they are applied."""
        self.row[nodes] += steps
        self.first[nodes] += steps
        self.steps[nodes] -= steps

    def clear(self, slot: int) -> int:
        """Empty one queue; the steps that were in it."""
        steps = 0
        while (node := int(self.head[slot])) != NONE:
            steps += int(self.steps[node])
            self.pop(np.array([slot]))
        return steps

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
        """Forget a frame once none of its chunks is left."""
        if number == NONE:
            return
        frame = self.frames[number]
        frame.pending -= chunks
        if not frame.pending:
            del self.frames[number]

    def _grow(self) -> None:
        """Double the nodes."""
        count = len(self.kind)

        def double(column: NDArray[np.generic]) -> NDArray[np.generic]:
            return np.concatenate([column, np.zeros_like(column)])

        for name in ("kind", "frame", "row", "first", "steps", "is_named", "following", "_free"):
            setattr(self, name, double(getattr(self, name)))
        self._free[self._free_count : self._free_count + count] = np.arange(count, 2 * count)
        self._free_count += count
