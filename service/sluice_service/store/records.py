"""The rules of every store: what one call does to one record, as pure functions."""

from dataclasses import dataclass, replace

from sluice_service.store.claims import Claim, Record, decide
from sluice_service.store.protocol import ClaimRequest, Granted, Packed


@dataclass(frozen=True, slots=True)
class Header:
    """All that a store knows of a sequence except the bytes of its checkpoint. Immutable."""

    record: Record
    # The last claim, and how it was answered: a retry of it gets the same answer.
    claim_id: bytes
    claim: Claim
    is_held: bool
    # The claim before it; empty if there was none.
    previous: bytes
    step: int  # of the checkpoint

    def is_under(self, claim_id: bytes) -> bool:
        """True for a live sequence that this claim owns."""
        return self.record.is_alive and self.claim_id == claim_id


@dataclass(frozen=True, slots=True)
class Grant:
    """What a granted claim writes into the store."""

    header: Header
    # The store puts a new epoch into the header.
    raises_epoch: bool
    # None: the record keeps the checkpoint that it has.
    checkpoint: Packed | None


def grant(found: Header | None, request: ClaimRequest) -> Grant:
    """What `request` writes in place of `found`. Raises the LaneError that refuses it."""
    if found is not None and found.is_under(request.claim_id):
        return Grant(found, raises_epoch=False, checkpoint=None)
    record = found.record if found is not None else None
    claim = decide(record, request.open)
    is_held = found is not None and found.is_under(request.held)
    checkpoint = None
    if claim in (Claim.CREATE, Claim.WIPE):
        checkpoint = request.initial
    elif is_held and request.snapshot is not None and found is not None:
        # Memory is behind its own record if the answer to an earlier claim was lost.
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
    """The header with that epoch."""
    return replace(header, record=replace(header.record, epoch=epoch))


def answer(header: Header, data: bytes) -> Granted:
    """The answer to the claim that has just written `header`."""
    return Granted(
        claim=header.claim,
        claim_id=header.claim_id,
        epoch=header.record.epoch,
        is_held=header.is_held,
        previous=header.previous,
        checkpoint=Packed(header.step, data),
    )


def is_closed_by(found: Header, claim_id: bytes) -> bool:
    """True when this claim has closed the sequence before, so that a close is a retry."""
    return not found.record.is_alive and found.claim_id == claim_id


def may_close(found: Header, claim_id: bytes) -> bool:
    """True when `claim_id` may close the sequence: its owner's, or the empty one of an operator."""
    return found.record.is_alive and claim_id in (b"", found.claim_id)


def to_tombstone(found: Header, ending: str) -> Header:
    """The tombstone that a closed sequence leaves."""
    return replace(found, record=replace(found.record, is_alive=False, ending=ending))
