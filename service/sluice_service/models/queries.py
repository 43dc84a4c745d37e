"""Lists the sequences of one model and reads their states."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from sluice_service.batching.versions import Versions
from sluice_service.durability.ownership import Ownership
from sluice_service.errors import NotFoundError
from sluice_service.sequences.lifecycle import Phase, Sequence
from sluice_service.sequences.table import SequenceTable
from sluice_service.store.claims import State


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """The description of one live sequence."""

    model: str
    sequence_id: str
    step: int  # of a sequence elsewhere: the last durable one
    epoch: int
    is_parked: bool = False
    idle_seconds: float = 0.0
    held_steps: int = 0
    is_elsewhere: bool = False  # at another server, or only in the store


class Queries:
    """Reads live sequences, here and in the store."""

    def __init__(
        self, model: str, table: SequenceTable, versions: Versions, ownership: Ownership | None
    ) -> None:
        self._model = model
        self._table = table
        self._versions = versions
        self._ownership = ownership

    def here(self) -> Iterator[SequenceInfo]:
        """Every live sequence of this server, as it stands now."""
        table = self._table
        now = table.now()
        for sequence in list(table):
            if sequence.phase is Phase.ENDED:  # while the list was sent
                continue
            slot = sequence.slot
            yield SequenceInfo(
                model=self._model,
                sequence_id=sequence.sequence_id,
                step=int(table.step[slot]),
                epoch=sequence.record.epoch,
                is_parked=sequence.phase is Phase.PARKED,
                idle_seconds=now - float(table.active[slot]),
                held_steps=int(table.step[slot]) - table.held_from(slot),
            )

    async def all(self) -> AsyncIterator[SequenceInfo]:
        """Every live sequence of this server, then those that only the store knows."""
        seen = set()
        for info in self.here():
            seen.add(info.sequence_id)
            yield info
        if self._ownership is not None:
            async for stored in self._ownership.list_stored():
                if stored.key.sequence_id not in seen:
                    yield SequenceInfo(
                        model=self._model,
                        sequence_id=stored.key.sequence_id,
                        step=stored.checkpoint.step,
                        epoch=stored.epoch,
                        is_elsewhere=True,
                    )

    async def state(self, sequence_id: str) -> State:
        """The state after the last applied step; of a sequence elsewhere, the last durable one.

        Raises LaneError.
        """
        if self._ownership is not None and self._table.get(sequence_id) is None:
            stored = await self._ownership.read(sequence_id)
            return State(stored.model_digest, stored.step, stored.row)
        slot = self.find(sequence_id).slot
        return State(
            self._versions.of(slot).digest,
            int(self._table.step[slot]),
            self._table.states.row(slot).tobytes(),
        )

    def find(self, sequence_id: str) -> Sequence:
        """The live sequence of that id. Raises NotFoundError."""
        sequence = self._table.get(sequence_id)
        if sequence is None:
            raise NotFoundError(
                f"model {self._model!r} has no live sequence {sequence_id!r}; "
                "ListSequences tells those it has"
            )
        return sequence
