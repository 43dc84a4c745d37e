"""Keeps the store up to date with memory: checkpoints, parks, ends, renewals, and its failures."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import structlog

from sluice_service.batching.scheduler import Scheduler
from sluice_service.durability.ownership import Custody
from sluice_service.durability.snapshots import Snapshot, Snapshots
from sluice_service.errors import StoreDownError
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.events import Durable, EndReason
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import ALL, NONE, Phase, Sequences
from sluice_service.sequences.table import Sequence as KeptSequence
from sluice_service.serving.attachments import Lanes, Parting
from sluice_service.serving.run_loop import RunLoop
from sluice_service.settings import Settings
from sluice_service.store import Key, Store, StoreError, Verdict, Write

log = structlog.get_logger()

# In one transaction: more would hold the event loop up while they are packed.
_WRITES_MAX = 256
# So much of it is kept for periodic sequences: strict ones alone may fill it for ever.
_PERIODIC_WRITES_MIN = 64
_RETRY_SECONDS = (0.05, 1.0)
# So long a strict lane waits for a store that does not answer before it is told.
_PATIENCE_SECONDS = 2.0
_RENEWALS_PER_LIFETIME = 4


class Keeper:
    """One model's checkpoints, written as fast as the store takes them and no earlier than due."""

    def __init__(
        self,
        store: Store,
        model: str,
        sequences: Sequences,
        scheduler: Scheduler,
        lanes: Lanes,
        snapshots: Snapshots,
        custody: Custody,
        settings: Settings,
        metrics: ModelMetrics,
        runs: RunLoop,
    ) -> None:
        self._store = store
        self._model = model
        self._sequences = sequences
        self._scheduler = scheduler
        self._lanes = lanes
        self._snapshots = snapshots
        self.custody = custody
        self._settings = settings
        self._metrics = metrics
        self._runs = runs
        slots = len(sequences.step)
        self._is_due = np.zeros(slots, np.bool_)  # time has come
        self._is_wanted = np.zeros(slots, np.bool_)  # with nothing left to run: park, drain
        # The slots that were written last.
        self._last_strict = self._last_periodic = -1
        self._parks: list[Parting] = []
        self._is_draining = False
        self._progress = asyncio.Event()
        self._down_since: float | None = None
        self._retry_seconds = _RETRY_SECONDS[0]

    @property
    def down_seconds(self) -> float:
        """For how long the store has not answered; 0 while it does."""
        return 0.0 if self._down_since is None else time.monotonic() - self._down_since

    async def is_answered(self) -> bool:
        """True when the store takes what it is given, and answers now."""
        if self._down_since is not None:
            return False
        try:
            await self._store.read(Key(self._model, ""))
        except StoreError:
            return False
        return True

    @property
    def undurable_steps(self) -> int:
        """How far the store is behind the sequence that is furthest ahead of it."""
        return int(max((self._sequences.step - self._sequences.durable).max(initial=0), 0))

    def notice(self, slots: Slots) -> None:
        """These sequences have gone on: see whether the store has to hear of it now."""
        table = self._sequences
        if self._is_draining:
            # What a write or an acknowledgement has let go on is written once more.
            self._is_wanted[slots] |= table.durable[slots] < ALL
        behind = table.step[slots] - table.durable[slots]
        is_strict = table.is_strict[slots]
        if (behind >= np.where(is_strict, 1, self._settings.checkpoint_steps)).any():
            self._lanes.is_due.set()

    def is_safe(self, slot: int) -> bool:
        """True when the store has all there is of a slot, or has nothing to do with it."""
        table = self._sequences
        return not self._is_wanted[slot] and bool(table.step[slot] <= table.durable[slot])

    async def flush(self) -> None:
        """Finish what is queued, and write every durable sequence once more.

        Nothing is opened any more, and nothing new comes.
        """
        table = self._sequences
        self._is_draining = True
        self._is_wanted |= table.is_alive & (table.durable < ALL)
        while True:
            await self._runs.idle()
            if not self._is_wanted.any() and not self._lanes.closings:
                return
            self._progress.clear()
            self._lanes.is_due.set()
            await self._progress.wait()

    async def keep(self) -> None:
        """Until cancelled."""
        sweep_at = renew_at = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, sweep_at - time.monotonic())):
                    await self._lanes.is_due.wait()
            self._lanes.is_due.clear()
            now = time.monotonic()
            if now >= sweep_at:
                sweep_at = now + self._settings.checkpoint_seconds
                table = self._sequences
                self._is_due |= table.step > table.durable
            try:
                await self.close_pending()
                await self._write_next()
                if now >= renew_at:
                    await self._renew()
                    renew_at = now + self._settings.record_seconds / _RENEWALS_PER_LIFETIME
                self._answered()
            except StoreError as error:
                await self._rest(error)
            except Exception:
                # A defect of ours must not end every checkpoint to come.
                log.exception("keeper_broke", model=self._model)
                await asyncio.sleep(_RETRY_SECONDS[1])
            self._progress.set()

    # Checkpoints.

    async def _write_next(self) -> None:
        """Write the next batch of what is due; where that is not all, it is due at once again."""
        for parting in self._lanes.parks:
            self._parks.append(parting)
            self._is_wanted[parting.sequence.slot] = True
        self._lanes.parks.clear()
        slots = self._choose()
        if len(slots):
            self._lanes.is_due.set()
            await self._write(slots)

    def _choose(self) -> Slots:
        """Which sequences to write next: most of them strict, for somebody waits for those."""
        table = self._sequences
        behind = np.flatnonzero((table.step > table.durable) | self._is_wanted)
        lag = table.step[behind] - table.durable[behind]
        is_strict = table.is_strict[behind]
        is_due = self._is_due[behind] | self._is_wanted[behind]
        is_due |= lag >= self._settings.checkpoint_steps
        # In turns, so that those that are always behind leave room for the others.
        strict = _from(behind[is_strict], self._last_strict)
        periodic = _from(behind[is_due & ~is_strict], self._last_periodic)
        strict = strict[: _WRITES_MAX - min(len(periodic), _PERIODIC_WRITES_MIN)]
        periodic = periodic[: _WRITES_MAX - len(strict)]
        if len(strict):
            self._last_strict = int(strict[-1])
        if len(periodic):
            self._last_periodic = int(periodic[-1])
        chosen: Slots = np.r_[strict, periodic]
        return chosen

    async def _write(self, slots: Slots) -> None:
        """One batch: out of memory, into the store, and told to those who wait for it."""
        snapshots = await self._runs.between_runs(lambda: self._take(slots))
        started = time.monotonic()
        verdicts = await self._store.write(
            [
                Write(Key(self._model, one.sequence.sequence_id), one.claim_id, one.packed)
                for one in snapshots
            ]
        )
        self._metrics.checkpointed(len(snapshots), time.monotonic() - started)
        # Only now: where the store did not answer, they are due as before.
        self._is_due[slots] = False
        await self._settled([one.sequence for one in snapshots], verdicts)
        await self._runs.between_runs(lambda: self._apply(snapshots, verdicts))
        self._runs.wake()

    async def _settled(
        self, sequences: Sequence[KeptSequence], verdicts: Sequence[Verdict]
    ) -> None:
        """Return once no open or close is on its way that may be why a claim was refused."""
        await self.custody.settled(
            one.sequence_id
            for one, verdict in zip(sequences, verdicts, strict=True)
            if verdict is Verdict.REFUSED
        )

    def _take(self, slots: Slots) -> list[Snapshot]:
        table = self._sequences
        # Where another open was faster than a park, more is going to run; and a slot that has
        # changed hands may have a sequence now with which the store has nothing to do.
        overtaken = (table.stream[slots] != NONE) & (not self._is_draining)
        self._is_wanted[slots[overtaken | (table.durable[slots] == ALL)]] = False
        wanted = self._is_wanted[slots]
        return [
            *self._snapshots.take(slots[~wanted]),
            *self._snapshots.take(slots[wanted], is_parked=True),
        ]

    def _apply(self, snapshots: Sequence[Snapshot], verdicts: Sequence[Verdict]) -> None:
        """Note what is durable now; give up what is another's."""
        table = self._sequences
        written: list[int] = []
        for snapshot, verdict in zip(snapshots, verdicts, strict=True):
            sequence, slot = snapshot.sequence, snapshot.sequence.slot
            if not _is_under(sequence, snapshot.claim_id):
                continue  # an answer to somebody who is not there any more
            if verdict is Verdict.REFUSED:
                self._lose(slot)
                continue
            table.durable[slot] = max(int(table.durable[slot]), snapshot.packed.step)
            written.append(slot)
            if snapshot.is_clean and snapshot.packed.step == table.step[slot]:
                self._is_wanted[slot] = False
            if sequence.phase is Phase.ATTACHED and not table.is_strict[slot]:
                self._tell(slot)
        if written:
            slots = np.array(written)
            table.bound(slots)
            self._scheduler.unbound(slots)
        self._lanes.release()
        self._conclude_parks()

    def _tell(self, slot: int) -> None:
        """Tell a client how far its inputs may be forgotten."""
        table = self._sequences
        stream = self._lanes.stream(int(table.stream[slot]))
        if stream is not None and not table.at(slot).is_anonymous:
            stream.send(Durable(int(table.lane[slot]), int(table.durable[slot])))

    def _lose(self, slot: int) -> None:
        """Another process has claimed a sequence: what is here is not the truth any more."""
        log.info("sequence_fenced", model=self._model)
        self._metrics.fenced()
        self._is_wanted[slot] = False
        self._lanes.lose(self._sequences.at(slot))

    def _conclude_parks(self) -> None:
        """Tell of the parks that are safe, and of those that another open has overtaken."""
        waiting = []
        for parting in self._parks:
            is_same = _is_under(parting.sequence, parting.claim_id)
            if is_same and self._is_wanted[parting.sequence.slot]:
                waiting.append(parting)
            else:
                self._lanes.conclude(parting, EndReason.PARKED if is_same else EndReason.FENCED)
        self._parks = waiting

    # Ends and renewals.

    async def close_pending(self) -> None:
        """End in the store what has ended here. Raises StoreError."""
        while partings := self._lanes.closings[:_WRITES_MAX]:
            del self._lanes.closings[: len(partings)]
            await self.close(partings)

    async def close(self, partings: Sequence[Parting]) -> Sequence[Verdict]:
        """End sequences in the store, then in memory, then tell their clients; what it said.

        Raises StoreError; they end as soon as the store answers.
        """
        try:
            async with self.custody.exclusive(one.sequence.sequence_id for one in partings):
                verdicts = await self.custody.close(partings)
                await self._runs.between_runs(lambda: self._end(partings, verdicts))
        except BaseException:
            self._ask_again(partings)
            raise
        return verdicts

    def _ask_again(self, partings: Sequence[Parting]) -> None:
        """Let partings wait; of those of one sequence, the one that its client waits for."""
        waiting = sorted([*self._lanes.closings, *partings], key=lambda one: one.stream)
        self._lanes.closings[:] = {one.claim_id: one for one in waiting}.values()
        self._lanes.is_due.set()

    def _end(self, partings: Sequence[Parting], verdicts: Sequence[Verdict]) -> None:
        for parting, verdict in zip(partings, verdicts, strict=True):
            if _is_under(parting.sequence, parting.claim_id):
                self._is_wanted[parting.sequence.slot] = False
                self._lanes.forget(parting.sequence)
            is_done = verdict is Verdict.DONE
            self._lanes.conclude(parting, parting.reason if is_done else EndReason.FENCED)

    async def _renew(self) -> None:
        """Say of all sequences that they live; learn which are another's. Raises StoreError."""
        alive = [(one, one.claim_id) for one in self._sequences if one.is_durable]
        for start in range(0, len(alive), _WRITES_MAX):
            part = alive[start : start + _WRITES_MAX]
            verdicts = await self._store.renew_leases(
                [(Key(self._model, one.sequence_id), claim_id) for one, claim_id in part]
            )
            await self._settled([one for one, _ in part], verdicts)
            lost = [
                pair
                for pair, verdict in zip(part, verdicts, strict=True)
                if verdict is Verdict.REFUSED
            ]
            await self._runs.between_runs(partial(self._lose_all, lost))

    def _lose_all(self, lost: Sequence[tuple[KeptSequence, bytes]]) -> None:
        for sequence, claim_id in lost:
            if _is_under(sequence, claim_id):
                self._lose(sequence.slot)

    # A store that does not answer.

    def _answered(self) -> None:
        if self._down_since is not None:
            log.info("store_is_back", model=self._model, seconds=round(self.down_seconds, 3))
            self._down_since = None
            self._retry_seconds = _RETRY_SECONDS[0]

    async def _rest(self, error: StoreError) -> None:
        """Say so once, tell those who cannot go on, and wait a little longer each time."""
        if self._down_since is None:
            self._down_since = time.monotonic()
            log.warning("store_is_down", model=self._model, error=str(error))
        self._metrics.store_failed()
        if self.down_seconds > _PATIENCE_SECONDS:
            await self._runs.between_runs(self._break_off_strict)
        await asyncio.sleep(self._retry_seconds)
        self._retry_seconds = min(2 * self._retry_seconds, _RETRY_SECONDS[1])
        self._lanes.is_due.set()

    def _break_off_strict(self) -> None:
        """Nothing can leave on strict lanes: their clients may find a server that has a store."""
        table = self._sequences
        for slot in np.flatnonzero(table.is_strict & (table.stream >= 0)).tolist():
            seconds = self.down_seconds
            self._lanes.break_off(
                table.at(slot),
                StoreDownError(
                    f"the store has not answered for {seconds:.1f} seconds, and nothing may leave "
                    "that is not durable; open the sequence again, here or at another server"
                ),
            )


def _from(slots: Slots, last: int) -> Slots:
    """The same `slots` [n], which rise, those beyond `last` first."""
    rolled: Slots = np.roll(slots, -int(np.searchsorted(slots, last, side="right")))
    return rolled


def _is_under(sequence: KeptSequence, claim_id: bytes) -> bool:
    """True while a sequence is alive here under that very claim."""
    return sequence.phase is not Phase.ENDED and sequence.claim_id == claim_id
