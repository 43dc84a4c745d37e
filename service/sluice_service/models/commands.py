"""Forks and closes sequences from outside of their streams."""

from typing import NamedTuple

from sluice_service.durability.checkpointer import Checkpointer
from sluice_service.durability.ownership import Answer, Ownership
from sluice_service.errors import ExistsError, LaneError, StoreDownError
from sluice_service.models.queries import Queries
from sluice_service.sequences.events import EndReason
from sluice_service.sequences.lifecycle import Sequence
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.admission import Admission
from sluice_service.serving.attachments import Attachments, Departure
from sluice_service.serving.placement import Placement
from sluice_service.serving.run_loop import RunLoop
from sluice_service.store import StoreError, Verdict
from sluice_service.store.claims import OpenRequest


class Forked(NamedTuple):
    """The copy of a sequence: its id, the steps it holds, its epoch."""

    sequence_id: str
    step: int
    epoch: int


class Commands:
    """The commands that need no stream, for the sequences of one model."""

    def __init__(
        self,
        table: SequenceTable,
        admission: Admission,
        placement: Placement,
        attachments: Attachments,
        queries: Queries,
        runs: RunLoop,
        ownership: Ownership | None,
        checkpointer: Checkpointer | None,
    ) -> None:
        """Without a store there is neither `ownership` nor `checkpointer`."""
        self._table = table
        self._admission = admission
        self._placement = placement
        self._attachments = attachments
        self._queries = queries
        self._runs = runs
        self._ownership = ownership
        self._checkpointer = checkpointer

    async def fork(self, sequence_id: str, copy: OpenRequest) -> Forked:
        """Copy a live sequence to what `copy` opens; the copy is parked. Raises LaneError."""
        copy.state = await self._queries.state(sequence_id)
        self._admission.admit_unattached(copy)
        self._admission.durability(copy)
        if self._table.get(copy.sequence_id) is not None:
            raise ExistsError(f"sequence {copy.sequence_id!r} is alive; fork to another id")
        forked: list[Sequence] = []

        def place(request: OpenRequest, answer: Answer) -> None:
            if isinstance(answer, LaneError):
                raise answer
            forked.append(self._placement.place(request, answer))

        if self._ownership is None:
            await self._runs.between_runs(lambda: place(copy, None))
        else:
            await self._ownership.open([copy], place)
        sequence = forked[0]
        step = int(self._table.step[sequence.slot])
        return Forked(sequence.sequence_id, step, sequence.record.epoch)

    async def close(self, sequence_id: str) -> int:
        """Drop a live sequence, whoever owns it. Returns its steps. Raises LaneError."""
        ending = "CloseSequence closed it"
        ownership = self._ownership
        if ownership is not None and self._table.get(sequence_id) is None:
            return await ownership.close_elsewhere(sequence_id, ending)
        step, departure = await self._runs.between_runs(lambda: self._end(sequence_id, ending))
        if ownership is None or self._checkpointer is None or departure is None:
            return step
        try:
            # Ask the store here, because the caller waits for its answer.
            (verdict,) = await self._checkpointer.close([departure])
        except StoreError as error:
            raise StoreDownError(
                f"the store does not answer ({error}); the sequence has left its lane, and "
                "ends once the store is back"
            ) from error
        if verdict is Verdict.REFUSED:
            return await ownership.close_elsewhere(sequence_id, ending)
        return step

    def _end(self, sequence_id: str, ending: str) -> tuple[int, Departure | None]:
        """The steps of a sequence that ends, and its departure if the store has it."""
        sequence = self._queries.find(sequence_id)
        step = int(self._table.step[sequence.slot])
        if sequence.is_durable:
            return step, self._attachments.begin_end(sequence, EndReason.CLIENT, ending)
        self._attachments.end(sequence, EndReason.CLIENT, ending)
        return step, None
