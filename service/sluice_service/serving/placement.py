"""Puts a claimed sequence into its slot: a new one, one in memory, or a restored one."""

import numpy as np

from sluice_service.batching.versions import Version, Versions
from sluice_service.errors import (
    DataLossError,
    NotFoundError,
    OutOfRangeError,
    StoreDownError,
    WrongModelError,
)
from sluice_service.metrics import ModelMetrics
from sluice_service.sequences.lifecycle import Held, Sequence
from sluice_service.sequences.states import StateRows
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.admission import Admission
from sluice_service.serving.attachments import Attachments
from sluice_service.store import Checkpoint, Granted, unpack
from sluice_service.store.claims import Claim, OpenRequest, Record, decide


class Placement:
    """Places the sequences of one model for their opens; between runs only."""

    def __init__(
        self,
        table: SequenceTable,
        versions: Versions,
        attachments: Attachments,
        admission: Admission,
        metrics: ModelMetrics,
    ) -> None:
        self._table = table
        self._versions = versions
        self._attachments = attachments
        self._admission = admission
        self._metrics = metrics

    def place(self, request: OpenRequest, granted: Granted | None) -> Sequence:
        """The sequence for a request, detached from its earlier lane and writer.

        `granted` is the store's claim; None: the sequence is in no store. Raises LaneError.
        """
        if granted is None:
            claim = decide(self._table.record(request.sequence_id), request)
            sequence = self._claim_in_memory(request, claim)
        else:
            claim = granted.claim
            found = self._table.get(request.sequence_id)
            if found is not None and claim is Claim.RESUME and granted.is_held:
                sequence = self._resume(found, request, granted)
            else:
                sequence = self._restore(request, granted)
        self._metrics.opened(claim.name.lower())
        return sequence

    def _claim_in_memory(self, request: OpenRequest, claim: Claim) -> Sequence:
        """Create a sequence without a store, or take a live one as the claim says."""
        found, table = self._table.get(request.sequence_id), self._table
        if found is None:
            self._admission.require_room()
            row, step, plane = self._start(request)
            record = Record(request.writer, request.attempt, table.raise_epoch(), is_alive=True)
            return table.create(request.sequence_id, record, step=step, row=row, plane=plane)
        if found.is_durable:
            # It was in no store when the open was admitted.
            raise StoreDownError("the sequence has changed hands meanwhile; open it again")
        row, step, plane = self._start(request) if claim is Claim.WIPE else (None, 0, None)
        received = self._received(found, request, claim)
        self._attachments.fence(found)
        if claim is Claim.WIPE:
            table.begin_again(found, step=step, row=row, plane=plane)
        else:
            table.set_received(found, received)
        if claim is not Claim.RESUME:
            found.record.writer = request.writer
            found.record.epoch = table.raise_epoch()
        found.record.attempt = request.attempt
        return found

    def _resume(self, sequence: Sequence, request: OpenRequest, granted: Granted) -> Sequence:
        """Continue the sequence in memory, which is up to date, under its new claim."""
        sequence.claim_id = granted.claim_id
        sequence.record.epoch, sequence.record.attempt = granted.epoch, request.attempt
        self._table.set_received(sequence, self._received(sequence, request, granted.claim))
        self._attachments.fence(sequence)
        return sequence

    def _restore(self, request: OpenRequest, granted: Granted) -> Sequence:
        """Put the store's checkpoint into memory. It replaces an older copy."""
        stale = self._table.get(request.sequence_id)
        if stale is not None:
            self._attachments.lose(stale)
        self._admission.require_room()
        checkpoint = unpack(granted.checkpoint.data)
        is_clean = bool(granted.previous) and checkpoint.clean_under == granted.previous
        if is_uncounted(request) and granted.claim is Claim.RESUME and not is_clean:
            raise lost(request, checkpoint)
        durability = self._admission.durability(request)
        record = Record(request.writer, request.attempt, granted.epoch, is_alive=True)
        row, version = self._restored_row(request, granted, checkpoint)
        step, floor = checkpoint.step, checkpoint.floor
        sequence = self._table.create(
            request.sequence_id, record, step=step, row=row, plane=version.plane
        )
        self._table.set_received(sequence, floor)
        self._table.own(sequence, granted.claim_id, durability, step)
        if floor < step:
            sequence.held.append(Held(floor, step - floor, list(checkpoint.outputs)))
        if granted.claim is not Claim.CREATE:
            is_exact = checkpoint.arithmetic == version.arithmetic
            self._metrics.restored(is_exact=is_exact)
        self._table.set_received(sequence, self._received(sequence, request, granted.claim))
        return sequence

    def _restored_row(
        self, request: OpenRequest, granted: Granted, checkpoint: Checkpoint
    ) -> tuple[StateRows | None, Version]:
        """The state of a checkpoint, and the version that made it; None: the initial state.

        Raises WrongModelError if that version is not loaded.
        """
        if granted.claim in (Claim.CREATE, Claim.WIPE) and request.state is None:
            # The newest version now, even if it was another when the store was asked.
            return None, self._versions.newest
        version = self._version(checkpoint.model_digest)
        if len(checkpoint.row) != 4 * version.state_size:
            raise DataLossError("the stored checkpoint has a state of another size")
        return np.frombuffer(checkpoint.row, "<f4"), version

    def _version(self, digest: str) -> Version:
        """The version that made a state. Raises WrongModelError."""
        version = self._versions.find(digest)
        if version is None:
            here = ", ".join(one.digest[:12] for one in self._versions)
            raise WrongModelError(
                f"the stored state is of model {digest[:12]}, this server has {here}; serve the "
                "model that made it, or close the sequence and start it again"
            )
        return version

    def _start(self, request: OpenRequest) -> tuple[StateRows | None, int, int | None]:
        """The row, step and plane of a new sequence; None as the row: the initial state."""
        if request.state is None:
            return None, 0, None
        row = self._versions.state_row(request.state)
        return row, request.state.step, self._version(request.state.model_digest).plane

    def _received(self, sequence: Sequence, request: OpenRequest, claim: Claim) -> int:
        """How many outputs the client has, as far as this server knows. Raises OutOfRangeError."""
        floor = self._table.held_from(sequence.slot)
        step = int(self._table.step[sequence.slot])
        if claim in (Claim.WIPE, Claim.CREATE):
            return step
        if request.received is None:
            # Another handle's outputs do not count.
            return step if claim is Claim.TAKE else floor
        # A client may be ahead of the last checkpoint.
        is_ahead = request.received > step and not sequence.is_durable
        if request.received < floor or is_ahead:
            raise OutOfRangeError(
                f"sequence {request.sequence_id!r} holds outputs {floor} to {step}, "
                f"not from {request.received}; resume with received {floor} or more",
                expected_step=step,
            )
        return min(request.received, step)


def is_uncounted(request: OpenRequest) -> bool:
    """True for a caller that numbers no steps: it would not notice a missing one."""
    return not request.writer and request.received is None


def lost(request: OpenRequest, checkpoint: Checkpoint) -> NotFoundError:
    """The error for such a caller if it may have seen outputs beyond the checkpoint.

    It would never send the inputs of those steps again.
    """
    return NotFoundError(
        f"sequence {request.sequence_id!r} was lost with its server after step "
        f"{checkpoint.step}, the last that is durable, and later steps may have been answered; "
        "start it again, or open sequences with a writer, which can replay",
        expected_step=checkpoint.step,
    )
