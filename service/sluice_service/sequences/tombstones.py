"""Remembers ended sequences, so that a late repeat of an open cannot start them again."""

from collections import deque

from sluice_service.store.claims import Record

# Dropped in one call: they take less than a millisecond.
_AT_ONCE_MAX = 1000


class Tombstones:
    """The records of ended sequences by id, bounded in number and time."""

    def __init__(self, *, count_max: int, seconds: float) -> None:
        self._count_max = count_max
        self._seconds = seconds
        # By id, until when each is remembered, and its record; then the ids in order of time.
        # An id that is live again stays in the order.
        self._records: dict[str, tuple[float, Record]] = {}
        self._order: deque[tuple[float, str]] = deque()

    def get(self, sequence_id: str) -> Record | None:
        """What is known of an ended sequence."""
        entry = self._records.get(sequence_id)
        return entry[1] if entry is not None else None

    def add(self, sequence_id: str, record: Record, ending: str, now: float) -> None:
        """Add a sequence that has ended at `now`, in seconds, for the reason `ending`."""
        record.is_alive = False
        record.ending = ending
        until = now + self._seconds
        self._records[sequence_id] = (until, record)
        self._order.append((until, sequence_id))
        while len(self._records) > self._count_max or len(self._order) > 2 * self._count_max:
            self._drop_oldest()

    def remove(self, sequence_id: str) -> None:
        """Forget an id that is live again."""
        self._records.pop(sequence_id, None)

    def drop_expired(self, now: float) -> bool:
        """Drop some of those whose time is over at `now`; True if there may be more of them."""
        for _ in range(_AT_ONCE_MAX):
            if not self._order or self._order[0][0] > now:
                return False
            self._drop_oldest()
        return True

    def _drop_oldest(self) -> None:
        until, sequence_id = self._order.popleft()
        entry = self._records.get(sequence_id)
        if entry is not None and entry[0] == until:
            del self._records[sequence_id]
