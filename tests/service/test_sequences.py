"""The lifecycle of a sequence, move by move, and the books that are kept of it."""

import itertools

import numpy as np
import pytest

from sluice_service.sequences.table import NONE, Event, IllegalTransitionError, Phase, Sequences
from sluice_service.store.claims import Record

# Written again here: from where, by what, to where. Every other move is illegal.
LEGAL = {
    (Phase.PARKED, Event.ATTACH): Phase.ATTACHED,
    (Phase.ATTACHED, Event.ATTACH): Phase.ATTACHED,
    (Phase.ATTACHED, Event.DETACH): Phase.PARKED,
    (Phase.PARKED, Event.END): Phase.ENDED,
    (Phase.ATTACHED, Event.END): Phase.ENDED,
}
MOVES = list(itertools.product(Phase, Event))


def _sequences(**changes) -> Sequences:
    limits = {"unacknowledged_steps_max": 9, "undurable_steps_max": 9}
    return Sequences(8, **{"tombstones_max": 4, "tombstone_seconds": 10, **limits, **changes})


def _create(table: Sequences, name: str = "s", slot: int = 0, writer: bytes = b"w", step: int = 0):
    record = Record(writer, 0, table.raise_epoch(), is_alive=True)
    return table.create(name, slot, record, step=step, now=0)


def _bring(table: Sequences, phase: Phase):
    sequence = _create(table)
    if phase is not Phase.PARKED:
        table.attach(sequence, stream=1, lane=5, now=0)
    if phase is Phase.ENDED:
        table.end(sequence, "over", now=0)
    return sequence


def _do(table: Sequences, sequence, event: Event) -> None:
    match event:
        case Event.ATTACH:
            table.attach(sequence, stream=2, lane=6, now=1)
        case Event.DETACH:
            table.detach(sequence)
        case Event.END:
            table.end(sequence, "over", now=1)


def _books(table: Sequences) -> dict:
    """Everything that is kept."""
    columns = {name: value.copy() for name, value in vars(table).items() if hasattr(value, "shape")}
    records = {name: repr(table.record(name)) for name in ("s", "t")}
    return {"columns": columns, "records": records, "ids": [s.sequence_id for s in table]}


@pytest.mark.parametrize(("phase", "event"), [move for move in MOVES if move in LEGAL])
def test_a_legal_move_leads_where_the_table_says(phase, event) -> None:
    table = _sequences()
    sequence = _bring(table, phase)
    _do(table, sequence, event)
    assert sequence.phase is LEGAL[phase, event]
    assert (table.get("s") is None) == (sequence.phase is Phase.ENDED)
    assert (table.stream[0] == NONE) == (sequence.phase is not Phase.ATTACHED)


@pytest.mark.parametrize(("phase", "event"), [move for move in MOVES if move not in LEGAL])
def test_an_illegal_move_raises_and_changes_nothing(phase, event) -> None:
    table = _sequences()
    sequence = _bring(table, phase)
    before = _books(table)
    with pytest.raises(IllegalTransitionError, match=rf"{event.name} .* {phase.name}"):
        _do(table, sequence, event)
    assert sequence.phase is phase
    np.testing.assert_equal(_books(table), before)


def test_a_new_sequence_stands_at_its_step_with_nothing_held() -> None:
    table = _sequences()
    _create(table, step=7, slot=3)
    assert (table.step[3], table.sent[3], table.received[3]) == (7, 7, 7)
    assert table.held_from(3) == 7


def test_attaching_changes_hands() -> None:
    table = _sequences()
    sequence = _create(table)
    generation = table.generation[:1].copy()
    table.step[0] = 5
    table.sent[0] = 9  # of a lane that is gone
    table.is_faulted[0] = True
    assert table.is_same(np.array([0]), generation).all()
    table.attach(sequence, stream=2, lane=6, now=1)
    assert (table.stream[0], table.lane[0], table.sent[0]) == (2, 6, 5)
    assert not table.is_faulted[0]
    assert not table.is_same(np.array([0]), generation).any()


def test_nothing_is_held_for_a_sequence_without_writer() -> None:
    table = _sequences()
    sequence = _create(table, writer=b"")
    table.attach(sequence, stream=1, lane=0, now=0)
    table.step[0] = 5
    assert table.held_from(0) == 5


def test_epochs_rise_and_never_come_again() -> None:
    table = _sequences()
    epochs = [table.raise_epoch() for _ in range(100)]
    assert epochs == sorted(set(epochs))
    assert epochs[0] > 0  # 0 is what an unknown id has


def test_a_tombstone_tells_why_until_its_time_is_over() -> None:
    table = _sequences(tombstone_seconds=10)
    table.end(_create(table), "it was idle", now=5)
    record = table.record("s")
    assert (record.is_alive, record.ending, record.writer) == (False, "it was idle", b"w")
    table.forget_tombstones(now=14.9)
    assert table.record("s") is record
    table.forget_tombstones(now=15)
    assert table.record("s") is None


def test_tombstones_are_bounded_and_the_oldest_goes_first() -> None:
    table = _sequences(tombstones_max=2)
    for name in ("a", "b", "c"):
        table.end(_create(table, name), "over", now=0)
    assert [table.record(name) is None for name in ("a", "b", "c")] == [True, False, False]


def test_a_sequence_that_starts_over_has_no_tombstone_and_its_next_one_lasts() -> None:
    table = _sequences(tombstone_seconds=10)
    table.end(_create(table, "a"), "over", now=0)
    table.end(_create(table, "b"), "over", now=1)
    again = _create(table, "a")
    assert table.record("a").is_alive
    table.forget_tombstones(now=9)
    assert table.record("a").is_alive
    table.end(again, "over again", now=8)
    table.forget_tombstones(now=17)
    assert table.record("b") is None
    assert table.record("a").ending == "over again"


def test_only_what_rests_is_idle() -> None:
    table = _sequences()
    for slot, name in enumerate(("fresh", "old", "runs", "ended")):
        sequence = _create(table, name, slot)
        table.active[slot] = 100 if name == "fresh" else 1
        table.is_running[slot] = name == "runs"
    table.end(sequence, "over", now=1)
    assert [found.sequence_id for found in table.idle(before=50)] == ["old"]
    assert not list(table.idle(before=1))


def test_what_changes_while_others_expire_is_looked_at_again() -> None:
    table = _sequences()
    first, moved, runs, ended = (_create(table, name, slot) for slot, name in enumerate("abcd"))
    found = table.idle(before=50)
    assert next(found) is first
    table.active[moved.slot] = 60
    table.is_running[runs.slot] = True
    table.end(ended, "over", now=60)
    assert not list(found)


def test_parked_counts_those_on_no_stream() -> None:
    table = _sequences()
    sequences = [_create(table, name, slot) for slot, name in enumerate("abc")]
    table.attach(sequences[1], stream=4, lane=0, now=0)
    assert (len(table), table.parked) == (3, 2)
