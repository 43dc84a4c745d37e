"""Copies sequences out of memory as consistent checkpoints, between two runs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sluice_service.batching.versions import Version, Versions
from sluice_service.sequences.lifecycle import Sequence
from sluice_service.sequences.states import Slots
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.outputs import OutputBuffer
from sluice_service.store import Checkpoint, Packed, pack
from sluice_service.store.claims import OpenRequest


@dataclass(slots=True)
class Snapshot:
    """A copy of one sequence, with the claim that it had."""

    sequence: Sequence
    claim_id: bytes
    is_clean: bool
    packed: Packed

    @property
    def is_current(self) -> bool:
        """True while the sequence is alive here under that claim."""
        return self.sequence.is_under(self.claim_id)


class Snapshots:
    """Makes checkpoints from the table and the streams."""

    def __init__(self, table: SequenceTable, outputs: OutputBuffer, versions: Versions) -> None:
        self._table = table
        self._outputs = outputs
        self._versions = versions
        self._output_count = len(versions.newest.contract.outputs)
        self._initial: tuple[Version, Packed] | None = None
        self._place = np.full(table.slots, -1, np.int64)  # scratch

    def initial(self, request: OpenRequest) -> Packed:
        """The first checkpoint of a new sequence. Raises LaneError for a state it cannot have."""
        newest = self._versions.newest
        if request.state is not None:
            row = self._versions.state_row(request.state)
            version = self._versions.find(request.state.model_digest) or newest
            return self._begin(version, row.tobytes(), request.state.step)
        if self._initial is None or self._initial[0] is not newest:
            row = newest.model.initial_state.astype("<f4")
            self._initial = newest, self._begin(newest, row.tobytes(), 0)
        return self._initial[1]

    def _begin(self, version: Version, row: bytes, step: int) -> Packed:
        nothing = (b"",) * self._output_count
        checkpoint = Checkpoint(version.digest, version.arithmetic, step, step, b"", row, nothing)
        return Packed(step, pack(checkpoint))

    def take(self, slots: Slots, *, is_parked: bool = False) -> list[Snapshot]:
        """The durable sequences of `slots`, each once; between runs only.

        `is_parked`: they do not run any more. If so, or if only durable outputs are sent, a
        caller that numbers no steps may continue from the checkpoint.
        """
        table = self._table
        slots = slots[table.is_alive[slots]]
        steps = table.step[slots]
        rows = table.states.take(slots)
        parts = zip(
            map(table.at, slots.tolist()),
            steps.tolist(),
            np.minimum(table.received[slots], steps).tolist(),
            (table.is_strict[slots] | is_parked).tolist(),
            rows,
            self._versions.of_each(slots),
            self._held(slots),
            strict=True,
        )
        taken = []
        for sequence, step, floor, is_clean, row, version, outputs in parts:
            if not sequence.is_durable:
                continue
            claim_id = sequence.claim_id
            checkpoint = Checkpoint(
                version.digest,
                version.arithmetic,
                step,
                floor,
                claim_id if is_clean else b"",
                row[: version.state_size].tobytes(),
                tuple([b"".join(pieces) for pieces in outputs]),
            )
            packed = Packed(step, pack(checkpoint))
            taken.append(Snapshot(sequence, claim_id, is_clean, packed))
        return taken

    def _held(self, slots: Slots) -> list[list[list[bytes]]]:
        """For each of `slots` and each output: the rows its client may still ask for, in order."""
        found: list[list[list[bytes]]] = [[[] for _ in range(self._output_count)] for _ in slots]
        received = self._table.received[slots].tolist()
        for place, first, steps, outputs in self._pieces(slots, received):
            skipped = max(received[place] - first, 0)
            for pieces, output in zip(found[place], outputs, strict=True):
                pieces.append(output[len(output) // steps * skipped :] if skipped else output)
        return found

    def _pieces(
        self, slots: Slots, received: list[int]
    ) -> Iterator[tuple[int, int, int, list[bytes]]]:
        """(index in `slots`, first step, steps, outputs) of what is still due, oldest first."""
        table = self._table
        for place, slot in enumerate(slots.tolist()):
            for held in table.at(slot).held:
                if held.first + held.steps > received[place]:
                    yield place, held.first, held.steps, held.outputs
        self._place[slots] = np.arange(len(slots))
        try:
            for outputs in self._outputs.due(table.stream[slots]):
                places = self._place[outputs.slots]
                wanted = places >= 0
                if wanted.any():
                    chosen = places[wanted].tolist()
                    for index, first, steps, rows in outputs.only(wanted).chunks():
                        yield chosen[index], first, steps, rows
        finally:
            self._place[slots] = -1
