"""Decides which chunks go into the next run.

A sequence that can run stands once in the ring of the ready; the next run takes
the first of them, cut so that little padding is computed and nobody waits long.
"""

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from sluice_service.arena import Slots
from sluice_service.errors import GapError, LaneError
from sluice_service.queues import Kind, Queues
from sluice_service.ragged import Array, Frame, Integers, choose_steps, pad_frames
from sluice_service.sequences import NONE, Sequences


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

    def part(self, chosen: slice) -> "Run":
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
    """The queues of one model's lanes and the ring of those that can run."""

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
        self._queues = Queues(slots)
        self._run_sequences_max = run_sequences_max
        self._run_steps_max = run_steps_max
        self._run_cells_max = run_cells_max  # sequences × steps
        self._unacknowledged_steps_max = unacknowledged_steps_max
        self._is_stalled = np.zeros(slots, np.bool_)  # waits for acknowledgements
        self._rank = np.zeros(slots, np.int64)  # scratch
        # The ring: every slot at most once, so it never overflows.
        self._ring = np.zeros(slots, np.int64)
        self._ring_start = 0
        self._ring_count = 0
        self._is_ready = np.zeros(slots, np.bool_)  # stands in the ring
        # What came to light while choosing a run; the run loop takes it from here.
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
        nodes = self._queues.add(steps, starts, frame, errors, is_named=first is not None)
        for chosen in self._rounds(slots):
            self._link(slots[chosen], nodes[chosen], None if first is None else first[chosen])

    def push_ending(self, slot: int, kind: Kind) -> None:
        """Queue a close or a park behind what the lane has sent."""
        self._link(np.array([slot]), self._queues.add_ending(kind), None)

    def acknowledged(self, slots: Slots) -> None:
        """Let the sequences go on whose client has caught up."""
        waiting = slots[self._is_stalled[slots]]
        if len(waiting):
            waiting = np.unique(waiting)
            self._is_stalled[waiting] = False
            self._make_ready(waiting)

    def is_stuck(self, slots: Slots) -> bool:
        """True when every queue of `slots` is empty or waits for acknowledgements."""
        return bool(((self._queues.head[slots] == NONE) | self._is_stalled[slots]).all())

    def drop(self, slot: int) -> None:
        """Forget everything queued for a slot."""
        self._drop_steps(slot, self._queues.clear(slot))
        self._is_stalled[slot] = False

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
        queues, sent = self._queues, self._sequences.sent
        queues.first[nodes] = sent[slots] if first is None else first
        sent[slots] = queues.first[nodes] + queues.steps[nodes]
        self._make_ready(queues.append(slots, nodes))

    # The ring.

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
            slots = self._drop_unrunnable(slots[self._queues.head[slots] != NONE])
            if len(slots):
                return self._compose(slots)
        return None

    def _drop_unrunnable(self, slots: Slots) -> Slots:
        """Those of `slots` whose queue begins with steps that can be applied now."""
        sequences, queues = self._sequences, self._queues
        nodes = queues.head[slots]
        step = sequences.step[slots]
        is_odd = (
            (queues.kind[nodes] != Kind.CHUNK)
            | (queues.first[nodes] != step)
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
        sequences, queues = self._sequences, self._queues
        step = int(sequences.step[slot])
        while (node := int(queues.head[slot])) != NONE:
            kind, first, steps = queues.kind[node], int(queues.first[node]), int(queues.steps[node])
            was_faulted = bool(sequences.is_faulted[slot])
            is_expected = first <= step and (bool(queues.is_named[node]) or not was_faulted)
            if kind in (Kind.CLOSE, Kind.PARK):
                queues.pop(np.array([slot]))
                self.endings.append((slot, Ending.CLOSE if kind == Kind.CLOSE else Ending.PARK))
                return False
            if kind == Kind.CHUNK and is_expected and first + steps > step:
                sequences.is_faulted[slot] = False
                self._drop_steps(slot, step - first)
                queues.consume(np.array([node]), np.array([step - first]))
                return True
            if kind == Kind.FAULTY and (is_expected or not was_faulted):
                self._fault(slot, queues.errors[node])
            elif first > step and not was_faulted:
                self._fault(slot, _gap(first, step))
            self._drop_steps(slot, steps)
            queues.pop(np.array([slot]))
        return False

    def _fault(self, slot: int, error: LaneError) -> None:
        self.faults.append((slot, error))
        self._sequences.is_faulted[slot] = True

    def _drop_steps(self, slot: int, steps: int) -> None:
        """Note that the slot's stream gets credit back for steps that will never run."""
        if steps:
            self.dropped.append((int(self._sequences.stream[slot]), steps))

    def _compose(self, slots: Slots) -> Run:
        """A run of the first chunk of each slot, ordered by stream, cut to little padding."""
        sequences, queues = self._sequences, self._queues
        streams = sequences.stream[slots]
        if (streams != streams[0]).any():
            slots = slots[np.argsort(streams, kind="stable")]
        nodes = queues.head[slots]
        step = sequences.step[slots]
        room = sequences.received[slots] + self._unacknowledged_steps_max - step
        steps_max = min(self._run_steps_max, max(1, self._run_cells_max // len(slots)))
        lengths = np.minimum(np.minimum(queues.steps[nodes], room), steps_max)
        steps = choose_steps(lengths)
        lengths = np.minimum(lengths, steps)
        sequences.is_running[slots] = True
        numbers = queues.frame[nodes]
        if (numbers == numbers[0]).all():
            frames = [queues.frames[int(numbers[0])]]
            which = np.zeros(len(slots), np.int64)
        else:
            distinct, which = np.unique(numbers, return_inverse=True)
            frames = [queues.frames[number] for number in distinct.tolist()]
        arrived = np.array([frame.arrived for frame in frames])[which]
        inputs = pad_frames(frames, which, queues.row[nodes], lengths, steps)
        return Run(slots, nodes, step, lengths, inputs, arrived)

    # After a run.

    def finish(self, run: Run, is_applied: NDArray[np.bool_]) -> None:
        """Take what was run off the queues; sequences that have more become ready again.

        Chunks of rows that were not applied are dropped whole.
        """
        self._sequences.is_running[run.slots] = False
        queues = self._queues
        is_there = queues.head[run.slots] == run.nodes  # a stream may have ended meanwhile
        slots, nodes, lengths = run.slots[is_there], run.nodes[is_there], run.lengths[is_there]
        queues.consume(nodes, lengths)
        for slot, node in zip(
            run.slots[is_there & ~is_applied].tolist(),
            run.nodes[is_there & ~is_applied].tolist(),
            strict=True,
        ):
            self._drop_steps(slot, int(queues.steps[node]))
            queues.steps[node] = 0
        queues.pop(slots[queues.steps[nodes] == 0])
        self._make_ready(slots[queues.head[slots] != NONE])


def _gap(first: int, step: int) -> GapError:
    return GapError(
        f"the chunk follows {first} steps but {step} are applied; send again from first_step {step}"
    )
