"""What waits for the store: sequences that are due for a checkpoint, and those that have left."""

import asyncio
from collections.abc import Sequence

import numpy as np

from sluice_service.sequences.events import EndReason
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import ALL, NONE, SequenceTable
from sluice_service.serving.attachments import Departure

# In one transaction: more would hold the event loop up while they are packed.
BATCH_MAX = 256
# As much of it is left for periodic sequences: strict ones alone could fill it for ever.
_PERIODIC_BATCH_MIN = 64


class Pending:
    """What one model's store is to be asked next, and the signal that there is something."""

    def __init__(self, table: SequenceTable, *, checkpoint_steps: int) -> None:
        self._table = table
        self._checkpoint_steps = checkpoint_steps
        self._is_due = np.zeros(table.slots, np.bool_)  # its time has come
        # A client or a drain waits for a checkpoint after which nothing more runs.
        self._is_final = np.zeros(table.slots, np.bool_)
        # The slots that were written last.
        self._last_strict = self._last_periodic = NONE
        self._parks: list[Departure] = []
        self._ends: list[Departure] = []
        self._is_flushing = False
        self.signal = asyncio.Event()

    # What comes in.

    def add(self, departure: Departure) -> None:
        """A durable sequence has left its lane: its checkpoint, or its end, goes to the store."""
        if departure.reason is EndReason.PARKED:
            self._parks.append(departure)
            self._is_final[departure.sequence.slot] = True
        else:
            self._ends.append(departure)
        self.signal.set()

    def note_applied(self, slots: Slots) -> None:
        """Steps of `slots` [n] were applied: see whether a checkpoint is due now."""
        table = self._table
        if self._is_flushing:
            # What a write or an acknowledgement has let run on is written once more.
            self._is_final[slots] |= table.durable[slots] < ALL
        behind = table.step[slots] - table.durable[slots]
        is_strict = table.is_strict[slots]
        if (behind >= np.where(is_strict, 1, self._checkpoint_steps)).any():
            self.signal.set()

    def note_time(self) -> None:
        """The time between checkpoints is over: whatever is behind is due."""
        self._is_due |= self._table.step > self._table.durable

    def begin_flush(self) -> None:
        """Write every durable sequence once more; nothing new comes."""
        self._is_flushing = True
        self._is_final |= self._table.is_alive & (self._table.durable < ALL)

    # Checkpoints.

    @property
    def is_flushed(self) -> bool:
        """True when no client and no drain waits for the store."""
        return not self._is_final.any() and not self._ends

    @property
    def has_ends(self) -> bool:
        """True while the store has not heard of every end."""
        return bool(self._ends)

    def is_safe(self, slot: int) -> bool:
        """True when the store has all there is of a slot, or has nothing to do with it."""
        table = self._table
        return not self._is_final[slot] and bool(table.step[slot] <= table.durable[slot])

    def choose(self) -> Slots:
        """Which slots to write next: most of them strict, for their clients wait."""
        table = self._table
        behind = np.flatnonzero((table.step > table.durable) | self._is_final)
        lag = table.step[behind] - table.durable[behind]
        is_strict = table.is_strict[behind]
        is_due = self._is_due[behind] | self._is_final[behind]
        is_due |= lag >= self._checkpoint_steps
        # In turns, so that those that are always behind leave room for the others.
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
        """Of `slots` [n], those that run on and those that nothing more runs on; between runs."""
        table = self._table
        # An open may have been faster than a park; and a slot that has changed hands may have a
        # sequence now with which the store has nothing to do.
        is_overtaken = (table.stream[slots] != NONE) & (not self._is_flushing)
        self._is_final[slots[is_overtaken | (table.durable[slots] == ALL)]] = False
        is_final = self._is_final[slots]
        return slots[~is_final], slots[is_final]

    def note_written(self, slots: Slots) -> None:
        """The store has answered about `slots` [n]: none of them is due any more."""
        self._is_due[slots] = False

    def note_final(self, slot: int) -> None:
        """A slot's final checkpoint is written, or its sequence is gone."""
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
        """The next ends that the store is to hear of, taken out."""
        ends = self._ends[:BATCH_MAX]
        del self._ends[: len(ends)]
        return ends

    def put_back_ends(self, departures: Sequence[Departure]) -> None:
        """Let ends wait again; of those of one sequence, the one that its client waits for."""
        waiting = sorted([*self._ends, *departures], key=lambda one: one.stream)
        self._ends = list({one.claim_id: one for one in waiting}.values())
        self.signal.set()


def _rotate(slots: Slots, last: int) -> Slots:
    """The same `slots` [n], which rise, those beyond `last` first."""
    rolled: Slots = np.roll(slots, -int(np.searchsorted(slots, last, side="right")))
    return rolled
