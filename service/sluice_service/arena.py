"""Holds the packed state of every live sequence of one model, one row a sequence."""

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class Arena:
    """`rows` [slots, state_size] float32, reserved once and never copied to grow.

    The operating system gives memory only to rows that have been written, and
    freed rows are used again first, so memory follows the live sequences.
    """

    def __init__(self, slots: int, initial: NDArray[np.float32]) -> None:
        """Reserve `slots` rows; `initial` [state_size] is what a new row holds."""
        self._rows = np.zeros((slots, len(initial)), np.float32)
        self._initial = initial
        self._has_zero_start = not initial.any()
        self._freed: list[int] = []
        self._untouched = 0

    @property
    def row_bytes(self) -> int:
        """The bytes of one state."""
        return self._initial.nbytes

    @property
    def row_size(self) -> int:
        """The floats of one state."""
        return len(self._initial)

    @property
    def live(self) -> int:
        """The rows allocated."""
        return self._untouched - len(self._freed)

    @property
    def is_full(self) -> bool:
        """True when every row is allocated."""
        return self.live == len(self._rows)

    def allocate(self, row: NDArray[np.float32] | None = None) -> int:
        """A slot that holds `row` [state_size], or else the initial state.

        Raises IndexError when the arena is full.
        """
        if self._freed:
            slot = self._freed.pop()
            self._rows[slot] = self._initial
        else:
            if self._untouched == len(self._rows):
                raise IndexError("the arena is full")
            slot = self._untouched
            self._untouched += 1
            if not self._has_zero_start:
                self._rows[slot] = self._initial
        if row is not None:
            self._rows[slot] = row
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back."""
        self._freed.append(slot)

    def reset(self, slot: int, row: NDArray[np.float32] | None = None) -> None:
        """Put `row` [state_size], or else the initial state, into a slot."""
        self._rows[slot] = self._initial if row is None else row

    def take(self, slots: Slots) -> NDArray[np.float32]:
        """The states of `slots` [batch], copied: [batch, state_size]."""
        return self._rows.take(slots, axis=0)

    def put(self, slots: Slots, states: NDArray[np.float32]) -> None:
        """Store `states` [batch, state_size]; the inverse of `take`."""
        self._rows[slots] = states
