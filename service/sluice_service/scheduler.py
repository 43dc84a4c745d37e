"""Decides which chunks go into the next run: queues of all lanes, kept in arrays.

Every sequence has a queue of nodes, linked by index through `_next`: a chunk, a
chunk that is known to be bad, a close or a park. A sequence that can run stands
once in the ring of the ready. Nothing here costs a Python object per chunk but
what is out of the ordinary.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum, auto

import numpy as np
from numpy.typing import NDArray

from sluice_service.arena import Slots
from sluice_service.errors import GapError, LaneError
from sluice_service.ragged import Array, Frame, choose_steps, pad_frames
from sluice_service.sequences import NONE, Sequences

Integers = NDArray[np.int64]

_NODES_START = 1024


class Kind(IntEnum):
    """What a node in a queue is."""

    CHUNK = 0
    FAULTY = 1  # a chunk with an error of its own
    CLOSE = 2
    PARK = 3


class Ending(Enum):
    """What a lane asked for after its chunks."""

    CLOSE = auto()
    PARK = auto()


@dataclass(slots=True)
class Run:
    """One call of the model: `batch` sequences, each `lengths[b]` steps on."""

    slots: Slots  # [batch]
    nodes: Integers  # [batch] the chunks the steps come from
    first: Integers  # [batch] steps applied before
    lengths: Integers  # [batch]
    inputs: list[Array]  # [batch, steps, …] each
    arrived: NDArray[np.float64]  # [batch] when each chunk's message came

    def part(self, chosen: Integers | slice) -> "Run":
        """The run of some of its rows."""
        return Run(
            self.slots[chosen],
            self.nodes[chosen],
            self.first[chosen],
            self.lengths[chosen],
            [array[chosen] for array in self.inputs],
            self.arrived[chosen],
        )


class Scheduler:
    """The queues of one model's lanes."""

    def __init__(
        self,
        sequences: Sequences,
        slots: int,
        *,
        run_sequences_max: int,
        run_steps_max: int,
        run_cells_max: int,
        unacknowledged_steps_max: int,
    ) -> None:
        self._sequences = sequences
        self._run_sequences_max = run_sequences_max
        self._run_steps_max = run_steps_max
        self._run_cells_max = run_cells_max  # sequences × steps
        self._unacknowledged_steps_max = unacknowledged_steps_max
        # By slot.
        self._head = np.full(slots, NONE, np.int64)
        self._tail = np.full(slots, NONE, np.int64)
        self._is_ready = np.zeros(slots, np.bool_)  # stands in the ring
        self._is_stalled = np.zeros(slots, np.bool_)  # waits for acknowledgements
        self._rank = np.zeros(slots, np.int64)  # scratch
        # By node.
        self._kind = np.zeros(_NODES_START, np.int8)
        self._slot = np.zeros(_NODES_START, np.int64)
        self._frame = np.zeros(_NODES_START, np.int64)
        self._row = np.zeros(_NODES_START, np.int64)
        self._first = np.zeros(_NODES_START, np.int64)
        self._steps = np.zeros(_NODES_START, np.int64)
        self._is_named = np.zeros(_NODES_START, np.bool_)
        self._next = np.zeros(_NODES_START, np.int64)
        self._free_nodes = np.arange(_NODES_START - 1, -1, -1)
        self._free_count = _NODES_START
        self._errors: dict[int, LaneError] = {}
        self._frames: dict[int, Frame] = {}
        self._frame_number = 0
        # The ring: every slot at most once, so it never overflows.
        self._ring = np.zeros(slots, np.int64)
        self._ring_start = 0
        self._ring_count = 0
        # What came to light while choosing a run; the host takes it from here.
        self.faults: list[tuple[int, LaneError]] = []
        self.endings: list[tuple[int, Ending]] = []
        self.dropped: list[tuple[int, int]] = []  # (stream, steps) that will never run

    @property
    def has_ready(self) -> bool:
        """True when some sequence may be able to run."""
        return self._ring_count > 0

    # Filling the queues.

    def push(
        self,
        slots: Slots,
        steps: Integers,
        starts: Integers,
        first: Integers | None,
        frame: Frame,
        errors: dict[int, LaneError],
    ) -> None:
        """Queue chunks: of `slots` [chunks], `steps` each, their rows from `starts` in `frame`.

        `first` [chunks] is what the client named, or None; `errors` are chunks,
        by index, that must be refused when their turn comes.
        """
        count = len(slots)
        number = self._frame_number = self._frame_number + 1
        self._frames[number] = frame
        frame.pending = count
        nodes = self._allocate(count)
        self._kind[nodes] = Kind.CHUNK
        for index, error in errors.items():
            self._kind[nodes[index]] = Kind.FAULTY
            self._errors[int(nodes[index])] = error
        self._slot[nodes] = slots
        self._frame[nodes] = number
        self._row[nodes] = starts
        self._steps[nodes] = steps
        self._is_named[nodes] = first is not None
        for chosen in self._rounds(slots):
            self._link(slots[chosen], nodes[chosen], None if first is None else first[chosen])

    def push_ending(self, slot: int, kind: Kind) -> None:
        """Queue a close or a park behind what the lane has sent."""
        node = self._allocate(1)
        self._kind[node] = kind
        self._slot[node] = slot
        self._steps[node] = 0
        self._frame[node] = NONE
        self._is_named[node] = False
        self._link(np.array([slot]), node, None)

    def acknowledged(self, slots: Slots) -> None:
        """Let the sequences go on whose client has caught up."""
        waiting = slots[self._is_stalled[slots]]
        if len(waiting):
            waiting = np.unique(waiting)
            self._is_stalled[waiting] = False
            self._make_ready(waiting)

    def is_stuck(self, slots: Slots) -> bool:
        """True when every queue of `slots` is empty or waits for acknowledgements."""
        return bool(((self._head[slots] == NONE) | self._is_stalled[slots]).all())

    def drop(self, slot: int) -> None:
        """Forget everything queued for a slot."""
        node = int(self._head[slot])
        steps = 0
        while node != NONE:
            steps += int(self._steps[node])
            following = int(self._next[node])
            self._release(np.array([node]))
            node = following
        self._head[slot] = self._tail[slot] = NONE
        self._is_stalled[slot] = False
        if steps:
            self.dropped.append((int(self._sequences.stream[slot]), steps))

    def _rounds(self, slots: Slots) -> list[Integers | slice]:
        """Indices into `slots` in rounds, none naming a slot twice, in order for each slot."""
        order = np.arange(len(slots))
        self._rank[slots] = order
        if (self._rank[slots] == order).all():
            return [slice(None)]
        by_slot = np.argsort(slots, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(slots[by_slot]) != 0])
        lengths = np.diff(np.r_[starts, len(slots)])
        rank = order - np.repeat(starts, lengths)
        return [by_slot[rank == number] for number in range(int(lengths.max()))]

    def _link(self, slots: Slots, nodes: Integers, first: Integers | None) -> None:
        """Append one node to the queue of each of `slots`, all different."""
        sent = self._sequences.sent
        self._first[nodes] = sent[slots] if first is None else first
        sent[slots] = self._first[nodes] + self._steps[nodes]
        self._next[nodes] = NONE
        tails = self._tail[slots]
        was_empty = tails == NONE
        self._tail[slots] = nodes
        if was_empty.all():
            self._head[slots] = nodes
            self._make_ready(slots)
        else:
            self._head[slots[was_empty]] = nodes[was_empty]
            self._next[tails[~was_empty]] = nodes[~was_empty]
            self._make_ready(slots[was_empty])

    def _make_ready(self, slots: Slots) -> None:
        """Put slots at the end of the ring, but those that stand in it."""
        already = self._is_ready[slots]
        if already.any():
            slots = slots[~already]
        self._is_ready[slots] = True
        start = (self._ring_start + self._ring_count) % len(self._ring)
        room = len(self._ring) - start
        self._ring[start : start + len(slots)] = slots[:room]
        if len(slots) > room:
            self._ring[: len(slots) - room] = slots[room:]
        self._ring_count += len(slots)

    def _take_ready(self, count: int) -> Slots:
        """The first `count` slots of the ring, taken out of it."""
        end = self._ring_start + count
        slots = self._ring[self._ring_start : end].copy()
        if end > len(self._ring):
            slots = np.r_[slots, self._ring[: end - len(self._ring)]]
        self._ring_start = end % len(self._ring)
        self._ring_count -= count
        self._is_ready[slots] = False
        return slots

    # Choosing a run.

    def next_run(self) -> Run | None:
        """The next run, or None. Faults and endings met on the way are left in the lists."""
        while self._ring_count:
            slots = self._take_ready(min(self._ring_count, self._run_sequences_max))
            slots = slots[self._head[slots] != NONE]
            slots = self._drop_unrunnable(slots)
            if len(slots):
                return self._compose(slots)
        return None

    def _drop_unrunnable(self, slots: Slots) -> Slots:
        """Those of `slots` whose queue begins with steps that can be applied now."""
        sequences = self._sequences
        nodes = self._head[slots]
        step = sequences.step[slots]
        is_odd = (
            (self._kind[nodes] != Kind.CHUNK)
            | (self._first[nodes] != step)
            | sequences.is_faulted[slots]
        )
        if is_odd.any():
            runnable = ~is_odd
            for index in np.flatnonzero(is_odd).tolist():
                runnable[index] = self._judge(int(slots[index]))
            slots = slots[runnable]
            step = step[runnable]
        is_stalled = step - sequences.received[slots] >= self._unacknowledged_steps_max
        if is_stalled.any():
            self._is_stalled[slots[is_stalled]] = True
            slots = slots[~is_stalled]
        return slots

    def _judge(self, slot: int) -> bool:
        """Work off the head of one queue until a chunk can be applied; False if none can.

        `first_step` is judged here, when the state is taken, not on arrival:
        steps already applied are skipped, a gap is one fault, and what follows
        a fault is dropped until a chunk names the expected step.
        """
        sequences = self._sequences
        step = int(sequences.step[slot])
        while (node := int(self._head[slot])) != NONE:
            kind = self._kind[node]
            if kind in (Kind.CLOSE, Kind.PARK):
                self._pop(slot)
                self.endings.append((slot, Ending.CLOSE if kind == Kind.CLOSE else Ending.PARK))
                return False
            first = int(self._first[node])
            is_expected = first <= step and (
                bool(self._is_named[node]) or not sequences.is_faulted[slot]
            )
            if kind == Kind.FAULTY:
                error = self._errors[node]
                if is_expected or not sequences.is_faulted[slot]:
                    self.faults.append((slot, error))
                    sequences.is_faulted[slot] = True
                self._pop(slot, unused=True)
            elif is_expected and first + int(self._steps[node]) > step:
                sequences.is_faulted[slot] = False
                self._skip(node, step - first)
                return True
            else:
                if first > step and not sequences.is_faulted[slot]:
                    self.faults.append((slot, _gap(first, step)))
                    sequences.is_faulted[slot] = True
                self._pop(slot, unused=True)
        return False

    def _compose(self, slots: Slots) -> Run:
        """A run of the first chunk of each slot, ordered by stream, cut to little padding."""
        sequences = self._sequences
        streams = sequences.stream[slots]
        if (streams != streams[0]).any():
            slots = slots[np.argsort(streams, kind="stable")]
        nodes = self._head[slots]
        step = sequences.step[slots]
        room = sequences.received[slots] + self._unacknowledged_steps_max - step
        lengths = np.minimum(self._steps[nodes], room)
        steps_max = min(self._run_steps_max, max(1, self._run_cells_max // len(slots)))
        lengths = np.minimum(lengths, steps_max)
        steps = choose_steps(lengths)
        lengths = np.minimum(lengths, steps)
        sequences.is_running[slots] = True
        numbers = self._frame[nodes]
        if (numbers == numbers[0]).all():
            frames = [self._frames[int(numbers[0])]]
            which = np.zeros(len(slots), np.int64)
            arrived = np.full(len(slots), frames[0].arrived)
        else:
            distinct, which = np.unique(numbers, return_inverse=True)
            frames = [self._frames[number] for number in distinct.tolist()]
            arrived = np.array([frame.arrived for frame in frames])[which]
        inputs = pad_frames(frames, which, self._row[nodes], lengths, steps)
        return Run(slots, nodes, step, lengths, inputs, arrived)

    # After a run.

    def finish(self, run: Run, is_applied: NDArray[np.bool_]) -> None:
        """Take what was run off the queues and let the sequences that have more stand again.

        Chunks of rows that were not applied are dropped whole.
        """
        slots, nodes = run.slots, run.nodes
        self._sequences.is_running[slots] = False
        is_there = self._head[slots] == nodes  # a lane may have ended meanwhile
        if not is_there.all():
            slots, nodes, is_applied = slots[is_there], nodes[is_there], is_applied[is_there]
            lengths = run.lengths[is_there]
        else:
            lengths = run.lengths
        remaining = np.where(is_applied, self._steps[nodes] - lengths, 0)
        for index in np.flatnonzero(~is_applied).tolist():
            slot = int(slots[index])
            unused = int(self._steps[nodes[index]] - lengths[index])
            if unused:
                self.dropped.append((int(self._sequences.stream[slot]), unused))
        self._row[nodes] += lengths
        self._first[nodes] += lengths
        self._steps[nodes] = remaining
        done = remaining == 0
        following = np.where(done, self._next[nodes], nodes)
        self._head[slots] = following
        is_empty = following == NONE
        self._tail[slots[is_empty]] = NONE
        self._release(nodes[done])
        self._make_ready(slots[~is_empty])

    # Nodes.

    def _allocate(self, count: int) -> Integers:
        while self._free_count < count:
            self._grow()
        self._free_count -= count
        return self._free_nodes[self._free_count : self._free_count + count].copy()

    def _release(self, nodes: Integers) -> None:
        self._free_nodes[self._free_count : self._free_count + len(nodes)] = nodes
        self._free_count += len(nodes)
        numbers = self._frame[nodes]
        if len(numbers) and (numbers == numbers[0]).all():
            self._leave_frame(int(numbers[0]), len(numbers))
        else:
            for number in numbers.tolist():
                self._leave_frame(number, 1)
        for node in nodes[self._kind[nodes] == Kind.FAULTY].tolist():
            del self._errors[node]

    def _leave_frame(self, number: int, chunks: int) -> None:
        if number == NONE:
            return
        frame = self._frames[number]
        frame.pending -= chunks
        if not frame.pending:
            del self._frames[number]

    def _pop(self, slot: int, *, unused: bool = False) -> None:
        node = int(self._head[slot])
        if unused and self._steps[node]:
            self.dropped.append((int(self._sequences.stream[slot]), int(self._steps[node])))
        self._head[slot] = self._next[node]
        if self._head[slot] == NONE:
            self._tail[slot] = NONE
        self._release(np.array([node]))

    def _skip(self, node: int, steps: int) -> None:
        """Leave out the first `steps` of a chunk: they were applied before."""
        if steps:
            slot = int(self._slot[node])
            self.dropped.append((int(self._sequences.stream[slot]), steps))
            self._row[node] += steps
            self._first[node] += steps
            self._steps[node] -= steps

    def _grow(self) -> None:
        """Double the nodes."""
        count = len(self._kind)
        for name in ("_kind", "_slot", "_frame", "_row", "_first", "_steps", "_is_named", "_next"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._free_nodes = np.concatenate([self._free_nodes, np.zeros_like(self._free_nodes)])
        self._free_nodes[self._free_count : self._free_count + count] = np.arange(count, 2 * count)
        self._free_count += count


def _gap(first: int, step: int) -> GapError:
    return GapError(
        f"the chunk follows {first} steps but {step} are applied; send again from first_step {step}"
    )
