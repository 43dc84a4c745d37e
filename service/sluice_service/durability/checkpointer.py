"""Writes checkpoints when they are due, as fast as the store allows, and continues after outages.

Each write takes everything that became due during the previous one: that is the group commit.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import structlog

from sluice_service.durability.ownership import Ownership
from sluice_service.durability.pending import Pending
from sluice_service.durability.snapshots import Snapshot, Snapshots
from sluice_service.errors import StoreDownError
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.events import EndReason
from sluice_service.sequences.lifecycle import Sequence as LiveSequence
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.attachments import Attachments, Departure
from sluice_service.serving.outputs import OutputBuffer
from sluice_service.serving.run_loop import RunLoop
from sluice_service.store import Key, Store, StoreError, Verdict, Write

log = structlog.get_logger()

_RETRY_SECONDS = (0.05, 1.0)
# How long a strict lane waits for a store that does not answer before its client is told.
_STRICT_WAIT_SECONDS = 2.0
_RENEWALS_PER_LEASE = 4


class Checkpointer:
    """The one loop that writes a model's sequences to the store."""

    def __init__(
        self,
        store: Store,
        table: SequenceTable,
        attachments: Attachments,
        outputs: OutputBuffer,
        runs: RunLoop,
        snapshots: Snapshots,
        ownership: Ownership,
        pending: Pending,
        metrics: ModelMetrics,
        *,
        checkpoint_seconds: float,
        lease_seconds: float,
    ) -> None:
        """Sequences that are behind are written every `checkpoint_seconds` at the latest.

        The store drops a sequence whose lease is not renewed for `lease_seconds`.
        """
        self._store = store
        self._table = table
        self._attachments = attachments
        self._outputs = outputs
        self._runs = runs
        self._snapshots = snapshots
        self._ownership = ownership
        self._pending = pending
        self._metrics = metrics
        self._model = metrics.name
        self._checkpoint_seconds = checkpoint_seconds
        self._renewal_seconds = lease_seconds / _RENEWALS_PER_LEASE
        self._progress = asyncio.Event()
        self._down_since: float | None = None
        self._retry_seconds = _RETRY_SECONDS[0]

    @property
    def down_seconds(self) -> float:
        """For how long the store has not answered; 0 while it does."""
        return 0.0 if self._down_since is None else time.monotonic() - self._down_since

    async def is_answered(self) -> bool:
        """True if the store answers and accepts checkpoints."""
        if self._down_since is not None:
            return False
        try:
            await self._store.read(Key(self._model, ""))
        except StoreError:
            return False
        return True

    @property
    def undurable_steps(self) -> int:
        """How many steps the sequence furthest ahead of the store is ahead."""
        return int(max((self._table.step - self._table.durable).max(initial=0), 0))

    async def run(self) -> None:
        """Write what is due, until cancelled."""
        write_at = renew_at = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, write_at - time.monotonic())):
                    await self._pending.signal.wait()
            self._pending.signal.clear()
            now = time.monotonic()
            if now >= write_at:
                write_at = now + self._checkpoint_seconds
                self._pending.note_time()
            try:
                await self.close_pending()
                await self._write_next()
                if now >= renew_at:
                    await self._renew_leases()
                    renew_at = now + self._renewal_seconds
                self._note_answer()
            except StoreError as error:
                await self._wait_for_store(error)
            except Exception:
                # A defect of the server must not end all checkpoints.
                log.exception("checkpointer_broke", model=self._model)
                await asyncio.sleep(_RETRY_SECONDS[1])
            self._progress.set()

    async def flush(self) -> None:
        """Finish what is queued, and write every durable sequence once more.

        Nothing is opened any more, and no new steps arrive.
        """
        self._pending.begin_flush()
        while True:
            await self._runs.idle()
            if self._pending.is_flushed:
                return
            self._progress.clear()
            self._pending.signal.set()
            await self._progress.wait()

    # Checkpoints.

    async def _write_next(self) -> None:
        """Write the next batch of what is due. The signal stays set, because there may be more."""
        slots = self._pending.choose()
        if len(slots):
            self._pending.signal.set()
            await self._write(slots)

    async def _write(self, slots: Slots) -> None:
        """Write one batch: copy it out of memory, store it, and tell the clients that wait."""
        snapshots = await self._runs.between_runs(lambda: self._take(slots))
        started = time.monotonic()
        verdicts = await self._store.write(
            [
                Write(Key(self._model, one.sequence.sequence_id), one.claim_id, one.packed)
                for one in snapshots
            ]
        )
        self._metrics.checkpointed(len(snapshots), time.monotonic() - started)
        # Not before: if the store does not answer, they must stay due.
        self._pending.note_written(slots)
        await self._ownership.explained([one.sequence for one in snapshots], verdicts)
        await self._runs.between_runs(lambda: self._apply(snapshots, verdicts))
        self._runs.wake()

    def _take(self, slots: Slots) -> list[Snapshot]:
        running, final = self._pending.split_final(slots)
        return [*self._snapshots.take(running), *self._snapshots.take(final, is_parked=True)]

    def _apply(self, snapshots: Sequence[Snapshot], verdicts: Sequence[Verdict]) -> None:
        """Note what is durable now; drop what another process owns."""
        table = self._table
        slots: list[int] = []
        steps: list[int] = []
        for snapshot, verdict in zip(snapshots, verdicts, strict=True):
            slot, step = snapshot.sequence.slot, snapshot.packed.step
            if not snapshot.is_current:
                continue  # the answer belongs to an earlier claim
            if verdict is Verdict.REFUSED:
                self._lose(snapshot.sequence)
                continue
            slots.append(slot)
            steps.append(step)
            if snapshot.is_clean and step == table.step[slot]:
                self._pending.note_final(slot)
        if slots:
            table.note_durable(np.array(slots), np.array(steps))
            self._outputs.tell_durable(slots)
        self._outputs.release()
        for park in self._pending.take_concluded_parks():
            reason = EndReason.PARKED if park.is_current else EndReason.FENCED
            self._attachments.conclude(park, reason)

    def _lose(self, sequence: LiveSequence) -> None:
        """Drop a sequence that another process has claimed: this copy is outdated."""
        log.info("sequence_fenced", model=self._model)
        self._metrics.fenced()
        self._pending.note_final(sequence.slot)
        self._attachments.lose(sequence)

    # Ends and leases.

    async def close_pending(self) -> None:
        """End in the store what has ended here. Raises StoreError."""
        while departures := self._pending.take_ends():
            await self.close(departures)

    async def close(self, departures: Sequence[Departure]) -> Sequence[Verdict]:
        """End sequences in the store, then in memory, then tell their clients; the verdicts.

        Raises StoreError; they end as soon as the store answers.
        """
        try:
            async with self._ownership.exclusive(one.sequence.sequence_id for one in departures):
                verdicts = await self._ownership.close(departures)
                await self._runs.between_runs(lambda: self._end(departures, verdicts))
        except BaseException:
            self._pending.put_back_ends(departures)
            raise
        return verdicts

    def _end(self, departures: Sequence[Departure], verdicts: Sequence[Verdict]) -> None:
        for departure, verdict in zip(departures, verdicts, strict=True):
            if departure.is_current:
                self._pending.note_final(departure.sequence.slot)
                self._table.forget(departure.sequence)
            is_done = verdict is Verdict.DONE
            self._attachments.conclude(departure, departure.reason if is_done else EndReason.FENCED)

    async def _renew_leases(self) -> None:
        """Renew all leases; drop sequences that another process owns. Raises StoreError."""
        async for lost in self._ownership.renew_leases():
            await self._runs.between_runs(partial(self._lose_all, lost))

    def _lose_all(self, lost: Sequence[tuple[LiveSequence, bytes]]) -> None:
        for sequence, claim_id in lost:
            if sequence.is_under(claim_id):
                self._lose(sequence)

    # Outages of the store.

    def _note_answer(self) -> None:
        if self._down_since is not None:
            log.info("store_is_back", model=self._model, seconds=round(self.down_seconds, 3))
            self._down_since = None
            self._retry_seconds = _RETRY_SECONDS[0]

    async def _wait_for_store(self, error: StoreError) -> None:
        """Log the outage once, tell clients that cannot continue, and wait longer each time."""
        if self._down_since is None:
            self._down_since = time.monotonic()
            log.warning("store_is_down", model=self._model, error=str(error))
        self._metrics.store_failed()
        if self.down_seconds > _STRICT_WAIT_SECONDS:
            await self._runs.between_runs(self._break_off_strict)
        await asyncio.sleep(self._retry_seconds)
        self._retry_seconds = min(2 * self._retry_seconds, _RETRY_SECONDS[1])
        self._pending.signal.set()

    def _break_off_strict(self) -> None:
        """Send strict lanes away: their clients may find a server whose store answers."""
        table = self._table
        for slot in np.flatnonzero(table.is_strict & (table.stream >= 0)).tolist():
            self._attachments.break_off(
                table.at(slot),
                StoreDownError(
                    f"the store has not answered for {self.down_seconds:.1f} seconds, and nothing "
                    "may leave that is not durable; open the sequence again, here or at another "
                    "server"
                ),
            )
