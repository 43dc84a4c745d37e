"""The memory of all states: rows in, the same rows out, and no slot to two sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sluice_service.arena import Arena

SLOTS = 6
INITIAL = np.array([1, 2, 3], np.float32)


@given(st.data())
def test_what_is_put_is_taken(data) -> None:
    arena = Arena(20, INITIAL)
    slots = np.array([arena.allocate() for _ in range(20)])
    chosen = np.array(data.draw(st.lists(st.sampled_from(slots.tolist()), unique=True)), np.int64)
    states = np.random.default_rng(0).standard_normal((len(chosen), 3)).astype(np.float32)
    arena.put(chosen, states)
    assert (arena.take(chosen) == states).all()
    others = np.setdiff1d(slots, chosen)
    assert (arena.take(others) == INITIAL).all()


def test_what_is_taken_is_a_copy() -> None:
    arena = Arena(2, INITIAL)
    slot = np.array([arena.allocate()])
    taken = arena.take(slot)
    arena.put(slot, taken + 1)
    assert (taken == INITIAL).all()


class ArenaMachine(RuleBasedStateMachine):
    """An arena against a dictionary of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(SLOTS, INITIAL)
        self.rows: dict[int, list[float]] = {}

    @rule(row=st.none() | st.lists(st.integers(0, 9), min_size=3, max_size=3))
    def allocate(self, row) -> None:
        if len(self.rows) == SLOTS:
            with pytest.raises(IndexError):
                self.arena.allocate()
            return
        slot = self.arena.allocate(None if row is None else np.array(row, np.float32))
        assert slot not in self.rows
        self.rows[slot] = INITIAL.tolist() if row is None else row

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        del self.rows[slot]
        self.arena.free(slot)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), value=st.integers(10, 99))
    def put(self, data, value) -> None:
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        self.arena.put(np.array([slot]), np.full((1, 3), value, np.float32))
        self.rows[slot] = [value] * 3

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def reset(self, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        self.arena.reset(slot)
        self.rows[slot] = INITIAL.tolist()

    @invariant()
    def agrees(self) -> None:
        slots = sorted(self.rows)
        assert self.arena.take(np.array(slots, np.int64)).tolist() == [
            self.rows[slot] for slot in slots
        ]
        assert self.arena.live == len(slots)
        assert self.arena.is_full == (len(slots) == SLOTS)


TestArena = ArenaMachine.TestCase


def test_a_freed_slot_holds_the_initial_state_for_the_next_sequence() -> None:
    for initial in (INITIAL, np.zeros(3, np.float32)):
        arena = Arena(1, initial)
        slot = arena.allocate()
        arena.put(np.array([slot]), np.full((1, 3), 9, np.float32))
        arena.free(slot)
        assert arena.allocate() == slot
        assert (arena.take(np.array([slot])) == initial).all()
