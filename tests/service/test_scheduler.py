"""What goes into a run, against a naive model of queues: any order of events, every step once.

No sockets, no clock, no ONNX Runtime: a run here is what the scheduler says it is.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from sluice_protos.contract_pb2 import ModelContract, TensorSpec
from sluice_service.arrays import ones
from sluice_service.batching.inputs import InputRules
from sluice_service.batching.queues import Frame, Kind, Queues, Single
from sluice_service.batching.run import Run, RunSizes
from sluice_service.batching.scheduler import Ending, Scheduler
from sluice_service.errors import GapError, InvalidInputError
from sluice_service.sequences.states import States
from sluice_service.sequences.table import ALL, NONE, SequenceTable
from sluice_service.store.claims import Record

SLOTS = 6
STREAMS = 2
UNACKNOWLEDGED_MAX = 3
RUN_STEPS_MAX = 3
RUN_CELLS_MAX = 8
RUNS_AT_ONCE_MAX = 3
RULES = InputRules(
    ModelContract(inputs=[TensorSpec(name="x", datatype="FP32", shape=[1])]),
    chunk_steps_max=20_000,
    refuses_non_finite=True,
)


@dataclass
class Chunk:
    """What one lane sent at once: rows of values that are all different."""

    first: int
    is_named: bool
    values: list[float]
    is_bad: bool


@dataclass
class Lane:
    """A sequence as the protocol describes it, one step at a time."""

    is_anonymous: bool
    is_attached: bool = False
    step: int = 0
    sent: int = 0
    received: int = 0
    is_faulted: bool = False
    queue: deque[Chunk | Ending] = field(default_factory=deque)

    def settle(self) -> tuple[list[type], list[Ending]]:
        """Work off what cannot be applied; the faults and the ending that come of it."""
        faults: list[type] = []
        while self.queue:
            chunk = self.queue[0]
            if isinstance(chunk, Ending):
                self.queue.clear()
                return faults, [chunk]
            end = chunk.first + len(chunk.values)
            is_past = max(end, chunk.first + 1) <= self.step
            is_gap = chunk.first > self.step
            if self.is_faulted and (is_gap or not chunk.is_named):
                pass
            elif chunk.is_bad and not is_past:
                faults.append(InvalidInputError)
                self.is_faulted = True
            elif is_gap:
                faults.append(GapError)
                self.is_faulted = True
            elif not chunk.is_bad and end > self.step:
                self.is_faulted = False
                del chunk.values[: self.step - chunk.first]
                chunk.first = self.step
                return faults, []
            self.queue.popleft()
        return faults, []

    @property
    def room(self) -> int:
        """How many steps may run before the client must acknowledge some."""
        return self.received + UNACKNOWLEDGED_MAX - self.step if not self.is_anonymous else 99

    @property
    def is_stalled(self) -> bool:
        return self.room <= 0 and bool(self.queue) and isinstance(self.queue[0], Chunk)


class SchedulerMachine(RuleBasedStateMachine):
    """Streams that push, acknowledge, part and come again, while runs start and land."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _table(SLOTS, unacknowledged_steps_max=UNACKNOWLEDGED_MAX)
        sizes = RunSizes(sequences_max=4, steps_max=RUN_STEPS_MAX, cells_max=RUN_CELLS_MAX)
        self.scheduler = Scheduler(self.table, rules=RULES, sizes=sizes)
        self.value = 0.0
        self.runs: list[Run] = []
        self.streams = list(range(1, STREAMS + 1))
        self.owed: Counter[int] = Counter()  # steps of each stream without an answer; 1 for none
        self.lanes = [Lane(is_anonymous=slot % 3 == 2) for slot in range(SLOTS)]
        for slot in range(SLOTS):
            self._create(slot)
            self._attach(slot)

    def _create(self, slot: int) -> None:
        writer = b"" if self.lanes[slot].is_anonymous else b"w"
        record = Record(writer, 0, self.table.raise_epoch(), is_alive=True)
        assert self.table.create(str(slot), record, step=0).slot == slot

    def _attach(self, slot: int) -> None:
        lane = self.lanes[slot]
        stream = self.streams[slot % STREAMS]
        self.table.attach(self.table.at(slot), stream, lane=slot + 10)
        lane.is_attached = True
        lane.is_faulted = False
        lane.sent = lane.step

    def _part(self, slot: int) -> None:
        self.scheduler.drop(slot)
        self.table.detach(self.table.at(slot))
        self.lanes[slot].queue.clear()
        self.lanes[slot].is_attached = False

    def _book_dropped(self) -> None:
        for stream, steps in self.scheduler.dropped:
            assert steps > 0
            self.owed[stream] -= steps
        self.scheduler.dropped.clear()

    # What clients do.

    @rule(
        number=st.integers(0, STREAMS - 1),
        chunks=st.lists(
            st.tuples(
                st.integers(0, SLOTS // STREAMS - 1),  # whose
                st.sampled_from([0, 1, 1, 1, 1, 2, 3, 7]),  # how many steps
                st.sampled_from([0, 0, 0, 0, 0, -1, -3, 1]),  # off the place it belongs
                st.sampled_from([False] * 9 + [True]),  # bad
            ),
            min_size=1,
            max_size=6,
        ),
        is_named=st.booleans(),
        has_strangers=st.sampled_from([False, False, True]),
    )
    def push(self, number, chunks, is_named, has_strangers) -> None:
        """Whatever a client may send."""
        self._push(number, chunks, is_named=is_named, has_strangers=has_strangers)

    @rule(
        number=st.integers(0, STREAMS - 1),
        whose=st.lists(st.integers(0, SLOTS // STREAMS - 1), min_size=1, max_size=4),
        steps=st.sampled_from([1, 1, 1, 2, 7]),
        is_named=st.booleans(),
        stumble=st.sampled_from([0, 0, 0, 0, 1, -1]),
        is_bad=st.sampled_from([False] * 5 + [True]),
    )
    def push_one_by_one(self, number, whose, steps, is_named, stumble, is_bad) -> None:
        """A message for each chunk."""
        for which in whose:
            chunk = (which, steps, stumble, is_bad and which == whose[-1])
            self._push(number, [chunk], is_named=is_named, has_strangers=False)

    def _push(self, number, chunks, *, is_named, has_strangers) -> None:
        slots, steps, starts, first, bad = [], [], [], [], []
        base, row = self.value, 0
        for which, count, offset, is_bad in chunks:
            slot = number + STREAMS * which
            lane = self.lanes[slot]
            if not lane.is_attached:
                continue
            if has_strangers:
                row += 2  # rows of a lane that is not open
            if is_bad and count:
                bad.append(row)
            begin = max(lane.sent + offset, 0) if is_named else lane.sent
            values = [base + row + index for index in range(count)]
            lane.queue.append(Chunk(begin, is_named, values, is_bad or not count))
            lane.sent = begin + count
            slots.append(slot)
            steps.append(count)
            starts.append(row)
            first.append(begin)
            row += count
        if not slots:
            return
        self.value += row
        is_even = len(set(steps)) == 1 and not has_strangers
        self.owed[self.streams[number]] += sum(max(count, 1) for count in steps)
        stream = self.streams[number]
        values = np.arange(base, base + row, dtype=np.float32)
        values[bad] = np.nan
        if len(slots) == 1 and row == steps[0] > 0:
            named = first[0] if is_named else NONE
            self.scheduler.push_single(
                Single(stream, slots[0] + 10, slots[0], row, named, [values.tobytes()], 0.0)
            )
            return
        self.scheduler.push(
            Frame(
                stream,
                np.array(slots) + 10,
                np.array(slots),
                ones(len(steps)) if set(steps) == {1} else np.array(steps),
                np.array(starts),
                np.array(first) if is_named else None,
                [values.reshape(row, 1)],
                None,
                steps[0] if is_even else 0,
                0.0,
            )
        )

    @rule(
        number=st.integers(0, STREAMS - 1),
        whose=st.sets(st.integers(0, SLOTS // STREAMS - 1), min_size=1),
        steps=st.sampled_from([1, 1, 2]),
        is_named=st.booleans(),
        stumble=st.sampled_from([0, 0, 0, 0, 1, -1]),
    )
    def push_in_step(self, number, whose, steps, is_named, stumble) -> None:
        """What most clients send: the next chunk of each of some sequences, all of one length."""
        chunks = [(which, steps, 0, False) for which in whose]
        chunks[-1] = (chunks[-1][0], steps, stumble, False)
        self._push(number, chunks, is_named=is_named, has_strangers=False)

    @rule(slot=st.integers(0, SLOTS - 1), ending=st.sampled_from(Ending))
    def end_lane(self, slot, ending) -> None:
        if self.lanes[slot].is_attached:
            kind = Kind.CLOSE if ending is Ending.CLOSE else Kind.PARK
            self.owed[self.streams[slot % STREAMS]] += 1
            self.scheduler.push_endings(np.array([slot]), kind)
            self.lanes[slot].queue.append(ending)

    @rule()
    def compact(self) -> None:
        """Whatever waits in frames that are mostly done lies elsewhere now."""
        with patch("sluice_service.batching.queues._COMPACTED_FRAME_BYTES_MIN", 1):
            self.scheduler._queues._compact()

    @rule(slot=st.integers(0, SLOTS - 1), share=st.floats(0, 1))
    def acknowledge(self, slot, share) -> None:
        lane = self.lanes[slot]
        if lane.is_anonymous:
            return
        lane.received += round(share * (lane.step - lane.received))
        self.table.acknowledge(np.array([slot]), np.array([lane.received]))

    @rule(number=st.integers(0, STREAMS - 1))
    def lose_stream(self, number) -> None:
        """May happen during a run: what runs goes on, what waits is dropped."""
        for slot in range(number, SLOTS, STREAMS):
            if self.lanes[slot].is_attached:
                self._part(slot)
        self._book_dropped()
        self.streams[number] = max(self.streams) + 1

    @precondition(lambda self: not self.runs)
    @rule(slot=st.integers(0, SLOTS - 1))
    def open_lane(self, slot) -> None:
        if not self.lanes[slot].is_attached:
            self._attach(slot)

    # What the run loop does.

    @precondition(lambda self: len(self.runs) < RUNS_AT_ONCE_MAX)
    @rule(parts=st.integers(1, 3))
    def start_run(self, parts) -> None:
        if (run := self._next_run()) is not None:
            pieces = run.split(min(parts, len(run.slots))) if parts > 1 else [run]
            assert sum(sum(piece.weights) for piece in pieces) == sum(run.weights)
            for piece in pieces:
                self._check(piece)
                self.scheduler.set_apart(piece)
                self.runs.append(piece)

    def _next_run(self) -> Run | None:
        run = self.scheduler.next_run()
        faults: dict[int, list[type]] = {}
        endings: dict[int, list[Ending]] = {}
        for slot, error in self.scheduler.faults:
            faults.setdefault(slot, []).append(type(error))
        for slot, ending in self.scheduler.endings:
            endings.setdefault(slot, []).append(ending)
        self.scheduler.faults.clear()
        self.scheduler.endings.clear()
        rows = [] if run is None else run.slots.tolist()
        for slot in {*rows, *faults, *endings}:
            expected = self.lanes[slot].settle()
            assert (faults.get(slot, []), endings.get(slot, [])) == expected
        for slot in endings:
            self._end(slot, endings[slot][0])
        self._book_dropped()
        if run is None:
            assert not self.scheduler.has_ready
            return None
        assert len(set(rows)) == len(rows) == sum(run.weights) > 0
        assert not set(rows) & {slot for other in self.runs for slot in other.slots.tolist()}
        self._check(run)
        return run

    @rule(
        number=st.integers(0, STREAMS - 1),
        whose=st.sets(st.integers(0, SLOTS // STREAMS - 1), min_size=1),
        is_named=st.booleans(),
        stumble=st.sampled_from([0, 0, 0, 1, -1]),
        refused=st.sampled_from([set(), set(), {0}]),
        share=st.sampled_from([0, 0, 0.5, 1]),
    )
    def converse(self, number, whose, is_named, stumble, refused, share) -> None:
        """A client sends, the server answers, the client acknowledges."""
        chunks = [(which, 1, 0, False) for which in whose]
        chunks[-1] = (chunks[-1][0], 1, stumble, False)
        self._push(number, chunks, is_named=is_named, has_strangers=False)
        self.run_at_once(refused)
        for which in whose:
            self.acknowledge(number + STREAMS * which, share)

    @rule(refused=st.sets(st.integers(0, 3), max_size=1))
    def run_at_once(self, refused) -> None:
        if (run := self._next_run()) is not None:
            self._land(run, refused)

    def _end(self, slot: int, ending: Ending) -> None:
        self._part(slot)
        if ending is Ending.CLOSE:
            self.table.end(self.table.at(slot), "closed")
            self.lanes[slot] = Lane(is_anonymous=self.lanes[slot].is_anonymous)
            self._create(slot)

    def _check(self, run: Run) -> None:
        """Every row is the next steps of its sequence, and no longer than allowed."""
        (inputs,) = run.inputs
        batch, steps = inputs.shape[:2]
        assert batch == len(run.slots) == len(run.lengths) == len(run.first)
        assert steps <= RUN_STEPS_MAX
        assert steps == 1 or batch * steps <= RUN_CELLS_MAX
        named = list(zip(_streams_of(run), run.lanes.tolist(), strict=True))
        lengths = run.lengths.tolist()
        assert run.steps_each == (steps if set(lengths) == {steps} else 0)
        for index, slot in enumerate(run.slots.tolist()):
            lane, length = self.lanes[slot], int(run.lengths[index])
            chunk = lane.queue[0]
            assert named[index] == (self.streams[slot % STREAMS], slot + 10)
            assert run.first[index] == lane.step
            assert 1 <= length <= min(len(chunk.values), steps, lane.room)
            assert inputs[index, :length, 0].tolist() == chunk.values[:length]

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 5), refused=st.sets(st.integers(0, 3)))
    def land_run(self, which, refused) -> None:
        """Runs may end in another order than they began."""
        self._land(self.runs.pop(which % len(self.runs)), refused)

    def _land(self, run: Run, refused) -> None:
        applied = np.array([index not in refused for index in range(len(run.slots))])
        is_applied = None if applied.all() else applied
        _apply(self.table, run, is_applied)
        self.scheduler.finish(run, is_applied)
        for stream, steps in zip(_streams_of(run), run.lengths.tolist(), strict=True):
            self.owed[stream] -= steps
        self._book_dropped()
        for index, slot in enumerate(run.slots.tolist()):
            lane = self.lanes[slot]
            length = int(run.lengths[index])
            if lane.is_attached:
                chunk = lane.queue[0]
                del chunk.values[:length]
                chunk.first += length
                if not applied[index] or not chunk.values:
                    lane.queue.popleft()
            if applied[index]:
                lane.step += length
            else:
                self.table.fault(slot)
                lane.is_faulted = True

    def teardown(self) -> None:
        """Let everything run out: nothing may be left that could have run."""
        while self.runs:
            self.land_run(0, set())
        for _ in range(2000):
            for slot in range(SLOTS):
                self.acknowledge(slot, 1.0)
            if (run := self._next_run()) is None:
                break
            self._land(run, set())
        for slot, lane in enumerate(self.lanes):
            assert lane.settle() == ([], [])
            assert not lane.queue
            assert self.table.step[slot] == lane.step
        assert self.scheduler.is_stuck(np.arange(SLOTS))
        # All credit has come back to the streams that are still there.
        assert [self.owed[stream] for stream in self.streams] == [0] * STREAMS
        # And nothing keeps memory.
        assert not self.scheduler._queues.frames
        assert not self.scheduler._queues.errors
        assert not self.table.is_running.any()


def _table(slots: int, *, unacknowledged_steps_max: int) -> SequenceTable:
    return SequenceTable(
        States(slots, np.zeros(1, np.float32)),
        slots,
        now=lambda: 0.0,
        tombstone_seconds=1,
        unacknowledged_steps_max=unacknowledged_steps_max,
        undurable_steps_max=1,
    )


def _apply(table: SequenceTable, run: Run, is_applied: np.ndarray | None = None) -> None:
    """Take a run's steps for done."""
    states = np.zeros((len(run.slots), 1), np.float32)
    table.apply(run.slots, run.first + run.lengths, states, is_applied)


def _acknowledge_all(table: SequenceTable) -> None:
    """Let nobody wait for a client."""
    for sequence in table:
        table.set_received(sequence, ALL)


def _streams_of(run: Run) -> list[int]:
    """The stream of each row."""
    streams: list[int] = []
    for number, end in run.streams:
        streams += [number] * (end - len(streams))
    return streams


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, derandomize=True
)


@pytest.mark.slow
class TestSchedulerLonger(SchedulerMachine.TestCase):
    settings = settings(TestScheduler.settings, max_examples=200)


def _scheduler(
    slots: int, *, run_steps_max: int = 8, run_cells_max: int = 1000
) -> tuple[SequenceTable, Scheduler]:
    table = _table(slots, unacknowledged_steps_max=100)
    sizes = RunSizes(sequences_max=slots, steps_max=run_steps_max, cells_max=run_cells_max)
    scheduler = Scheduler(table, rules=RULES, sizes=sizes)
    for slot in range(slots):
        record = Record(b"w", 0, table.raise_epoch(), is_alive=True)
        table.attach(table.create(str(slot), record, step=0), 1, slot)
    return table, scheduler


def _frame(slots: list[int], steps: int) -> Frame:
    count = len(slots)
    rows = np.zeros((count * steps, 1), np.float32)
    lanes, lengths = np.array(slots), np.full(count, steps)
    return Frame(1, lanes, lanes, lengths, lengths * 0, None, [rows], None, steps, 0.0)


def test_nobody_waits_for_a_long_chunk_of_another() -> None:
    table, scheduler = _scheduler(3)
    scheduler.push(_frame([0], 80))
    scheduler.push(_frame([1, 2], 1))
    # The long one is cut, so that the single steps share its first run or its second.
    seen: set[int] = set()
    for _ in range(2):
        run = scheduler.next_run()
        seen |= set(run.slots.tolist())
        _apply(table, run)
        scheduler.finish(run)
    assert seen == {0, 1, 2}
    assert scheduler.has_ready


def test_queues_grow_beyond_where_they_started_and_keep_every_chunk() -> None:
    table, scheduler = _scheduler(2)
    for _ in range(40):
        scheduler.push(_frame([0, 1] * 50, 1))
    runs = 0
    _acknowledge_all(table)
    while (run := scheduler.next_run()) is not None:
        _apply(table, run)
        scheduler.finish(run)
        runs += 1
    assert table.step[:2].tolist() == [2000, 2000]
    assert runs == 2000


def test_steps_beyond_what_may_be_unacknowledged_never_run_whichever_way_they_come() -> None:
    table, scheduler = _scheduler(2)
    for sent in range(1, 121):
        scheduler.push(_frame([0], 1))
        while (run := scheduler.next_run()) is not None:
            _apply(table, run)
            scheduler.finish(run)
        assert table.step[0] == min(sent, 100)
    table.acknowledge(np.array([0]), np.array([100]))
    assert scheduler.next_run().lengths.tolist() == [1]


def test_a_lane_that_waited_for_acknowledgements_and_was_dropped_waits_no_more() -> None:
    table, scheduler = _scheduler(1)
    scheduler.push(_frame([0], 101))
    while (run := scheduler.next_run()) is not None:
        _apply(table, run)
        scheduler.finish(run)
    assert scheduler.is_stuck(np.array([0]))
    scheduler.drop(0)
    # Its next lane begins where it stands, and has all outputs.
    table.detach(table.at(0))
    table.set_received(table.at(0), 100)
    table.attach(table.at(0), 1, 0)
    scheduler.push(_frame([0], 1))
    assert not scheduler.is_stuck(np.array([0]))


def test_slots_on_no_stream_have_no_number() -> None:
    table, _ = _scheduler(1)
    table.detach(table.at(0))
    assert table.stream[0] == NONE


def _next(table: SequenceTable, scheduler: Scheduler) -> dict[int, int]:
    """The steps of each slot in the next run, which succeeds."""
    run = scheduler.next_run()
    assert run is not None
    _apply(table, run)
    scheduler.finish(run)
    return dict(zip(run.slots.tolist(), run.lengths.tolist(), strict=True))


def test_long_chunks_run_in_short_pieces_while_short_ones_come_among_them() -> None:
    table, scheduler = _scheduler(2, run_steps_max=64, run_cells_max=100)
    _acknowledge_all(table)
    scheduler.push(_frame([0], 10_000))
    assert _next(table, scheduler) == {0: 64}
    scheduler.push(_frame([1], 1))
    assert _next(table, scheduler) == {0: 1, 1: 1}
    # The short one may be back at any moment: the long one takes little at once.
    for _ in range(3):
        assert _next(table, scheduler) == {0: 25}
    scheduler.push(_frame([1], 1))
    assert _next(table, scheduler) == {0: 1, 1: 1}
    # It stays away: the long one has the server to itself again.
    lengths = [_next(table, scheduler)[0] for _ in range(40)]
    assert (lengths[0], lengths[-1]) == (25, 64)


def test_long_chunks_get_on_however_quickly_short_ones_come_back() -> None:
    table, scheduler = _scheduler(3, run_steps_max=64, run_cells_max=100)
    _acknowledge_all(table)
    scheduler.push(_frame([0], 10_000))
    for _ in range(10):
        # Every other run is cut to the short ones' length, the next is the long one's own …
        scheduler.push(_frame([1, 2], 1))
        assert _next(table, scheduler) == {0: 1, 1: 1, 2: 1}
        scheduler.push(_frame([2, 1], 1))
        assert _next(table, scheduler) == {0: 25}
        # … and those who waited for its end come first.
        assert _next(table, scheduler) == {0: 1, 1: 1, 2: 1}
        assert _next(table, scheduler) == {0: 25}


def test_a_sequence_that_runs_runs_nowhere_else_whichever_way_its_next_chunk_comes() -> None:
    table, scheduler = _scheduler(2)
    for push in (
        lambda: scheduler.push(_frame([0], 1)),
        lambda: scheduler.push_single(Single(1, 0, 0, 1, NONE, [bytes(4)], 0.0)),
    ):
        push()
        run = scheduler.next_run()
        scheduler.set_apart(run)
        push()
        assert scheduler.next_run() is None
        scheduler.push(_frame([1], 1))
        assert _next(table, scheduler) == {1: 1}
        _apply(table, run)
        scheduler.finish(run)
        assert _next(table, scheduler) == {0: 1}


def test_messages_of_one_chunk_share_a_run_only_where_they_are_as_long() -> None:
    table, scheduler = _scheduler(3)
    for slot, steps in enumerate((1, 1, 2)):
        scheduler.push_single(Single(1, slot, slot, steps, NONE, [bytes(4 * steps)], 0.0))
    done = [_next(table, scheduler), _next(table, scheduler)]
    assert done == [{0: 1, 1: 1, 2: 1}, {2: 1}]


def test_chunks_that_claim_rows_they_do_not_have_are_no_work_when_frames_are_looked_through() -> (
    None
):
    queues, rows = Queues(2), np.zeros((100_000, 1), np.float32)
    error = {0: InvalidInputError("the inputs do not fit")}
    claimed = np.array([1 << 40])
    for arrays, steps, errors in (([], claimed, error), ([rows], np.array([10]), None)):
        slots, starts = np.array([0]), np.zeros(1, np.int64)
        queues.add(Frame(1, slots, slots, steps, starts, None, arrays, errors, 0, 0.0))
    queues._compact()
    assert [one.bytes for one in queues.frames.values()] == [0, 40]
