"""Holds the packed state of every live sequence of one model, one row per sequence."""

import mmap

import numpy as np
from numpy.typing import NDArray

from sluice_model import ModelError

Slots = NDArray[np.int64]
StateRows = NDArray[np.float32]


class States:
    """`rows` [slots, state_size] float32, reserved once and never copied to grow.

    Only rows that have been written take memory, and freed rows are used again first, so
    memory follows the number of live sequences. Each version of the model has its own plane
    of rows. A slot is in the plane in which its sequence began.
    """

    def __init__(self, slots: int, initial: StateRows) -> None:
        """Reserve `slots` rows; `initial` [state_size] is the content of a new row."""
        self._slots = slots
        self._planes: dict[int, _Plane] = {}
        self._plane = np.zeros(slots, np.int64)  # of each slot
        self._freed: list[int] = []
        self._untouched = 0
        self.begin_plane(initial)

    # Planes.

    def begin_plane(self, initial: StateRows) -> int:
        """A new plane whose rows begin as `initial` [state_size], for all sequences from now on.

        Raises ModelError if there is no room for it. Then nothing has changed.
        """
        number = max(self._planes, default=-1) + 1
        self._planes[number] = _Plane(number, self._slots, initial)
        self.turn_to(number)
        return number

    def turn_to(self, number: int) -> None:
        """Let sequences begin in that plane from now on."""
        self._newest = self._planes[number]
        self._has_one_plane = len(self._planes) == 1

    def drop_plane(self, number: int) -> None:
        """Free a plane's memory; no slot is in it, and no sequence begins there."""
        del self._planes[number]
        self._has_one_plane = len(self._planes) == 1

    def planes(self, slots: Slots) -> NDArray[np.int64]:
        """The plane of each of `slots` [batch]: [batch]."""
        return self._plane.take(slots)

    def plane_of(self, slot: int) -> int:
        """The plane of one slot."""
        return int(self._plane[slot])

    # Rows.

    @property
    def row_size(self) -> int:
        """The floats of the widest state."""
        return max(len(plane.initial) for plane in self._planes.values())

    @property
    def live(self) -> int:
        """The rows allocated."""
        return self._untouched - len(self._freed)

    @property
    def is_full(self) -> bool:
        """True when every row is allocated."""
        return self.live == self._slots

    def allocate(self, row: StateRows | None = None, plane_number: int | None = None) -> int:
        """Allocate a slot in the newest plane, with `row` [state_size] or the initial state.

        Raises IndexError when all slots are in use.
        """
        plane = self._newest if plane_number is None else self._planes[plane_number]
        if self.is_full:
            raise IndexError("all slots are in use")
        if self._freed:
            slot = self._freed.pop()
        else:
            slot = self._untouched
            self._untouched += 1
        self._plane[slot] = plane.number
        # Write it even if it is already zero. Otherwise the first run of hundreds of sequences
        # would write all that new memory at once, which takes long.
        plane.rows[slot] = plane.initial if row is None else row
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back."""
        self._freed.append(slot)

    def reset(
        self, slot: int, row: StateRows | None = None, plane_number: int | None = None
    ) -> None:
        """Reset a slot to `row` [state_size] or to the initial state."""
        plane = self._newest if plane_number is None else self._planes[plane_number]
        self._plane[slot] = plane.number
        plane.rows[slot] = plane.initial if row is None else row

    def row(self, slot: int) -> StateRows:
        """The state in one slot, copied: [state_size] of its plane."""
        row: StateRows = self._planes[int(self._plane[slot])].rows[slot].copy()
        return row

    def take(self, slots: Slots) -> StateRows:
        """The states of `slots` [batch], copied: [batch, state_size], narrow ones padded."""
        if self._has_one_plane:
            return self._newest.rows.take(slots, axis=0)
        where = self.planes(slots)
        numbers = np.unique(where).tolist()
        if len(numbers) == 1:
            return self._planes[numbers[0]].rows.take(slots, axis=0)
        states = np.zeros((len(slots), self.row_size), np.float32)
        for number in numbers:
            rows, chosen = self._planes[number].rows, where == number
            states[chosen, : rows.shape[1]] = rows[slots[chosen]]
        return states

    def put(self, slots: Slots, states: StateRows) -> None:
        """Store `states` [batch, state_size]; the inverse of `take`."""
        if self._has_one_plane:
            self._newest.rows[slots] = states
            return
        where = self.planes(slots)
        for number in np.unique(where).tolist():
            rows, chosen = self._planes[number].rows, where == number
            rows[slots[chosen]] = states[chosen, : rows.shape[1]]


class _Plane:
    """The rows of the sequences that began on one version."""

    __slots__ = ("initial", "number", "rows")

    def __init__(self, number: int, slots: int, initial: StateRows) -> None:
        self.number = number
        self.rows = _reserve(slots, len(initial))
        self.initial = initial


def _reserve(slots: int, size: int) -> StateRows:
    """Rows [slots, size] that take memory when they are written, one small page at a time.

    numpy would ask for huge pages. The system clears a whole huge page at its first write, which
    takes 0.3 ms, or 9 ms on a virtual machine that has to fetch it from its host. Raises
    ModelError if there is no room.
    """
    length = max(1, 4 * slots * size)
    try:
        reserved = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ModelError(
            f"{slots:,} sequences with states of {4 * size:,} bytes are more than this machine's "
            f"memory holds ({error}); lower --sequences-max"
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        reserved.madvise(mmap.MADV_NOHUGEPAGE)
    rows: StateRows = np.frombuffer(reserved, np.float32, slots * size).reshape(slots, size)
    return rows
