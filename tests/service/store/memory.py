"""A store in a dictionary: a test double that keeps the rules of every store."""

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from sluice_service.errors import LaneError
from sluice_service.runtime.clock import AwakeClock
from sluice_service.store.protocol import (
    ClaimRequest,
    Closing,
    Granted,
    Key,
    Packed,
    Stored,
    Verdict,
    Write,
)
from sluice_service.store.records import (
    Header,
    answer,
    give_epoch,
    grant,
    is_closed_by,
    may_close,
    to_tombstone,
)

# Beyond this many the oldest tombstones are deleted early.
_TOMBSTONES_MAX = 1_000_000
# Of the time between two calls at most this much counts.
_GAP_SECONDS_MAX = 30.0


class MemoryStore:
    """Sequences of this process only; nothing outlives the object."""

    def __init__(
        self,
        *,
        tombstone_seconds: float,
        record_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tombstone_seconds = tombstone_seconds
        self._record_seconds = record_seconds
        self._clock = AwakeClock(gap_max=_GAP_SECONDS_MAX, monotonic=monotonic)
        self._epoch = 0
        # Both in the order in which they expire, with the time at which they do.
        self._live: OrderedDict[Key, tuple[float, Header, bytes]] = OrderedDict()
        self._tombstones: OrderedDict[Key, tuple[float, Header]] = OrderedDict()

    async def start(self) -> list[str]:
        """There is nothing to check."""
        return []

    async def stop(self) -> None:
        """Delete everything."""
        self._live.clear()
        self._tombstones.clear()

    async def claim(self, requests: Sequence[ClaimRequest]) -> list[Granted | LaneError]:
        """See Store."""
        now = self._tick()
        return [self._claim(request, now) for request in requests]

    def _claim(self, request: ClaimRequest, now: float) -> Granted | LaneError:
        found, data = self._find(request.key)
        try:
            claim = grant(found, request)
        except LaneError as error:
            return error
        header = claim.header
        if claim.raises_epoch:
            self._epoch += 1
            header = give_epoch(header, self._epoch)
        if claim.checkpoint is not None:
            data = claim.checkpoint.data
        self._tombstones.pop(request.key, None)
        self._put(request.key, header, data, now)
        return answer(header, data)

    async def write(self, writes: Sequence[Write]) -> list[Verdict]:
        """See Store."""
        self._tick()
        return [self._write(write) for write in writes]

    def _write(self, write: Write) -> Verdict:
        if write.key not in self._live:
            return Verdict.REFUSED
        expires, found, _ = self._live[write.key]
        if not found.is_under(write.claim_id):
            return Verdict.REFUSED
        if write.checkpoint.step >= found.step:
            header = replace(found, step=write.checkpoint.step)
            self._live[write.key] = (expires, header, write.checkpoint.data)
        return Verdict.DONE

    async def close(self, closings: Sequence[Closing]) -> list[Verdict]:
        """See Store."""
        now = self._tick()
        return [self._close(closing, now) for closing in closings]

    def _close(self, closing: Closing, now: float) -> Verdict:
        found, _ = self._find(closing.key)
        if found is None or not may_close(found, closing.claim_id):
            is_repeat = found is not None and is_closed_by(found, closing.claim_id)
            return Verdict.DONE if is_repeat else Verdict.REFUSED
        del self._live[closing.key]
        tombstone = to_tombstone(found, closing.ending)
        self._tombstones[closing.key] = (now + self._tombstone_seconds, tombstone)
        if len(self._tombstones) > _TOMBSTONES_MAX:
            self._tombstones.popitem(last=False)
        return Verdict.DONE

    async def renew_leases(self, claims: Sequence[tuple[Key, bytes]]) -> list[Verdict]:
        """See Store."""
        now = self._tick()
        return [self._renew_lease(key, claim_id, now) for key, claim_id in claims]

    def _renew_lease(self, key: Key, claim_id: bytes, now: float) -> Verdict:
        found, data = self._find(key)
        if found is None or not found.is_under(claim_id):
            return Verdict.REFUSED
        self._put(key, found, data, now)
        return Verdict.DONE

    async def read(self, key: Key) -> Stored | None:
        """See Store."""
        self._tick()
        if key not in self._live:
            return None
        _, header, data = self._live[key]
        return Stored(key, header.record.epoch, Packed(header.step, data))

    async def stored(self, model: str) -> AsyncIterator[Stored]:
        """See Store."""
        self._tick()
        for key, (_, header, _) in list(self._live.items()):
            if key.model == model:
                yield Stored(key, header.record.epoch, Packed(header.step, b""))

    def _find(self, key: Key) -> tuple[Header | None, bytes]:
        if key in self._live:
            _, header, data = self._live[key]
            return header, data
        if key in self._tombstones:
            return self._tombstones[key][1], b""
        return None, b""

    def _put(self, key: Key, header: Header, data: bytes, now: float) -> None:
        self._live[key] = (now + self._record_seconds, header, data)
        self._live.move_to_end(key)

    def _tick(self) -> float:
        """Delete what has expired; return the time."""
        now = self._clock.now()
        while self._live and next(iter(self._live.values()))[0] <= now:
            self._live.popitem(last=False)
        while self._tombstones and next(iter(self._tombstones.values()))[0] <= now:
            self._tombstones.popitem(last=False)
        return now
