"""Takes live sequences out of memory as checkpoints, each whole, at an instant between two runs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sluice_model import Model
from sluice_protos.sequences_pb2 import OpenSequence
from sluice_service.arena import Arena, Slots
from sluice_service.inputs import InputRules
from sluice_service.lanes import Lanes
from sluice_service.sequences import Sequence, Sequences
from sluice_service.store import Checkpoint, Packed, pack


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One sequence as it stood, under the claim it had."""

    sequence: Sequence
    claim_id: bytes
    is_clean: bool
    packed: Packed


class Snapshots:
    """The way from the arena, the columns and the streams to checkpoints."""

    def __init__(
        self,
        arena: Arena,
        sequences: Sequences,
        lanes: Lanes,
        inputs: InputRules,
        model: Model,
        arithmetic: str,
    ) -> None:
        self._arena = arena
        self._sequences = sequences
        self._lanes = lanes
        self._inputs = inputs
        self._digest = model.contract.digest
        self._arithmetic = arithmetic
        self._outputs = len(model.contract.outputs)
        self._initial = self._begin(model.initial_state.astype("<f4").tobytes(), 0)
        self._place = np.full(len(sequences.step), -1, np.int64)  # scratch

    def initial(self, request: OpenSequence) -> Packed:
        """What a new sequence begins with. Raises LaneError for a state it cannot have."""
        if not request.HasField("state"):
            return self._initial
        return self._begin(self._inputs.state_row(request.state).tobytes(), request.state.step)

    def _begin(self, row: bytes, step: int) -> Packed:
        nothing = (b"",) * self._outputs
        return self._pack(Checkpoint(self._digest, self._arithmetic, step, step, b"", row, nothing))

    def take(self, slots: Slots, *, is_parked: bool = False) -> list[Snapshot]:
        """The durable sequences of `slots`, each once; between runs only.

        `is_parked`: nothing of them runs any more. Where that is so, or nothing leaves
        that is not durable, a caller that numbers no steps may go on from the checkpoint.
        """
        table = self._sequences
        slots = slots[table.is_alive[slots]]
        rows = self._arena.take(slots)
        floors = np.minimum(table.received[slots], table.step[slots])
        outputs = self._held(slots)
        taken = []
        for index, slot in enumerate(slots.tolist()):
            sequence = table.at(slot)
            if not sequence.is_durable:
                continue
            is_clean = is_parked or bool(table.is_strict[slot])
            checkpoint = Checkpoint(
                self._digest,
                self._arithmetic,
                int(table.step[slot]),
                int(floors[index]),
                sequence.claim_id if is_clean else b"",
                rows[index].tobytes(),
                tuple(b"".join(pieces) for pieces in outputs[index]),
            )
            packed = self._pack(checkpoint)
            taken.append(Snapshot(sequence, sequence.claim_id, is_clean, packed))
        return taken

    def _pack(self, checkpoint: Checkpoint) -> Packed:
        return Packed(checkpoint.step, pack(checkpoint))

    def _held(self, slots: Slots) -> list[list[list[bytes]]]:
        """For each of `slots`, for each output: what its client may still ask for, in order."""
        found: list[list[list[bytes]]] = [[[] for _ in range(self._outputs)] for _ in slots]
        for place, first, steps, outputs in self._pieces(slots):
            received = int(self._sequences.received[slots[place]])
            skipped = max(received - first, 0)
            for pieces, output in zip(found[place], outputs, strict=True):
                pieces.append(output[len(output) // steps * skipped :])
        return found

    def _pieces(self, slots: Slots) -> Iterator[tuple[int, int, int, list[bytes]]]:
        """(place in `slots`, first step, steps, outputs), oldest first, of what is still due."""
        table = self._sequences
        for place, slot in enumerate(slots.tolist()):
            for held in table.at(slot).held:
                if held.first + held.steps > table.received[slot]:
                    yield place, held.first, held.steps, held.outputs
        self._place[slots] = np.arange(len(slots))
        try:
            for delivery in self._lanes.due(table.stream[slots]):
                wanted = self._place[delivery.slots] >= 0
                if wanted.any():
                    chosen = delivery.only(wanted)
                    for index, first, steps, outputs in chosen.chunks():
                        yield int(self._place[chosen.slots[index]]), first, steps, outputs
        finally:
            self._place[slots] = -1
