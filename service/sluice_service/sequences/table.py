"""Holds all sequences of one model and their columns, which only this table writes.

It does no I/O and has no clock. `now` is the seconds in which this process was awake.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sluice_service.arrays import Integers
from sluice_service.sequences.lifecycle import Event, Sequence
from sluice_service.sequences.states import Slots, StateRows, States
from sluice_service.sequences.tombstones import Tombstones
from sluice_service.store.claims import Durability, Record

NONE = -1
# The value of `received` for a client without a writer, for which nothing is held, and of
# `durable` for a sequence that is in no store, so that nothing waits for it.
ALL = 1 << 62
Scalar = TypeVar("Scalar", bound=np.generic)


class SequenceTable:
    """All sequences of one model: by id, by slot, and in columns by slot.

    A run reads the columns for its whole batch at once. They are read-only views. To change
    one, call the method that is named for the reason. It also derives what depends on the
    change (how far a sequence may run).
    """

    def __init__(
        self,
        states: States,
        slots: int,
        *,
        now: Callable[[], float],
        tombstone_seconds: float,
        unacknowledged_steps_max: int,
        undurable_steps_max: int,
    ) -> None:
        self.states = states
        self.now = now
        self._by_id: dict[str, Sequence] = {}
        self._by_slot: list[Sequence | None] = [None] * slots
        self._tombstones = Tombstones(count_max=slots, seconds=tombstone_seconds)
        self._unacknowledged_steps_max = unacknowledged_steps_max
        self._undurable_steps_max = undurable_steps_max
        self._epoch = 0
        # Called when a sequence has ended and there may be room.
        self.on_gone: Callable[[], None] = lambda: None
        # Called with stalled slots that may continue.
        self.on_resumed: Callable[[Slots], None] = lambda _: None
        self.has_strict = False  # once there was one

        self._step, self.step = _column(slots, np.int64)  # applied
        self._sent, self.sent = _column(slots, np.int64)  # what the lane's next chunk follows
        self._received, self.received = _column(slots, np.int64)  # acknowledged by the client
        self._durable, self.durable = _column(slots, np.int64, ALL)  # safe in the store
        self._limit, self.limit = _column(slots, np.int64)  # not run beyond
        self._is_stalled, self.is_stalled = _column(slots, np.bool_)  # waits at its limit
        self._is_strict, self.is_strict = _column(slots, np.bool_)  # only durable outputs are sent
        self._stream, self.stream = _column(slots, np.int64, NONE)  # the number of its stream
        self._lane, self.lane = _column(slots, np.int64)
        self._active, self.active = _column(slots, np.float64)  # when it last did something
        # How often the slot has changed hands.
        self._generation, self.generation = _column(slots, np.int64)
        self._is_alive, self.is_alive = _column(slots, np.bool_)
        self._is_running, self.is_running = _column(slots, np.bool_)  # in a thread
        # Chunks are dropped until one begins at `step`.
        self._is_faulted, self.is_faulted = _column(slots, np.bool_)
        # Nothing queued, nothing faulted: the next chunk may go directly into a run.
        self._is_direct, self.is_direct = _column(slots, np.bool_, True)

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def slots(self) -> int:
        """How many sequences may live."""
        return len(self._by_slot)

    @property
    def parked(self) -> int:
        """How many are on no stream."""
        return int((self._is_alive & (self._stream == NONE)).sum())

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def get(self, sequence_id: str) -> Sequence | None:
        """The live sequence of that id."""
        return self._by_id.get(sequence_id)

    def at(self, slot: int) -> Sequence:
        """The live sequence in that slot."""
        sequence = self._by_slot[slot]
        assert sequence is not None
        return sequence

    def record(self, sequence_id: str) -> Record | None:
        """The owner of that id, live or closed."""
        sequence = self._by_id.get(sequence_id)
        return sequence.record if sequence is not None else self._tombstones.get(sequence_id)

    def raise_epoch(self) -> int:
        """A new epoch, never issued before."""
        self._epoch += 1
        return self._epoch

    # The lifecycle.

    def create(
        self,
        sequence_id: str,
        record: Record,
        *,
        step: int,
        row: StateRows | None = None,
        plane: int | None = None,
    ) -> Sequence:
        """A parked sequence at `step`, with the state `row` [state_size] or the initial one.

        Raises IndexError when all slots are in use.
        """
        slot = self.states.allocate(row, plane)
        sequence = Sequence(sequence_id, slot, record)
        self._tombstones.remove(sequence_id)
        self._by_id[sequence_id] = sequence
        self._by_slot[slot] = sequence
        self._durable[slot] = ALL
        self._is_strict[slot] = False
        self._rewind(slot, step)
        self._stream[slot] = NONE
        self._active[slot] = self.now()
        self._is_alive[slot] = True
        self._is_running[slot] = False
        return sequence

    def own(
        self, sequence: Sequence, claim_id: bytes, durability: Durability, durable_step: int
    ) -> None:
        """Note that this process owns a sequence in the store, durable up to `durable_step`."""
        slot = sequence.slot
        sequence.claim_id = claim_id
        sequence.durability = durability
        self._durable[slot] = durable_step
        self._is_strict[slot] = durability is Durability.STRICT
        self.has_strict |= durability is Durability.STRICT
        self._derive_limit(slot)

    def begin_again(
        self, sequence: Sequence, *, step: int, row: StateRows | None, plane: int | None
    ) -> None:
        """Reset a sequence to `step` with the state `row` or the initial one."""
        self.states.reset(sequence.slot, row, plane)
        self._rewind(sequence.slot, step)
        sequence.held.clear()

    def attach(self, sequence: Sequence, stream: int, lane: int) -> None:
        """Put a sequence on a lane of a stream; its chunks follow the steps applied."""
        sequence.move(Event.ATTACH)
        slot = sequence.slot
        self._stream[slot] = stream
        self._lane[slot] = lane
        self._sent[slot] = self._step[slot]
        self._active[slot] = self.now()
        # Outputs of an earlier lane can no longer be acknowledged.
        self._generation[slot] += 1
        if sequence.is_anonymous and not sequence.is_counted:
            self._received[slot] = ALL
            self._derive_limit(slot)
        self._is_faulted[slot] = False
        self._is_direct[slot] = True

    def detach(self, sequence: Sequence) -> None:
        """Park a sequence: it stays live, on no stream."""
        sequence.move(Event.DETACH)
        self._stream[sequence.slot] = NONE
        # The outputs that it holds now are sent on its next lane only.
        self._generation[sequence.slot] += 1

    def end(self, sequence: Sequence, ending: str) -> None:
        """Remove a sequence; a tombstone keeps `ending`, the reason, for its writer."""
        self.forget(sequence)
        self._tombstones.add(sequence.sequence_id, sequence.record, ending, self.now())

    def forget(self, sequence: Sequence) -> None:
        """Remove a sequence without a tombstone, because the store knows its end."""
        sequence.move(Event.END)
        slot = sequence.slot
        del self._by_id[sequence.sequence_id]
        self._by_slot[slot] = None
        self._is_alive[slot] = False
        self._durable[slot] = ALL
        self._is_strict[slot] = False
        self._stream[slot] = NONE
        self._generation[slot] += 1
        sequence.held.clear()
        self.states.free(slot)
        self.on_gone()

    def drop_tombstones(self) -> bool:
        """Drop tombstones whose time is over; True if there may be more of them."""
        return self._tombstones.drop_expired(self.now())

    # Chunks on their way to a run.

    def note_queued(self, slots: Slots, sent: Integers) -> None:
        """Chunks of `slots` [n] are in their queues; the next ones follow `sent` [n] steps."""
        self._sent[slots] = sent
        self._is_direct[slots] = False

    def note_direct(self, slots: Slots, sent: Integers) -> None:
        """Chunks of `slots` [n] go directly into a run; the next ones follow `sent` [n] steps."""
        self._sent[slots] = sent

    def begin_run(self, slots: Slots) -> None:
        """A thread runs `slots` [batch] now."""
        self._is_running[slots] = True
        self._is_direct[slots] = False

    def end_run(self, slots: Slots) -> None:
        """No thread runs `slots` [batch] any more."""
        self._is_running[slots] = False

    def derive_direct(self, slots: Slots, is_queue_empty: NDArray[np.bool_]) -> None:
        """Note after a run of `slots` [n] whether their next chunks may go directly into a run."""
        self._is_direct[slots] = (
            is_queue_empty & ~self._is_faulted[slots] & (self._sent[slots] == self._step[slots])
        )

    def fault(self, slot: int) -> None:
        """Let a slot drop its lane's chunks until one names the slot's step."""
        self._is_faulted[slot] = True
        self._is_direct[slot] = False

    def clear_fault(self, slot: int) -> None:
        """Note that the chunk that a faulted slot waited for has arrived."""
        self._is_faulted[slot] = False

    def apply(
        self,
        slots: Slots,
        steps: Integers,
        states: StateRows,
        is_applied: NDArray[np.bool_] | None,
    ) -> None:
        """Store a run's states; the sequences are at `steps` now.

        `slots`, `steps` and `is_applied` are [batch], `states` [batch, state_size]; None: all are
        applied.
        """
        self._active[slots] = self.now()
        if is_applied is not None:
            slots, steps, states = slots[is_applied], steps[is_applied], states[is_applied]
        self._step[slots] = steps
        self.states.put(slots, states)

    # How far a sequence may run.

    def acknowledge(self, slots: Slots, ends: Integers) -> None:
        """Note that the clients of `slots` [n], all different, have the outputs up to `ends` [n].

        A client cannot have more than was applied, even if it says so. `received` only rises.
        """
        self._received[slots] = np.maximum(
            self._received[slots], np.minimum(ends, self._step[slots])
        )
        self._derive_limits(slots)

    def set_received(self, sequence: Sequence, step: int) -> None:
        """Note that the client that opens a sequence has its outputs up to `step`."""
        self._received[sequence.slot] = step
        self._derive_limit(sequence.slot)

    def note_durable(self, slots: Slots, steps: Integers) -> None:
        """Note that the store has `slots` [n], all different, up to `steps` [n]."""
        self._durable[slots] = np.maximum(self._durable[slots], steps)
        self._derive_limits(slots)

    def wait_for_clients(self, slots: Slots) -> NDArray[np.bool_]:
        """[n] whether each of `slots` can only continue after an acknowledgement."""
        unacknowledged = self._step[slots] - self._received[slots]
        return np.asarray(unacknowledged >= self._unacknowledged_steps_max)

    def held_from(self, slot: int) -> int:
        """The first output that is held for a slot's client."""
        return int(min(self._received[slot], self._step[slot]))

    def _rewind(self, slot: int, step: int) -> None:
        """Set a slot to `step`, with nothing sent, held or faulted."""
        self._step[slot] = self._sent[slot] = self._received[slot] = step
        self._is_faulted[slot] = False
        self._derive_limit(slot)

    def stall(self, slots: Slots | int) -> None:
        """Let `slots` [n] wait until their limit is raised, when `on_resumed` is called."""
        self._is_stalled[slots] = True

    def clear_stall(self, slot: int) -> None:
        """Note that a slot waits for nothing any more, because its queue is empty."""
        self._is_stalled[slot] = False

    def _derive_limits(self, slots: Slots) -> None:
        self._limit[slots] = np.minimum(
            self._received[slots] + self._unacknowledged_steps_max,
            self._durable[slots] + self._undurable_steps_max,
        )
        is_stalled = self._is_stalled[slots]
        if is_stalled.any():
            self._resume(np.unique(slots[is_stalled]))

    def _derive_limit(self, slot: int) -> None:
        """As `_derive_limits`, for one slot: plain numbers cost far less than arrays of one."""
        self._limit[slot] = min(
            self._received[slot] + self._unacknowledged_steps_max,
            self._durable[slot] + self._undurable_steps_max,
        )
        if self._is_stalled[slot]:
            self._resume(np.array([slot]))

    def _resume(self, slots: Slots) -> None:
        self._is_stalled[slots] = False
        self.on_resumed(slots)

    # Time.

    def touch(self, sequence: Sequence) -> None:
        """Note that a sequence is active now."""
        self._active[sequence.slot] = self.now()

    def touch_durable(self) -> None:
        """Restart the idle time of all durable sequences."""
        self._active[self._durable < ALL] = self.now()

    def idle(self, before: float) -> Iterator[Sequence]:
        """Yield the sequences that did nothing since `before` and are in no run.

        Each is checked again when its turn comes, because time may pass in between.
        """

        def is_idle(chosen: int | slice) -> NDArray[np.bool_]:
            was_idle = self._is_alive[chosen] & (self._active[chosen] < before)
            return np.asarray(was_idle & ~self._is_running[chosen])

        for slot in np.flatnonzero(is_idle(slice(None))).tolist():
            if is_idle(slot):
                yield self.at(slot)

    def is_same(self, slots: Slots, generations: Integers) -> NDArray[np.bool_]:
        """[n] whether each slot still has that generation."""
        same: NDArray[np.bool_] = self._generation[slots] == generations
        return same


def _column(
    slots: int, dtype: type[Scalar], value: object = 0
) -> tuple[NDArray[Scalar], NDArray[Scalar]]:
    """A column [slots], and the read-only view of it for all other modules."""
    column = np.full(slots, value, dtype)
    view = column.view()
    view.flags.writeable = False
    return column, view
