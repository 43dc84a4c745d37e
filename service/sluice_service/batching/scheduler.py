"""Decides which chunks go into the next run.

Two ways lead there. Frames that arrived since the last run, in which every chunk
is the next one of its sequence, go straight into a run as they are: that is what
closed-loop traffic sends, and it costs a few array operations a run, however many
sequences there are. Everything else goes through the queues: a sequence that can
run stands once in a ring, and a run takes the first of them, cut so that little
padding is computed and nobody waits long.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from sluice_service.arrays import (
    Array,
    Buffers,
    Integers,
    choose_steps,
    is_whole,
    ones,
    pad_frames,
    starts_of,
)
from sluice_service.batching.inputs import InputRules
from sluice_service.batching.queues import Frame, Kind, Queues, Single
from sluice_service.errors import GapError, LaneError
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import NONE, Sequences

# While short chunks come among long ones, a run may take this part of its usual time …
_SHARE_WHEN_MIXED = 4
# … for so many runs after the last such mixture.
_MIXED_RUNS = 16


class Ending(Enum):
    """What a lane asked for after its chunks."""

    CLOSE = auto()
    PARK = auto()


@dataclass(slots=True)
class Run:
    """One call of the model: `batch` sequences, each `lengths[b]` steps on."""

    slots: Slots  # [batch], all different
    nodes: Integers | None  # [batch] the chunks in the queues; None: they were in none
    first: Integers  # [batch] steps applied before
    lengths: Integers  # [batch]
    steps_each: int  # what every row runs; 0 where they differ
    inputs: list[Array]  # [batch, steps, …] each
    lanes: Integers  # [batch]
    # Whose the rows are: the numbers of streams, and where the rows of each end.
    streams: list[tuple[int, int]]
    arrived: list[float]  # when messages came, and how many chunks each gave
    weights: list[int]
    is_apart: bool = False  # other things happen while it is executed

    def split(self, count: int) -> list["Run"]:
        """The same in so many runs of about as many sequences each."""
        batch = len(self.slots)
        ends = [batch * (part + 1) // count for part in range(count)]
        return [self._part(start, end) for start, end in itertools.pairwise([0, *ends])]

    def _part(self, start: int, end: int) -> "Run":
        """Rows `start` to `end`; all its messages are taken for those of the first rows."""
        streams = [
            (number, min(last, end) - start)
            for (_, first), (number, last) in itertools.pairwise([(NONE, 0), *self.streams])
            if first < end and last > start
        ]
        lengths = self.lengths[start:end]
        return Run(
            self.slots[start:end],
            None if self.nodes is None else self.nodes[start:end],
            self.first[start:end],
            lengths,
            self.steps_each or _steps_each(lengths, self.inputs),
            [array[start:end] for array in self.inputs],
            self.lanes[start:end],
            streams,
            self.arrived if not start else [],
            self.weights if not start else [],
        )

    def only(self, rows: Integers) -> "Run":
        """Some of its rows [n], to be executed."""
        lengths = self.lengths[rows]
        return Run(
            self.slots[rows],
            None,
            self.first[rows],
            lengths,
            self.steps_each or _steps_each(lengths, self.inputs),
            [array[rows] for array in self.inputs],
            self.lanes[rows],
            [],
            [],
            [],
        )


class Scheduler:
    """The queues of one model's lanes and the ring of those that can run."""

    def __init__(
        self,
        sequences: Sequences,
        slots: int,
        *,
        rules: InputRules,
        run_sequences_max: int,
        run_steps_max: int,
        run_cells_max: int,
    ) -> None:
        self._sequences = sequences
        self._rules = rules
        self._queues = Queues(slots)
        self._run_sequences_max = run_sequences_max
        self._run_steps_max = run_steps_max
        self.run_cells_max = run_cells_max  # sequences × steps
        # What has arrived, all of one kind: messages of one chunk of the same steps, or others.
        self._singles: list[Single] = []
        self._frames: list[Frame] = []
        self._mixed_runs = 0  # to come, in which long chunks give way to short ones
        self._is_turn_of_long = False  # the last run was cut to the short ones' length
        self._is_stalled = np.zeros(slots, np.bool_)  # waits at its limit
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
        return bool(self._ring_count or self._singles or self._frames)

    # What arrives.

    def push(self, frame: Frame) -> None:
        """Take in the chunks of a message."""
        self._mingle()
        self._frames.append(frame)

    def push_single(self, single: Single) -> None:
        """Take in a message of one chunk."""
        singles = self._singles
        if self._frames or (singles and singles[0].steps != single.steps):
            self.push(single.as_frame(self._rules))
        else:
            singles.append(single)

    def _mingle(self) -> None:
        """Let everything that has arrived be frames."""
        if self._singles:
            self._frames += [single.as_frame(self._rules) for single in self._singles]
            self._singles = []

    def push_endings(self, slots: Slots, kind: Kind) -> None:
        """Close or park the lanes of `slots` [n] behind what they have sent."""
        self._enqueue_arrived()
        self._link(slots, self._queues.add_endings(kind, len(slots)), None)

    def unbound(self, slots: Slots) -> None:
        """Let the sequences go on whose client, or store, has caught up."""
        is_waiting = self._is_stalled[slots]
        if is_waiting.any():
            waiting = np.unique(slots[is_waiting])
            self._is_stalled[waiting] = False
            self._make_ready(waiting)

    def is_stuck(self, slots: Slots) -> bool:
        """True when none of `slots` runs, and each queue is empty or waits for its client."""
        self._enqueue_arrived()
        sequences = self._sequences
        waits = self._is_stalled[slots] & sequences.wait_for_clients(slots)
        is_done = (self._queues.head[slots] == NONE) | waits
        return bool((is_done & ~sequences.is_running[slots]).all())

    def drop(self, slot: int) -> None:
        """Forget everything queued for a slot."""
        self._enqueue_arrived()
        self._drop_steps(slot, self._queues.clear(slot))
        self._is_stalled[slot] = False

    def _enqueue_arrived(self) -> None:
        """Put what has arrived behind the queues."""
        self._mingle()
        frames, self._frames = self._frames, []
        for frame in frames:
            if frame.errors is None:
                frame.errors = self._rules.judge(frame.arrays, frame.starts, frame.steps)
            self._link(frame.slots, self._queues.add(frame), frame.first)

    def _is_distinct(self, slots: Slots) -> bool:
        """True when no slot is named twice."""
        order = np.arange(len(slots))
        self._rank[slots] = order
        return bool((self._rank[slots] == order).all())

    def _link(self, slots: Slots, nodes: Integers, first: Integers | None) -> None:
        """Put nodes [n] into the queues of `slots` [n], in their order for each slot.

        `first` [n], where the client named them, are the steps before each.
        """
        queues, sequences = self._queues, self._sequences
        heads = tails = nodes
        if self._is_distinct(slots):
            named = sequences.sent[slots] if first is None else first
        else:
            order = np.argsort(slots, kind="stable")
            slots, nodes = slots[order], nodes[order]
            is_border = slots[1:] != slots[:-1]
            begins = np.flatnonzero(np.r_[True, is_border])
            ends = np.flatnonzero(np.r_[is_border, True])
            if first is None:
                before = starts_of(queues.steps[nodes])
                named = sequences.sent[slots] + before
                named -= np.repeat(before[begins], ends - begins + 1)
            else:
                named = first[order]
            queues.following[nodes[:-1]] = nodes[1:]
            slots, heads, tails = slots[begins], nodes[begins], nodes[ends]
        queues.first[nodes] = named
        sequences.sent[slots] = queues.first[tails] + queues.steps[tails]
        sequences.is_straight[slots] = False
        slots = queues.append(slots, heads, tails)
        # What is running becomes ready when its run has ended.
        is_running = sequences.is_running[slots]
        self._make_ready(slots[~is_running] if is_running.any() else slots)

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

    def _put_back(self, slots: Slots) -> None:
        """Put slots that were just taken at the beginning of the ring."""
        self._ring_start = (self._ring_start - len(slots)) % len(self._ring)
        self._ring[(self._ring_start + np.arange(len(slots))) % len(self._ring)] = slots
        self._ring_count += len(slots)
        self._is_ready[slots] = True

    # Choosing a run.

    def next_run(self) -> Run | None:
        """The next run, or None. Faults and endings met on the way are left in the lists."""
        if not self._ring_count:
            run = None
            if self._singles:
                run = self._compose_singles()
            elif self._frames:
                run = self._compose_frames()
            if run is not None:
                return run
        self._enqueue_arrived()
        while self._ring_count:
            slots = self._take_ready(min(self._ring_count, self._run_sequences_max))
            slots = self._drop_unrunnable(slots[self._queues.head[slots] != NONE])
            if len(slots):
                return self._compose(slots)
        return None

    def _compose_singles(self) -> Run | None:
        """A run of the messages of one chunk, if every chunk is the next one of its sequence.

        None where anything is out of the ordinary; nothing has changed then.
        """
        singles, sequences = self._singles, self._sequences
        count, steps = len(singles), singles[0].steps
        if not self._fits(count, steps):
            return None
        slots = np.array([single.slot for single in singles])
        step = sequences.step[slots]
        if count == 1:
            # Numbers, where arrays of one would cost ten times as much.
            slot, named, now = singles[0].slot, singles[0].first, int(step[0])
            is_next = sequences.is_straight[slot] and now + steps <= sequences.limit[slot]
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
        return self._straight(slots, step, steps, rows, lanes, streams, arrived, [1] * count)

    def _compose_frames(self) -> Run | None:
        """As `_compose_singles`, of the frames that have arrived."""
        frames, sequences = self._frames, self._sequences
        steps = frames[0].steps_each
        for frame in frames:
            if frame.errors or frame.steps_each != steps:
                return None
        weights = [len(frame.slots) for frame in frames]
        if not self._fits(sum(weights), steps):
            return None
        slots = _concatenate([frame.slots for frame in frames])
        step = sequences.step[slots]
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
        return self._straight(slots, step, steps, rows, lanes, streams, arrived, weights)

    def _fits(self, count: int, steps: int) -> bool:
        """True when so many chunks of so many steps may be one run."""
        if not 1 <= steps <= min(self._run_steps_max, self._rules.chunk_steps_max):
            return False
        is_small = steps == 1 or count * steps <= self.run_cells_max
        return is_small and count <= self._run_sequences_max

    def _are_next(self, slots: Slots, step: Integers, steps: int) -> bool:
        """True when all of `slots` [n] are different, wait for nothing and may run `steps`."""
        sequences = self._sequences
        return (
            bool(sequences.is_straight[slots].all())
            and self._is_distinct(slots)
            and not (step + steps > sequences.limit[slots]).any()
        )

    def _straight(
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
        """A run of chunks of `steps` steps that have been in no queue; `rows` [n × steps, …]."""
        count = len(slots)
        self._sequences.sent[slots] = step + steps
        lengths = ones(count) if steps == 1 else np.full(count, steps)
        inputs = [array.reshape(count, steps, *array.shape[1:]) for array in rows]
        return Run(slots, None, step, lengths, steps, inputs, lanes, streams, arrived, weights)

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
        is_stalled = step >= sequences.limit[slots]
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
                if sequences.is_strict[slot] and sequences.durable[slot] < step:
                    # What it has put out leaves before it does, once it is durable.
                    self._is_stalled[slot] = True
                    return False
                queues.pop_one(slot)
                self._drop_steps(slot, 1)
                self.endings.append((slot, Ending.CLOSE if kind == Kind.CLOSE else Ending.PARK))
                return False
            if kind == Kind.CHUNK and is_expected and first + steps > step:
                sequences.is_faulted[slot] = False
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
        self._sequences.stop(slot)

    def _drop_steps(self, slot: int, steps: int) -> None:
        """Note that the slot's stream gets credit back for steps that will never run.

        What is no steps, an ending or an empty chunk, has taken the credit of one.
        """
        if steps:
            self.dropped.append((int(self._sequences.stream[slot]), steps))

    def _compose(self, slots: Slots) -> Run:
        """A run of the first chunk of each slot, ordered by stream, cut to little padding."""
        sequences, queues = self._sequences, self._queues
        streams = sequences.stream[slots]
        if (streams != streams[0]).any():
            slots = slots[np.argsort(streams, kind="stable")]
        slots, lengths = self._cut(slots)
        streams, nodes = sequences.stream[slots], queues.head[slots]
        steps, step = int(lengths.max()), sequences.step[slots]
        numbers = queues.frame[nodes]
        distinct, which = np.unique(numbers, return_inverse=True)
        frames = [queues.frames[number] for number in distinct.tolist()]
        arrays = [frame.arrays for frame in frames]
        inputs = pad_frames(arrays, which, queues.row[nodes], lengths, steps)
        ends = np.flatnonzero(np.r_[streams[1:] != streams[:-1], True]) + 1
        numbers_of = zip(streams[ends - 1].tolist(), ends.tolist(), strict=True)
        weights = np.bincount(which, minlength=len(frames)).tolist()
        arrived = [frame.arrived for frame in frames]
        each = _steps_each(lengths, inputs)
        lanes = sequences.lane[slots]
        return Run(
            slots, nodes, step, lengths, each, inputs, lanes, list(numbers_of), arrived, weights
        )

    def _steps_max(self, sequences: int) -> int:
        """The most steps for a run of so many sequences that keeps nobody waiting for long."""
        cells_max = self.run_cells_max
        if self._mixed_runs:
            cells_max //= _SHARE_WHEN_MIXED
        return min(self._run_steps_max, max(1, cells_max // sequences))

    def _cut(self, slots: Slots) -> tuple[Slots, Integers]:
        """Which of `slots` run how many steps, so that little is padding.

        Where some are done with the run while others have more to come, they will soon be
        back with their next step: for a while, the long chunks of the others run in short
        pieces. Cut to the length of the short ones they would come to nothing, so they have
        every other run for themselves.
        """
        sequences, queues = self._sequences, self._queues
        room = sequences.limit[slots] - sequences.step[slots]
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
        """Let nobody else run its sequences until the run is finished."""
        run.is_apart = True
        self._sequences.is_running[run.slots] = True
        self._sequences.is_straight[run.slots] = False

    def finish(self, run: Run, is_applied: NDArray[np.bool_] | None = None) -> None:
        """Take what was run off the queues; sequences that have more become ready again.

        `is_applied` [batch], where not all of the run was: chunks of the other
        rows are dropped whole.
        """
        if run.is_apart:
            self._sequences.is_running[run.slots] = False
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
        """Let `slots`, whose run has ended, be ready again or take the straight way."""
        sequences = self._sequences
        is_empty = self._queues.head[slots] == NONE
        self._make_ready(slots[~is_empty])
        sequences.is_straight[slots] = (
            is_empty
            & ~sequences.is_faulted[slots]
            & (sequences.sent[slots] == sequences.step[slots])
        )


def _gap(first: int, step: int) -> GapError:
    return GapError(
        f"the chunk follows {first} steps but {step} are applied; send again from first_step {step}"
    )


def _join(parts: Sequence[Buffers]) -> list[bytes]:
    """The rows for each input, of several messages."""
    return [b"".join(rows) for rows in zip(*parts, strict=True)]


def _borders(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The streams of consecutive parts and their ends, neighbours of one stream as one."""
    following = [number for number, _ in parts[1:]]
    return [part for part, after in zip(parts, [*following, None], strict=True) if part[0] != after]


def _concatenate(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _steps_each(lengths: Integers, inputs: list[Array]) -> int:
    """The steps of `inputs` [batch, steps, …] where all `lengths` [batch] are that; else 0."""
    steps: int = inputs[0].shape[1]
    return steps if is_whole(lengths, steps) else 0
