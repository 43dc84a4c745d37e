"""The lifecycle of every sequence of one model: who lives, where, and what comes next.

No I/O and no clock: `now` is an argument, in seconds of the time this process was awake.
"""

from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from sluice_service.sequences.states import Slots
from sluice_service.store.claims import Durability, Record

NONE = -1
# What a client without a writer has received: it never asks again, so nothing is
# held. And how far a sequence that is in no store is durable: nothing waits for it.
ALL = 1 << 62
# They take less than a millisecond.
_FORGOTTEN_AT_ONCE_MAX = 1000


class Phase(Enum):
    """Where a sequence is in its life."""

    PARKED = auto()  # alive, no stream attached
    ATTACHED = auto()  # alive, on a lane of a stream
    ENDED = auto()  # its state is gone; a tombstone may remain


class Event(Enum):
    """What can happen to a sequence."""

    ATTACH = auto()  # a lane opens it; a new lane ends the old one
    DETACH = auto()  # its lane is parked, or its stream ends
    END = auto()  # closed, expired, or another process's now


LIFECYCLE: dict[tuple[Phase, Event], Phase] = {
    (Phase.PARKED, Event.ATTACH): Phase.ATTACHED,
    (Phase.ATTACHED, Event.ATTACH): Phase.ATTACHED,
    (Phase.ATTACHED, Event.DETACH): Phase.PARKED,
    (Phase.PARKED, Event.END): Phase.ENDED,
    (Phase.ATTACHED, Event.END): Phase.ENDED,
}


class IllegalTransitionError(Exception):
    """An event that the sequence's phase has no place for; nothing has changed."""


class Held:
    """Outputs that a client has not acknowledged, and that no stream keeps."""

    __slots__ = ("first", "outputs", "steps")

    def __init__(self, first: int, steps: int, outputs: list[bytes]) -> None:
        self.first = first
        self.steps = steps
        self.outputs = outputs


class Sequence:
    """What is kept of one live sequence beside its row and its columns."""

    __slots__ = (
        "claim_id",
        "durability",
        "held",
        "is_counted",
        "phase",
        "record",
        "sequence_id",
        "slot",
    )

    def __init__(self, sequence_id: str, slot: int, record: Record) -> None:
        self.sequence_id = sequence_id
        self.slot = slot
        self.record = record
        self.phase = Phase.PARKED
        self.held: list[Held] = []
        self.durability: Durability = Durability.OFF
        # True where its client has no writer but counts its steps: what it has not acknowledged
        # is held all the same.
        self.is_counted = False
        # Under which the store has it as this process's; empty where durability is off.
        self.claim_id = b""

    def move(self, event: Event) -> None:
        """Go where LIFECYCLE says. Raises IllegalTransitionError, and changes nothing then."""
        phase = LIFECYCLE.get((self.phase, event))
        if phase is None:
            raise IllegalTransitionError(
                f"{self.sequence_id!r}: {event.name} has no place in {self.phase.name}"
            )
        self.phase = phase

    @property
    def is_anonymous(self) -> bool:
        """True when its client has no writer: it cannot replay, so nothing is held for it."""
        return not self.record.writer

    @property
    def is_durable(self) -> bool:
        """True when a store has it too, which then decides who may open it."""
        return self.durability != Durability.OFF


class Sequences:
    """All sequences of one model: by id, by slot, and in columns by slot."""

    def __init__(
        self,
        slots: int,
        *,
        tombstones_max: int,
        tombstone_seconds: float,
        unacknowledged_steps_max: int,
        undurable_steps_max: int,
    ) -> None:
        self._by_id: dict[str, Sequence] = {}
        self._by_slot: list[Sequence | None] = [None] * slots
        # What is known of ended sequences, and until when; and the same in their order. An id
        # that lives again leaves its place in the order.
        self._tombstones: dict[str, tuple[float, Record]] = {}
        self._burials: deque[tuple[float, str]] = deque()
        self._tombstones_max = tombstones_max
        self._tombstone_seconds = tombstone_seconds
        self._unacknowledged_steps_max = unacknowledged_steps_max
        self._undurable_steps_max = undurable_steps_max
        self._epoch = 0
        # Called when a sequence has gone: whoever waits for a place may look.
        self.on_gone: Callable[[], None] = lambda: None
        # Columns: a run reads and writes them for its whole batch at once.
        self.step = np.zeros(slots, np.int64)  # applied
        self.sent = np.zeros(slots, np.int64)  # where the lane's next chunk follows, as sent
        self.received = np.zeros(slots, np.int64)  # acknowledged by the client
        self.durable = np.full(slots, ALL, np.int64)  # safe in the store
        self.limit = np.zeros(slots, np.int64)  # not run beyond, for want of either
        self.is_strict = np.zeros(slots, np.bool_)  # nothing leaves that is not durable
        self.has_strict = False  # once there was one
        self.stream = np.full(slots, NONE, np.int64)  # the number of the stream attached
        self.lane = np.zeros(slots, np.int64)
        self.active = np.zeros(slots, np.float64)  # when it last did something
        self.generation = np.zeros(slots, np.int64)  # how often the slot changed hands
        self.is_alive = np.zeros(slots, np.bool_)
        self.is_running = np.zeros(slots, np.bool_)
        self.is_faulted = np.zeros(slots, np.bool_)  # drops chunks until one is at `step`
        # Nothing queued, nothing faulted: the next chunk may go straight into a run.
        self.is_straight = np.ones(slots, np.bool_)

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def parked(self) -> int:
        """How many are on no stream."""
        return int((self.is_alive & (self.stream == NONE)).sum())

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
        """What is known of the owner of that id, alive or closed."""
        sequence = self._by_id.get(sequence_id)
        if sequence is not None:
            return sequence.record
        entry = self._tombstones.get(sequence_id)
        return entry[1] if entry is not None else None

    def raise_epoch(self) -> int:
        """An epoch that was never given before."""
        self._epoch += 1
        return self._epoch

    def create(
        self, sequence_id: str, slot: int, record: Record, *, step: int, now: float
    ) -> Sequence:
        """A parked sequence at `step` in `slot`."""
        sequence = Sequence(sequence_id, slot, record)
        self._tombstones.pop(sequence_id, None)
        self._by_id[sequence_id] = sequence
        self._by_slot[slot] = sequence
        self.durable[slot] = ALL
        self.is_strict[slot] = False
        self.rewind(slot, step)
        self.stream[slot] = NONE
        self.active[slot] = now
        self.is_alive[slot] = True
        self.is_running[slot] = False
        return sequence

    def keep(self, sequence: Sequence, claim_id: bytes, durability: Durability, step: int) -> None:
        """Have a sequence be this process's under `claim_id`, durable up to `step`."""
        sequence.claim_id = claim_id
        sequence.durability = durability
        self.durable[sequence.slot] = step
        self.is_strict[sequence.slot] = durability == Durability.STRICT
        self.has_strict |= durability == Durability.STRICT
        self.bound(sequence.slot)

    def rewind(self, slot: int, step: int) -> None:
        """Let a slot stand at `step`, with nothing sent, held or faulted."""
        self.step[slot] = self.sent[slot] = self.received[slot] = step
        self.is_faulted[slot] = False
        self.bound(slot)

    def bound(self, slots: Slots | int | slice) -> None:
        """Set how far `slots` may run: after each change of `received` or `durable`."""
        self.limit[slots] = np.minimum(
            self.received[slots] + self._unacknowledged_steps_max,
            self.durable[slots] + self._undurable_steps_max,
        )

    def wait_for_clients(self, slots: Slots) -> NDArray[np.bool_]:
        """[n] whether only its client's acknowledgement lets each of `slots` go on."""
        unacknowledged = self.step[slots] - self.received[slots]
        return np.asarray(unacknowledged >= self._unacknowledged_steps_max)

    def attach(self, sequence: Sequence, stream: int, lane: int, now: float) -> None:
        """Put a sequence on a lane of a stream, from where it stands."""
        sequence.move(Event.ATTACH)
        slot = sequence.slot
        self.stream[slot] = stream
        self.lane[slot] = lane
        self.sent[slot] = self.step[slot]
        self.active[slot] = now
        # What was delivered on an earlier lane can be acknowledged no more.
        self.generation[slot] += 1
        if sequence.is_anonymous and not sequence.is_counted:
            self.received[slot] = ALL
            self.bound(slot)
        self.is_faulted[slot] = False
        self.is_straight[slot] = True

    def stop(self, slot: int) -> None:
        """Have a slot drop what its lane sends until a chunk names the step it stands at."""
        self.is_faulted[slot] = True
        self.is_straight[slot] = False

    def held_from(self, slot: int) -> int:
        """The first output that is held for a slot's client."""
        return int(min(self.received[slot], self.step[slot]))

    def detach(self, sequence: Sequence) -> None:
        """Park a sequence: alive, on no stream."""
        sequence.move(Event.DETACH)
        self.stream[sequence.slot] = NONE
        # What it has taken back is sent on its next lane, and not on this one as well.
        self.generation[sequence.slot] += 1

    def end(self, sequence: Sequence, ending: str, now: float) -> None:
        """Take a sequence out; `ending` says why, and a tombstone keeps it."""
        self.forget(sequence)
        record = sequence.record
        record.is_alive = False
        record.ending = ending
        until = now + self._tombstone_seconds
        self._tombstones[sequence.sequence_id] = (until, record)
        self._burials.append((until, sequence.sequence_id))
        while (
            len(self._tombstones) > self._tombstones_max
            or len(self._burials) > 2 * self._tombstones_max
        ):
            self._forget_oldest()

    def forget(self, sequence: Sequence) -> None:
        """Take a sequence out without a trace: what is to be known of it, the store knows."""
        sequence.move(Event.END)
        del self._by_id[sequence.sequence_id]
        self._by_slot[sequence.slot] = None
        self.is_alive[sequence.slot] = False
        self.durable[sequence.slot] = ALL
        self.is_strict[sequence.slot] = False
        self.stream[sequence.slot] = NONE
        self.generation[sequence.slot] += 1
        sequence.held.clear()
        self.on_gone()

    def idle(self, before: float) -> Iterator[Sequence]:
        """The sequences that did nothing since `before` and are in no run.

        Each is looked at again when its turn comes: time may pass between two.
        """

        def is_idle(chosen: int | slice) -> NDArray[np.bool_]:
            was_idle = self.is_alive[chosen] & (self.active[chosen] < before)
            return np.asarray(was_idle & ~self.is_running[chosen])

        for slot in np.flatnonzero(is_idle(slice(None))).tolist():
            if is_idle(slot):
                yield self.at(slot)

    def forget_tombstones(self, now: float) -> bool:
        """Drop tombstones whose time is over; True when there may be more of them."""
        for _ in range(_FORGOTTEN_AT_ONCE_MAX):
            if not self._burials or self._burials[0][0] > now:
                return False
            self._forget_oldest()
        return True

    def _forget_oldest(self) -> None:
        until, sequence_id = self._burials.popleft()
        entry = self._tombstones.get(sequence_id)
        if entry is not None and entry[0] == until:
            del self._tombstones[sequence_id]

    def is_same(self, slots: Slots, generations: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n] whether each slot is still in the hands it was in at that generation."""
        same: NDArray[np.bool_] = self.generation[slots] == generations
        return same
