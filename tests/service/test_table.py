"""The lifecycle of a sequence, move by move, and the books that are kept of it."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sluice_service.sequences.lifecycle import Event, IllegalTransitionError, Phase
from sluice_service.sequences.states import States
from sluice_service.sequences.table import NONE, SequenceTable
from sluice_service.store.claims import Durability, Record

# Written again here: from where, by what, to where. Every other move is illegal.
LEGAL = {
    (Phase.PARKED, Event.ATTACH): Phase.ATTACHED,
    (Phase.ATTACHED, Event.ATTACH): Phase.ATTACHED,
    (Phase.ATTACHED, Event.DETACH): Phase.PARKED,
    (Phase.PARKED, Event.END): Phase.ENDED,
    (Phase.ATTACHED, Event.END): Phase.ENDED,
}
MOVES = list(itertools.product(Phase, Event))


class Now:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def _table(slots: int = 8, **changes) -> SequenceTable:
    limits = {"unacknowledged_steps_max": 9, "undurable_steps_max": 9}
    fields = {"tombstone_seconds": 10, "now": Now(), **limits, **changes}
    return SequenceTable(States(slots, np.zeros(1, np.float32)), slots, **fields)


def _create(table: SequenceTable, name: str = "s", writer: bytes = b"w", step: int = 0):
    record = Record(writer, 0, table.raise_epoch(), is_alive=True)
    return table.create(name, record, step=step)


def _apply(table: SequenceTable, slot: int, step: int) -> None:
    table.apply(np.array([slot]), np.array([step]), np.zeros((1, 1), np.float32), None)


def _bring(table: SequenceTable, phase: Phase):
    sequence = _create(table)
    if phase is not Phase.PARKED:
        table.attach(sequence, stream=1, lane=5)
    if phase is Phase.ENDED:
        table.end(sequence, "over")
    return sequence


def _do(table: SequenceTable, sequence, event: Event) -> None:
    match event:
        case Event.ATTACH:
            table.attach(sequence, stream=2, lane=6)
        case Event.DETACH:
            table.detach(sequence)
        case Event.END:
            table.end(sequence, "over")


def _columns(table: SequenceTable) -> dict[str, np.ndarray]:
    """All columns, as everybody but the table sees them."""
    named = vars(table).items()
    return {name: value for name, value in named if name[0] != "_" and hasattr(value, "shape")}


def _books(table: SequenceTable) -> dict:
    """Everything that is kept."""
    columns = {name: value.copy() for name, value in _columns(table).items()}
    records = {name: repr(table.record(name)) for name in ("s", "t")}
    return {"columns": columns, "records": records, "ids": [s.sequence_id for s in table]}


@pytest.mark.parametrize(("phase", "event"), [move for move in MOVES if move in LEGAL])
def test_a_legal_move_leads_where_the_table_says(phase, event) -> None:
    table = _table()
    sequence = _bring(table, phase)
    _do(table, sequence, event)
    assert sequence.phase is LEGAL[phase, event]
    assert (table.get("s") is None) == (sequence.phase is Phase.ENDED)
    assert (table.stream[0] == NONE) == (sequence.phase is not Phase.ATTACHED)


@pytest.mark.parametrize(("phase", "event"), [move for move in MOVES if move not in LEGAL])
def test_an_illegal_move_raises_and_changes_nothing(phase, event) -> None:
    table = _table()
    sequence = _bring(table, phase)
    before = _books(table)
    with pytest.raises(IllegalTransitionError, match=rf"{event.name} .* {phase.name}"):
        _do(table, sequence, event)
    assert sequence.phase is phase
    np.testing.assert_equal(_books(table), before)


def test_a_new_sequence_stands_at_its_step_with_nothing_held() -> None:
    table = _table()
    slot = _create(table, step=7).slot
    assert (table.step[slot], table.sent[slot], table.received[slot]) == (7, 7, 7)
    assert table.held_from(slot) == 7


def test_attaching_changes_hands() -> None:
    table = _table()
    sequence = _create(table)
    generation = table.generation[:1].copy()
    _apply(table, 0, 5)
    table.note_queued(np.array([0]), np.array([9]))  # on a lane that is gone
    table.fault(0)
    assert table.is_same(np.array([0]), generation).all()
    table.attach(sequence, stream=2, lane=6)
    assert (table.stream[0], table.lane[0], table.sent[0]) == (2, 6, 5)
    assert not table.is_faulted[0]
    assert not table.is_same(np.array([0]), generation).any()


def test_nothing_is_held_for_a_sequence_without_writer() -> None:
    table = _table()
    sequence = _create(table, writer=b"")
    table.attach(sequence, stream=1, lane=0)
    _apply(table, 0, 5)
    assert table.held_from(0) == 5


def test_epochs_rise_and_never_come_again() -> None:
    table = _table()
    epochs = [table.raise_epoch() for _ in range(100)]
    assert epochs == sorted(set(epochs))
    assert epochs[0] > 0  # 0 is what an unknown id has


def test_a_tombstone_tells_why_until_its_time_is_over() -> None:
    table = _table(tombstone_seconds=10)
    table.now.seconds = 5
    table.end(_create(table), "it was idle")
    record = table.record("s")
    assert (record.is_alive, record.ending, record.writer) == (False, "it was idle", b"w")
    table.now.seconds = 14.9
    table.drop_tombstones()
    assert table.record("s") is record
    table.now.seconds = 15
    table.drop_tombstones()
    assert table.record("s") is None


def test_tombstones_are_bounded_and_the_oldest_goes_first() -> None:
    table = _table(slots=2)
    for name in ("a", "b", "c"):
        table.end(_create(table, name), "over")
    assert [table.record(name) is None for name in ("a", "b", "c")] == [True, False, False]


def test_a_sequence_that_starts_over_has_no_tombstone_and_its_next_one_lasts() -> None:
    table = _table(tombstone_seconds=10)
    table.end(_create(table, "a"), "over")
    table.now.seconds = 1
    table.end(_create(table, "b"), "over")
    again = _create(table, "a")
    assert table.record("a").is_alive
    table.now.seconds = 9
    table.drop_tombstones()
    assert table.record("a").is_alive
    table.now.seconds = 8
    table.end(again, "over again")
    table.now.seconds = 17
    table.drop_tombstones()
    assert table.record("b") is None
    assert table.record("a").ending == "over again"


def test_only_what_rests_is_idle() -> None:
    table = _table()
    table.now.seconds = 1
    for name in ("fresh", "old", "runs", "ended"):
        sequence = _create(table, name)
    table.begin_run(np.array([table.get("runs").slot]))
    table.end(sequence, "over")
    table.now.seconds = 100
    table.touch(table.get("fresh"))
    assert [found.sequence_id for found in table.idle(before=50)] == ["old"]
    assert not list(table.idle(before=1))


def test_what_changes_while_others_expire_is_looked_at_again() -> None:
    table = _table()
    first, moved, runs, ended = (_create(table, name) for name in "abcd")
    found = table.idle(before=50)
    assert next(found) is first
    table.now.seconds = 60
    table.touch(moved)
    table.begin_run(np.array([runs.slot]))
    table.end(ended, "over")
    assert not list(found)


def test_parked_counts_those_on_no_stream() -> None:
    table = _table()
    sequences = [_create(table, name) for name in "abc"]
    table.attach(sequences[1], stream=4, lane=0)
    assert (len(table), table.parked) == (3, 2)


def test_nobody_but_the_table_writes_a_column() -> None:
    columns = _columns(_table())
    assert {"step", "received", "durable", "limit", "is_stalled"} <= set(columns)
    for column in columns.values():
        with pytest.raises(ValueError, match="read-only"):
            column[:] = column[0]


UNACKNOWLEDGED_MAX, UNDURABLE_MAX = 3, 5


class LimitMachine(RuleBasedStateMachine):
    """However far a client or the store has come, the limit follows, and who waited runs on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _table(
            unacknowledged_steps_max=UNACKNOWLEDGED_MAX, undurable_steps_max=UNDURABLE_MAX
        )
        self.resumed: list[int] = []
        self.table.on_resumed = lambda slots: self.resumed.extend(slots.tolist())
        self.sequences = [_create(self.table, name) for name in "abc"]
        for sequence in self.sequences:
            self.table.own(sequence, b"claim", Durability.PERIODIC, 0)

    def _raise(self, slot: int, act: Callable[[], None]) -> None:
        was_stalled = bool(self.table.is_stalled[slot])
        act()
        assert self.resumed == [slot] * was_stalled
        assert not self.table.is_stalled[slot]
        self.resumed.clear()

    @rule(slot=st.integers(0, 2))
    def run_to_the_limit(self, slot) -> None:
        step = max(int(self.table.step[slot]), int(self.table.limit[slot]))
        _apply(self.table, slot, step)
        self.table.stall(np.array([slot]))

    @rule(slot=st.integers(0, 2), share=st.floats(0, 1.5))
    def acknowledge(self, slot, share) -> None:
        ends = np.array([round(share * self.table.step[slot])])
        before = self.table.received[slot]
        self._raise(slot, lambda: self.table.acknowledge(np.array([slot]), ends))
        assert before <= self.table.received[slot] <= self.table.step[slot]

    @rule(slot=st.integers(0, 2), share=st.floats(0, 1))
    def store(self, slot, share) -> None:
        steps = np.array([round(share * self.table.step[slot])])
        before = self.table.durable[slot]
        self._raise(slot, lambda: self.table.note_durable(np.array([slot]), steps))
        assert self.table.durable[slot] == max(before, steps[0])

    @rule(slot=st.integers(0, 2), share=st.floats(0, 1))
    def open(self, slot, share) -> None:
        step = round(share * self.table.step[slot])
        self._raise(slot, lambda: self.table.set_received(self.sequences[slot], step))

    @rule(slot=st.integers(0, 2), step=st.integers(0, 9))
    def begin_again(self, slot, step) -> None:
        self._raise(
            slot,
            lambda: self.table.begin_again(self.sequences[slot], step=step, row=None, plane=None),
        )

    @invariant()
    def the_limit_is_what_client_and_store_allow(self) -> None:
        table, alive = self.table, slice(0, 3)
        allowed = np.minimum(
            table.received[alive] + UNACKNOWLEDGED_MAX, table.durable[alive] + UNDURABLE_MAX
        )
        assert (table.limit[alive] == allowed).all()


TestLimits = LimitMachine.TestCase
