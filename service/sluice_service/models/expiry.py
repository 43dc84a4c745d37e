"""Ends the sequences of one model that were idle for too long."""

from sluice_service.durability.checkpointer import Checkpointer
from sluice_service.runtime.cooperative import rest, take_turns
from sluice_service.sequences.events import EndReason
from sluice_service.sequences.lifecycle import Sequence
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.attachments import Attachments
from sluice_service.serving.run_loop import RunLoop


class Expiry:
    """The end of idle sequences and of old tombstones."""

    def __init__(
        self,
        table: SequenceTable,
        attachments: Attachments,
        runs: RunLoop,
        checkpointer: Checkpointer | None,
        *,
        idle_seconds_max: float,
    ) -> None:
        self._table = table
        self._attachments = attachments
        self._runs = runs
        self._checkpointer = checkpointer
        self._idle_seconds_max = idle_seconds_max

    async def run(self, now: float) -> int:
        """End what is idle at `now`, in seconds awake, and tell its clients. Returns how many."""
        while self._table.drop_tombstones():
            await rest()
        before = now - self._idle_seconds_max
        await self._excuse(before)
        ending = f"it had no step for {self._idle_seconds_max:g} seconds"
        expired = 0

        def end(sequence: Sequence) -> None:
            nonlocal expired
            expired += 1
            self._attachments.end(sequence, EndReason.IDLE, ending)

        await take_turns(map(end, self._table.idle(before)))
        self._runs.settle()
        return expired

    async def _excuse(self, before: float) -> None:
        """Restart the idle time of sequences that wait for the store: they are not idle."""
        if self._checkpointer is None:
            return
        is_waiting = any(one.is_durable for one in self._table.idle(before))
        if is_waiting and not await self._checkpointer.is_answered():
            self._table.touch_durable()
