"""What one call does to one record: pure functions, so that every store keeps the same rules."""

from dataclasses import dataclass, replace

from sluice_service.store.claims import Claim, Record, decide
from sluice_service.store.protocol import ClaimRequest, Granted, Packed


@dataclass(frozen=True, slots=True)
class Header:
    """All that a store knows of a sequence beside its checkpoint's bytes. Never changed."""

    record: Record
    # Of the last claim: its name, and what it was answered, should it be asked again.
    claim_id: bytes
    claim: Claim
    is_held: bool
    # The claim before it; empty where there was none.
    previous: bytes
    step: int  # the checkpoint's

    def is_under(self, claim_id: bytes) -> bool:
        """True for a live sequence that this claim owns."""
        return self.record.is_alive and self.claim_id == claim_id


@dataclass(frozen=True, slots=True)
class Grant:
    """What a claim is to put into the store."""

    header: Header
    # The header's epoch is to be a new one.
    raises_epoch: bool
    # None: the record's own stands.
    checkpoint: Packed | None


def grant(found: Header | None, request: ClaimRequest) -> Grant:
    """What `request` puts in the place of `found`. Raises the LaneError that refuses it."""
    if found is not None and found.is_under(request.claim_id):
        return Grant(found, raises_epoch=False, checkpoint=None)
    record = found.record if found is not None else None
    claim = decide(record, request.open)
    is_held = found is not None and found.is_under(request.held)
    checkpoint = None
    if claim in (Claim.CREATE, Claim.WIPE):
        checkpoint = request.initial
    elif is_held and request.snapshot is not None and found is not None:
        # Memory that is behind its own record: an earlier claim's answer got lost.
        is_held = request.snapshot.step >= found.step
        checkpoint = request.snapshot if is_held and claim is Claim.TAKE else None
    raises_epoch = claim is not Claim.RESUME or not is_held
    header = Header(
        Record(
            writer=request.open.writer,
            attempt=request.open.attempt,
            epoch=record.epoch if record is not None else 0,
            is_alive=True,
        ),
        claim_id=request.claim_id,
        claim=claim,
        is_held=is_held,
        previous=found.claim_id if found is not None else b"",
        step=checkpoint.step if checkpoint is not None else found.step if found is not None else 0,
    )
    return Grant(header, raises_epoch, checkpoint)


def give_epoch(header: Header, epoch: int) -> Header:
    """The header under that epoch."""
    return replace(header, record=replace(header.record, epoch=epoch))


def answer(header: Header, data: bytes) -> Granted:
    """What the owner of a header that has just been claimed is told."""
    return Granted(
        claim=header.claim,
        claim_id=header.claim_id,
        epoch=header.record.epoch,
        is_held=header.is_held,
        previous=header.previous,
        checkpoint=Packed(header.step, data),
    )


def is_closed_by(found: Header, claim_id: bytes) -> bool:
    """True when a close under `claim_id` has happened before: it may be asked again."""
    return not found.record.is_alive and found.claim_id == claim_id


def may_close(found: Header, claim_id: bytes) -> bool:
    """True when a close under `claim_id` ends the sequence; an empty one is an operator's."""
    return found.record.is_alive and claim_id in (b"", found.claim_id)


def bury(found: Header, ending: str) -> Header:
    """The tombstone of a live sequence."""
    return replace(found, record=replace(found.record, is_alive=False, ending=ending))
