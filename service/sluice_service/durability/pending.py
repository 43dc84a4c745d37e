"""Holds what waits for the store: sequences due for a checkpoint, and departures."""

import asyncio
from collections.abc import Sequence

import numpy as np

from sluice_service.sequences.events import EndReason
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import ALL, NONE, SequenceTable
from sluice_service.serving.attachments import Departure

# In one transaction. Packing more would block the event loop.
BATCH_MAX = 256
# This part is for periodic sequences: strict ones alone could always fill a transaction.
_PERIODIC_BATCH_MIN = 64


class Pending:
    """The next work for one model's store, and a signal that there is some."""

    def __init__(self, table: SequenceTable, *, checkpoint_steps: int) -> None:
        self._table = table
        self._checkpoint_steps = checkpoint_steps
        self._is_due = np.zeros(table.slots, np.bool_)  # whose checkpoint is due
        # A client or a drain waits for a checkpoint after which nothing more runs.
        self._is_final = np.zeros(table.slots, np.bool_)
        # The slots that were written last.
        self._last_strict = self._last_periodic = NONE
        self._parks: list[Departure] = []
        self._ends: list[Departure] = []
        self._is_flushing = False
        self.signal = asyncio.Event()

    # Additions.

    def add(self, departure: Departure) -> None:
        """Add a durable sequence that has left its lane, for its checkpoint or its end."""
        if departure.reason is EndReason.PARKED:
            self._parks.append(departure)
            self._is_final[departure.sequence.slot] = True
        else:
            self._ends.append(departure)
        self.signal.set()

    def note_applied(self, slots: Slots) -> None:
        """Note that steps of `slots` [n] were applied, which may make a checkpoint due."""
        table = self._table
        if self._is_flushing:
            # Sequences that continue after a write or an acknowledgement are written once more.
            self._is_final[slots] |= table.durable[slots] < ALL
        behind = table.step[slots] - table.durable[slots]
        is_strict = table.is_strict[slots]
        if (behind >= np.where(is_strict, 1, self._checkpoint_steps)).any():
            self.signal.set()

    def note_time(self) -> None:
        """Make every sequence due that is ahead of the store, because it is time."""
        self._is_due |= self._table.step > self._table.durable

    def begin_flush(self) -> None:
        """Make every durable sequence due once more. No new steps arrive."""
        self._is_flushing = True
        self._is_final |= self._table.is_alive & (self._table.durable < ALL)

    # Checkpoints.

    @property
    def is_flushed(self) -> bool:
        """True if no client and no drain waits for the store."""
        return not self._is_final.any() and not self._ends

    @property
    def has_ends(self) -> bool:
        """True while there are ends that the store has not been told."""
        return bool(self._ends)

    def is_safe(self, slot: int) -> bool:
        """True if the store has everything of a slot, or does not need it."""
        table = self._table
        return not self._is_final[slot] and bool(table.step[slot] <= table.durable[slot])

    def choose(self) -> Slots:
        """Which slots to write next. Most are strict, because their clients wait."""
        table = self._table
        behind = np.flatnonzero((table.step > table.durable) | self._is_final)
        lag = table.step[behind] - table.durable[behind]
        is_strict = table.is_strict[behind]
        is_due = self._is_due[behind] | self._is_final[behind]
        is_due |= lag >= self._checkpoint_steps
        # In rotation, so that sequences that are always due leave room for others.
        strict = _rotate(behind[is_strict], self._last_strict)
        periodic = _rotate(behind[is_due & ~is_strict], self._last_periodic)
        strict = strict[: BATCH_MAX - min(len(periodic), _PERIODIC_BATCH_MIN)]
        periodic = periodic[: BATCH_MAX - len(strict)]
        if len(strict):
            self._last_strict = int(strict[-1])
        if len(periodic):
            self._last_periodic = int(periodic[-1])
        chosen: Slots = np.r_[strict, periodic]
        return chosen

    def split_final(self, slots: Slots) -> tuple[Slots, Slots]:
        """Split `slots` [n] into those that still run and those that do not; between runs."""
        table = self._table
        # An open may have overtaken a park. And a slot that has changed hands may now have a
        # sequence that is not in the store.
        is_overtaken = (table.stream[slots] != NONE) & (not self._is_flushing)
        self._is_final[slots[is_overtaken | (table.durable[slots] == ALL)]] = False
        is_final = self._is_final[slots]
        return slots[~is_final], slots[is_final]

    def note_written(self, slots: Slots) -> None:
        """Note that the store has answered about `slots` [n]: none of them is due any more."""
        self._is_due[slots] = False

    def note_final(self, slot: int) -> None:
        """Forget a slot: its final checkpoint is written, or its sequence is gone."""
        self._is_final[slot] = False

    def take_concluded_parks(self) -> list[Departure]:
        """The parks that are stored, and those that another open has overtaken."""
        parks, self._parks = self._parks, []
        concluded = []
        for park in parks:
            if park.is_current and self._is_final[park.sequence.slot]:
                self._parks.append(park)
            else:
                concluded.append(park)
        return concluded

    # Ends.

    def take_ends(self) -> list[Departure]:
        """Take out the next ends to tell the store."""
        ends = self._ends[:BATCH_MAX]
        del self._ends[: len(ends)]
        return ends

    def put_back_ends(self, departures: Sequence[Departure]) -> None:
        """Put ends back. Of several ends of a sequence, keep the one its client waits for."""
        waiting = sorted([*self._ends, *departures], key=lambda one: one.stream)
        self._ends = list({one.claim_id: one for one in waiting}.values())
        self.signal.set()


def _rotate(slots: Slots, last: int) -> Slots:
    """Rotate ascending `slots` [n], so that those above `last` come first."""
    rolled: Slots = np.roll(slots, -int(np.searchsorted(slots, last, side="right")))
    return rolled
