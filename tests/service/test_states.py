"""The memory of all states: rows in, the same rows out, and no slot to two sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sluice_model import ModelError
from sluice_service.sequences.states import States

SLOTS = 6
INITIAL = np.array([1, 2, 3], np.float32)


@given(st.data())
def test_what_is_put_is_taken(data) -> None:
    everything = States(20, INITIAL)
    slots = np.array([everything.allocate() for _ in range(20)])
    chosen = np.array(data.draw(st.lists(st.sampled_from(slots.tolist()), unique=True)), np.int64)
    states = np.random.default_rng(0).standard_normal((len(chosen), 3)).astype(np.float32)
    everything.put(chosen, states)
    assert (everything.take(chosen) == states).all()
    others = np.setdiff1d(slots, chosen)
    assert (everything.take(others) == INITIAL).all()


def test_what_is_taken_is_a_copy() -> None:
    everything = States(2, INITIAL)
    slot = np.array([everything.allocate()])
    taken = everything.take(slot)
    everything.put(slot, taken + 1)
    assert (taken == INITIAL).all()


class StatesMachine(RuleBasedStateMachine):
    """All states against a dictionary of rows, in planes of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.all = States(SLOTS, INITIAL)
        self.initial = INITIAL.tolist()
        self.newest = 0
        self.planes = {0}
        self.rows: dict[int, list[float]] = {}
        self.plane: dict[int, int] = {}

    @precondition(lambda self: len(self.planes) < 3)
    @rule(initial=st.lists(st.integers(0, 9), min_size=1, max_size=5))
    def begin_plane(self, initial) -> None:
        self.initial = initial
        self.newest = self.all.begin_plane(np.array(initial, np.float32))
        assert self.newest not in self.planes
        self.planes.add(self.newest)

    @rule()
    def drop_planes(self) -> None:
        for number in self.planes - {self.newest, *self.plane.values()}:
            self.all.drop_plane(number)
            self.planes.remove(number)

    @rule(value=st.none() | st.integers(0, 9))
    def allocate(self, value) -> None:
        if len(self.rows) == SLOTS:
            with pytest.raises(IndexError):
                self.all.allocate()
            return
        row = self.initial if value is None else [value] * len(self.initial)
        slot = self.all.allocate(None if value is None else np.array(row, np.float32))
        assert slot not in self.rows
        self.rows[slot], self.plane[slot] = row, self.newest

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        del self.rows[slot], self.plane[slot]
        self.all.free(slot)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), value=st.integers(10, 99))
    def put(self, data, value) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.rows)), unique=True))
        states = np.full((len(slots), self.all.row_size), value, np.float32)
        self.all.put(np.array(slots, np.int64), states)
        for slot in slots:
            self.rows[slot] = [value] * len(self.rows[slot])

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def reset(self, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.rows)))
        self.all.reset(slot)
        self.rows[slot], self.plane[slot] = self.initial, self.newest

    @invariant()
    def agrees(self) -> None:
        slots = sorted(self.rows)
        taken = self.all.take(np.array(slots, np.int64))
        for slot, state in zip(slots, taken.tolist(), strict=True):
            row = self.rows[slot]
            assert state[: len(row)] == row
            assert self.all.row(slot).tolist() == row
            assert self.all.plane_of(slot) == self.plane[slot]
        assert self.all.live == len(slots)
        assert self.all.is_full == (len(slots) == SLOTS)


TestStates = StatesMachine.TestCase


@pytest.mark.parametrize("size", [2**42, 2**52])
def test_states_that_no_memory_holds_are_refused_and_change_nothing(size) -> None:
    everything = States(1024, INITIAL)
    with pytest.raises(ModelError, match=r"1,024 sequences .* lower --sequences-max"):
        everything.begin_plane(np.broadcast_to(np.float32(0), size))
    slot = np.array([everything.allocate()])
    assert everything.take(slot).tolist() == [INITIAL.tolist()]


def test_a_freed_slot_holds_the_initial_state_for_the_next_sequence() -> None:
    for initial in (INITIAL, np.zeros(3, np.float32)):
        everything = States(1, initial)
        slot = everything.allocate()
        everything.put(np.array([slot]), np.full((1, 3), 9, np.float32))
        everything.free(slot)
        assert everything.allocate() == slot
        assert (everything.take(np.array([slot])) == initial).all()
