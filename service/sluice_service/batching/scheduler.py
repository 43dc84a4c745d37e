"""Decides which chunks go into the next run.

If possible, all arrived chunks become the next run (`direct`). Otherwise they go through the
queues. Each sequence that can run is once in a ring. A run takes sequences from the front of the
ring and is cut so that little padding is computed and other sequences do not wait long.
"""

from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from sluice_service.arrays import (
    Integers,
    choose_steps,
    is_distinct,
    pad_frames,
    starts_of,
)
from sluice_service.batching.direct import DirectPath
from sluice_service.batching.inputs import InputRules
from sluice_service.batching.queues import Frame, Kind, Queues, Single
from sluice_service.batching.run import Run, RunSizes, steps_each
from sluice_service.errors import GapError, LaneError
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import NONE, SequenceTable

# While short chunks arrive among long ones, a run may take this fraction of its usual time …
_SHARE_WHEN_MIXED = 4
# … for this many runs after the last such mixture.
_MIXED_RUNS = 16


class Ending(Enum):
    """A close or a park that a lane asked for after its chunks."""

    CLOSE = auto()
    PARK = auto()


class Scheduler:
    """The queues of one model's lanes and the ring of those that can run."""

    def __init__(self, table: SequenceTable, *, rules: InputRules, sizes: RunSizes) -> None:
        slots = table.slots
        self._table = table
        self._rules = rules
        self._sizes = sizes
        self._queues = Queues(slots)
        self._direct = DirectPath(table, rules, sizes)
        self._mixed_runs = (
            0  # remaining runs in which long chunks are cut for the sake of short ones
        )
        self._is_turn_of_long = False  # the last run was cut to the short ones' length
        self._rank = np.zeros(slots, np.int64)  # scratch
        # The ring: every slot at most once, so it never overflows.
        self._ring = np.zeros(slots, np.int64)
        self._ring_start = 0
        self._ring_count = 0
        self._is_ready = np.zeros(slots, np.bool_)  # whether it is in the ring
        # Found while choosing a run; the run loop takes these out.
        self.faults: list[tuple[int, LaneError]] = []
        self.endings: list[tuple[int, Ending]] = []
        self.dropped: list[tuple[int, int]] = []  # (stream, steps) that will never run
        table.on_resumed = self._make_ready

    @property
    def has_ready(self) -> bool:
        """True if some sequence may be able to run."""
        return bool(self._ring_count or self._direct)

    # Arrivals.

    def push(self, frame: Frame) -> None:
        """Take in the chunks of a message."""
        self._direct.push(frame)

    def push_single(self, single: Single) -> None:
        """Take in a message of one chunk."""
        self._direct.push_single(single)

    def push_endings(self, slots: Slots, kind: Kind) -> None:
        """Close or park the lanes of `slots` [n] after the chunks that they have sent."""
        self._enqueue_arrived()
        self._link(slots, self._queues.add_endings(kind, len(slots)), None)

    def is_stuck(self, slots: Slots) -> bool:
        """True if none of `slots` runs, and each queue is empty or waits for its client."""
        self._enqueue_arrived()
        table = self._table
        waits = table.is_stalled[slots] & table.wait_for_clients(slots)
        is_done = (self._queues.head[slots] == NONE) | waits
        return bool((is_done & ~table.is_running[slots]).all())

    def drop(self, slot: int) -> None:
        """Drop everything that is queued for a slot."""
        self._enqueue_arrived()
        self._drop_steps(slot, self._queues.clear(slot))
        self._table.clear_stall(slot)

    def _enqueue_arrived(self) -> None:
        """Move all arrived chunks to the queues."""
        for frame in self._direct.take():
            if frame.errors is None:
                frame.errors = self._rules.judge(frame.arrays, frame.starts, frame.steps)
            self._link(frame.slots, self._queues.add(frame), frame.first)

    def _link(self, slots: Slots, nodes: Integers, first: Integers | None) -> None:
        """Put nodes [n] into the queues of `slots` [n], in their order for each slot.

        `first` [n] are the steps before each, if the client named them.
        """
        queues, table = self._queues, self._table
        heads = tails = nodes
        if is_distinct(slots, self._rank):
            named = table.sent[slots] if first is None else first
        else:
            order = np.argsort(slots, kind="stable")
            slots, nodes = slots[order], nodes[order]
            is_border = slots[1:] != slots[:-1]
            begins = np.flatnonzero(np.r_[True, is_border])
            ends = np.flatnonzero(np.r_[is_border, True])
            if first is None:
                before = starts_of(queues.steps[nodes])
                named = table.sent[slots] + before
                named -= np.repeat(before[begins], ends - begins + 1)
            else:
                named = first[order]
            queues.following[nodes[:-1]] = nodes[1:]
            slots, heads, tails = slots[begins], nodes[begins], nodes[ends]
        queues.first[nodes] = named
        table.note_queued(slots, queues.first[tails] + queues.steps[tails])
        slots = queues.append(slots, heads, tails)
        # A running sequence becomes ready when its run has ended.
        is_running = table.is_running[slots]
        self._make_ready(slots[~is_running] if is_running.any() else slots)

    # The ring.

    def _make_ready(self, slots: Slots) -> None:
        """Put slots at the end of the ring, except those that are in it."""
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
        """Take the first `count` slots out of the ring."""
        end = self._ring_start + count
        slots = self._ring[self._ring_start : end].copy()
        if end > len(self._ring):
            slots = np.r_[slots, self._ring[: end - len(self._ring)]]
        self._ring_start = end % len(self._ring)
        self._ring_count -= count
        self._is_ready[slots] = False
        return slots

    def _put_back(self, slots: Slots) -> None:
        """Put slots that were just taken back at the front of the ring."""
        self._ring_start = (self._ring_start - len(slots)) % len(self._ring)
        self._ring[(self._ring_start + np.arange(len(slots))) % len(self._ring)] = slots
        self._ring_count += len(slots)
        self._is_ready[slots] = True

    # Choosing a run.

    def next_run(self) -> Run | None:
        """The next run, or None. Faults and endings found meanwhile are put into the lists."""
        if not self._ring_count:
            run = self._direct.compose()
            if run is not None:
                return run
        self._enqueue_arrived()
        while self._ring_count:
            slots = self._take_ready(min(self._ring_count, self._sizes.sequences_max))
            slots = self._drop_unrunnable(slots[self._queues.head[slots] != NONE])
            if len(slots):
                return self._compose(slots)
        return None

    def _drop_unrunnable(self, slots: Slots) -> Slots:
        """The `slots` whose queue begins with steps that can be applied now."""
        table, queues = self._table, self._queues
        nodes = queues.head[slots]
        step = table.step[slots]
        is_odd = (
            (queues.kind[nodes] != Kind.CHUNK)
            | (queues.first[nodes] != step)
            | table.is_faulted[slots]
        )
        if is_odd.any():
            runnable = ~is_odd
            for index in np.flatnonzero(is_odd).tolist():
                runnable[index] = self._judge(int(slots[index]))
            slots = slots[runnable]
            step = step[runnable]
        is_stalled = step >= table.limit[slots]
        if is_stalled.any():
            table.stall(slots[is_stalled])
            slots = slots[~is_stalled]
        return slots

    def _judge(self, slot: int) -> bool:
        """Process the head of one queue until a chunk can be applied; False if none can.

        `first_step` is checked here and not on arrival. Steps already applied are skipped.
        A gap is one fault. Chunks after a fault are dropped until one names the expected step.
        """
        table, queues = self._table, self._queues
        step = int(table.step[slot])
        while (node := int(queues.head[slot])) != NONE:
            kind, first, steps = queues.kind[node], int(queues.first[node]), int(queues.steps[node])
            was_faulted = bool(table.is_faulted[slot])
            is_expected = first <= step and (bool(queues.is_named[node]) or not was_faulted)
            if kind in (Kind.CLOSE, Kind.PARK):
                if table.is_strict[slot] and table.durable[slot] < step:
                    # Its outputs are sent before it ends, when they are durable.
                    table.stall(slot)
                    return False
                queues.pop_one(slot)
                self._drop_steps(slot, 1)
                self.endings.append((slot, Ending.CLOSE if kind == Kind.CLOSE else Ending.PARK))
                return False
            if kind == Kind.CHUNK and is_expected and first + steps > step:
                table.clear_fault(slot)
                self._drop_steps(slot, step - first)
                queues.consume(np.array([node]), np.array([step - first]))
                return True
            is_past = first + max(steps, 1) <= step
            if kind == Kind.FAULTY and not is_past and (is_expected or not was_faulted):
                self._fault(slot, queues.errors[node])
            elif first > step and not was_faulted:
                self._fault(slot, _gap(first, step))
            self._drop_steps(slot, max(steps, 1))
            queues.pop_one(slot)
        return False

    def _fault(self, slot: int, error: LaneError) -> None:
        self.faults.append((slot, error))
        self._table.fault(slot)

    def _drop_steps(self, slot: int, steps: int) -> None:
        """Note steps that will never run, for which the slot's stream gets credit back.

        An ending or an empty chunk counts as one step.
        """
        if steps:
            self.dropped.append((int(self._table.stream[slot]), steps))

    def _compose(self, slots: Slots) -> Run:
        """A run of the first chunk of each slot, ordered by stream, cut to limit padding."""
        table, queues = self._table, self._queues
        streams = table.stream[slots]
        if (streams != streams[0]).any():
            slots = slots[np.argsort(streams, kind="stable")]
        slots, lengths = self._cut(slots)
        streams, nodes = table.stream[slots], queues.head[slots]
        steps, step = int(lengths.max()), table.step[slots]
        numbers = queues.frame[nodes]
        distinct, which = np.unique(numbers, return_inverse=True)
        frames = [queues.frames[number] for number in distinct.tolist()]
        arrays = [frame.arrays for frame in frames]
        inputs = pad_frames(arrays, which, queues.row[nodes], lengths, steps)
        ends = np.flatnonzero(np.r_[streams[1:] != streams[:-1], True]) + 1
        numbers_of = zip(streams[ends - 1].tolist(), ends.tolist(), strict=True)
        weights = np.bincount(which, minlength=len(frames)).tolist()
        arrived = [frame.arrived for frame in frames]
        each = steps_each(lengths, inputs)
        lanes = table.lane[slots]
        return Run(
            slots, nodes, step, lengths, each, inputs, lanes, list(numbers_of), arrived, weights
        )

    def _steps_max(self, sequences: int) -> int:
        """The most steps for a run of that many sequences, so that others do not wait long."""
        cells_max = self._sizes.cells_max
        if self._mixed_runs:
            cells_max //= _SHARE_WHEN_MIXED
        return min(self._sizes.steps_max, max(1, cells_max // sequences))

    def _cut(self, slots: Slots) -> tuple[Slots, Integers]:
        """Which of `slots` run how many steps, so that there is little padding.

        Sequences with short chunks finish with the run and soon send their next step, so for a
        while long chunks run in short pieces. Pieces of the short chunks' length would hardly
        advance them, so every other run has long chunks only.
        """
        table, queues = self._table, self._queues
        room = table.limit[slots] - table.step[slots]
        waiting = np.minimum(queues.steps[queues.head[slots]], room)
        lengths = np.minimum(waiting, self._steps_max(len(slots)))
        steps = choose_steps(lengths)
        is_long = waiting > steps
        if not is_long.any() or is_long.all():
            self._is_turn_of_long = False
            self._mixed_runs = max(0, self._mixed_runs - 1)
            return slots, np.minimum(lengths, steps)
        self._mixed_runs = _MIXED_RUNS
        self._is_turn_of_long = not self._is_turn_of_long
        if self._is_turn_of_long:
            return slots, np.minimum(lengths, steps)
        self._put_back(slots[~is_long])
        slots = slots[is_long]
        lengths = np.minimum(waiting[is_long], self._steps_max(len(slots)))
        return slots, np.minimum(lengths, choose_steps(lengths))

    # During a run, and after it.

    def set_apart(self, run: Run) -> None:
        """A thread executes the run. No other run takes its sequences until it has finished."""
        run.is_apart = True
        self._table.begin_run(run.slots)

    def finish(self, run: Run, is_applied: NDArray[np.bool_] | None = None) -> None:
        """Remove the steps that were run from the queues; sequences with more become ready again.

        `is_applied` [batch], if not the whole run was applied. Whole chunks of the other
        rows are dropped.
        """
        if run.is_apart:
            self._table.end_run(run.slots)
        if run.nodes is None:
            if run.is_apart:
                self._settle(run.slots)
            return
        queues = self._queues
        is_there = queues.head[run.slots] == run.nodes  # a stream may have ended meanwhile
        slots, nodes, lengths = run.slots[is_there], run.nodes[is_there], run.lengths[is_there]
        queues.consume(nodes, lengths)
        if is_applied is not None:
            lost = is_there & ~is_applied
            for slot, node in zip(run.slots[lost].tolist(), run.nodes[lost].tolist(), strict=True):
                self._drop_steps(slot, int(queues.steps[node]))
                queues.steps[node] = 0
        queues.pop(slots[queues.steps[nodes] == 0])
        self._settle(slots)

    def _settle(self, slots: Slots) -> None:
        """Make `slots`, whose run has ended, ready again, or let them take the direct path."""
        is_empty = self._queues.head[slots] == NONE
        self._make_ready(slots[~is_empty])
        self._table.derive_direct(slots, is_empty)


def _gap(first: int, step: int) -> GapError:
    return GapError(
        f"the chunk follows {first} steps but {step} are applied; send again from first_step {step}"
    )
