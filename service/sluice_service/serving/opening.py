"""Gives each open its lane and its sequence, as the table of claims or the store has decided."""

import uuid

import numpy as np

from sluice_service.arrays import Array
from sluice_service.batching.inputs import InputRules
from sluice_service.batching.versions import Version, Versions
from sluice_service.errors import (
    DataLossError,
    DrainingError,
    InvalidInputError,
    LaneError,
    LaneInUseError,
    LimitError,
    NotFoundError,
    OutOfRangeError,
    StoreDownError,
    WrongModelError,
)
from sluice_service.metrics import ModelMetrics
from sluice_service.runtime.clock import AwakeClock
from sluice_service.sequences.events import EndReason, Opened
from sluice_service.sequences.states import Arena
from sluice_service.sequences.stream import LANES_MAX, Stream
from sluice_service.sequences.table import Held, Sequence, Sequences
from sluice_service.serving.attachments import Lanes
from sluice_service.store import Checkpoint, Granted, unpack
from sluice_service.store.claims import (
    TABLE,
    Claim,
    Durability,
    OpenMode,
    OpenRequest,
    Record,
    decide,
)

# Of a sequence's id and of a writer.
_NAME_BYTES_MAX = 512
DURABILITIES = {
    "off": Durability.OFF,
    "periodic": Durability.PERIODIC,
    "strict": Durability.STRICT,
}


class Openings:
    """Where sequences begin on this server, and go on."""

    def __init__(
        self,
        arena: Arena,
        sequences: Sequences,
        lanes: Lanes,
        inputs: InputRules,
        versions: Versions,
        clock: AwakeClock,
        metrics: ModelMetrics,
        *,
        durability: str,
    ) -> None:
        self._arena = arena
        self._sequences = sequences
        self._lanes = lanes
        self._inputs = inputs
        self._versions = versions
        self._clock = clock
        self._metrics = metrics
        self._durability = DURABILITIES[durability]
        # Ids of sequences that are to live here, while the store is asked about them.
        self.promised: set[str] = set()

    def open_here(self, stream: Stream, request: OpenRequest) -> None:
        """Open a sequence that no store has; between runs only."""
        if self.admits(stream, request):
            self.open(stream, request, None)

    def admits(self, stream: Stream, request: OpenRequest) -> bool:
        """True if there is no reason against an open yet; where there is, its client is told."""
        try:
            self._check(stream, request)
            self.durability(request)
        except LaneError as error:
            self._refuse(stream, request, error)
            return False
        return True

    def open(
        self, stream: Stream, request: OpenRequest, answer: Granted | LaneError | None
    ) -> None:
        """Give an admitted request its lane, or tell its fault; between runs only.

        `answer` is what the store says; None: the sequence is in no store.
        """
        try:
            if isinstance(answer, LaneError):
                raise answer
            # Where the stream has ended meanwhile the sequence is parked.
            is_there = self._lanes.stream(stream.number) is not None
            if is_there:
                self._check(stream, request)
            sequence = self.land(request, answer)
            if is_there:
                self._attach(stream, sequence, request)
        except LaneError as error:
            self._refuse(stream, request, error)

    def _check(self, stream: Stream, request: OpenRequest) -> None:
        """Refuse what cannot be opened; name what has no name. Raises LaneError."""
        if request.lane >= LANES_MAX:
            raise InvalidInputError(f"lanes are numbers below {LANES_MAX}, not {request.lane}")
        if stream.slot(request.lane) >= 0:
            raise LaneInUseError(
                f"lane {request.lane} has a sequence; take another lane or wait for its Closed"
            )
        self.check(request)

    def check(self, request: OpenRequest) -> None:
        """Refuse what no lane could have; name what has no name. Raises LaneError."""
        if self._lanes.is_draining:
            raise DrainingError("this server is stopping; open the sequence at another")
        _check_names(request)
        if not request.sequence_id:
            request.sequence_id = uuid.uuid4().hex
        found = self._sequences.get(request.sequence_id)
        if self._lanes.is_unloading and (found is None or _begins_again(request, found)):
            raise DrainingError("this model is being unloaded: what lives goes on, nothing begins")
        # What a RESUME names has to be found first: it may be nowhere.
        if found is None and request.mode != OpenMode.RESUME:
            self.require_room()
        if request.state is not None:
            self._inputs.state_row(request.state)

    @property
    def room(self) -> int:
        """How many more sequences may live here."""
        return len(self._sequences.step) - len(self._sequences) - len(self.promised)

    def require_room(self) -> None:
        """Raise LimitError when no more sequences may live here."""
        if (full := self.check_room()) is not None:
            raise full

    def check_room(self) -> LimitError | None:
        """Why no more sequences may live here, if so."""
        if self.room > 0:
            return None
        return LimitError(
            f"{len(self._sequences) + len(self.promised)} sequences are alive or being opened, "
            "as many as sequences_max allows; close some, or serve with a higher --sequences-max"
        )

    def durability(self, request: OpenRequest) -> Durability:
        """What a sequence has, or else gets. Raises InvalidInputError where that is too much."""
        sequence = self._sequences.get(request.sequence_id)
        if sequence is not None:
            return sequence.durability
        if request.durability == Durability.SERVER_DEFAULT:
            return self._durability
        if request.durability not in DURABILITIES.values():
            raise InvalidInputError(f"there is no durability {request.durability}")
        wanted = Durability(request.durability)
        if wanted > self._durability:
            name = self._durability.name.lower()
            raise InvalidInputError(
                f"durability {wanted.name.lower()} is more than this server gives "
                f"({name}); ask for less, or serve with a stronger --durability"
            )
        return wanted

    def _refuse(self, stream: Stream, request: OpenRequest, error: LaneError) -> None:
        if request.lane < LANES_MAX and stream.slot(request.lane) < 0:
            # Chunks that were sent with the open are not worth a fault each.
            stream.end_lane(request.lane, None)
        self._lanes.tell(stream, request.lane, error, expected_step=error.expected_step)

    def _attach(self, stream: Stream, sequence: Sequence, request: OpenRequest) -> None:
        """Tell the client how its sequence stands, then what is held for it."""
        table, slot = self._sequences, sequence.slot
        counts = stream.has_counters and request.received is not None
        sequence.is_counted = counts and sequence.is_durable
        table.attach(sequence, stream.number, request.lane, self._clock.now())
        stream.put_lane(request.lane, slot)
        stream.has_writer |= not sequence.is_anonymous
        stream.send(
            Opened(
                lane=request.lane,
                sequence_id=sequence.sequence_id,
                epoch=sequence.record.epoch,
                applied=int(table.step[slot]),
                durable=int(table.durable[slot]) if sequence.is_durable else 0,
                held_from=table.held_from(slot),
                durability=sequence.durability,
            )
        )
        self._lanes.resend(stream, sequence, request.lane)

    # What an open gets, as a parked sequence.

    def land(self, request: OpenRequest, granted: Granted | None) -> Sequence:
        """The sequence the request may have, taken from whatever lane and writer it had."""
        if granted is None:
            claim = decide(self._sequences.record(request.sequence_id), request)
            sequence = self._claim_here(request, claim)
        else:
            claim = granted.claim
            found = self._sequences.get(request.sequence_id)
            if found is not None and claim is Claim.RESUME and granted.is_held:
                sequence = self._go_on(found, request, granted)
            else:
                sequence = self._restore(request, granted)
        self._metrics.opened(claim.name.lower())
        return sequence

    def _claim_here(self, request: OpenRequest, claim: Claim) -> Sequence:
        """Without a store: create a sequence, or take a live one as the claim says."""
        found, table = self._sequences.get(request.sequence_id), self._sequences
        if found is None:
            self.require_room()
            row, step, plane = self._start(request)
            record = Record(request.writer, request.attempt, table.raise_epoch(), is_alive=True)
            slot, now = self._arena.allocate(row, plane), self._clock.now()
            return table.create(request.sequence_id, slot, record, step=step, now=now)
        if found.is_durable:
            # It was not when the store might have been asked.
            raise StoreDownError("the sequence has changed hands meanwhile; open it again")
        row, step, plane = self._start(request) if claim is Claim.WIPE else (None, 0, None)
        received = self._received(found, request, claim)
        self._lanes.part(found, EndReason.FENCED)
        table.received[found.slot] = received
        table.bound(found.slot)
        if claim is Claim.WIPE:
            self._arena.reset(found.slot, row, plane)
            table.rewind(found.slot, step)
            found.held.clear()
        if claim is not Claim.RESUME:
            found.record.writer = request.writer
            found.record.epoch = table.raise_epoch()
        found.record.attempt = request.attempt
        return found

    def _go_on(self, sequence: Sequence, request: OpenRequest, granted: Granted) -> Sequence:
        """What is in memory is the newest there is: it goes on under its new claim."""
        table, slot = self._sequences, sequence.slot
        sequence.claim_id = granted.claim_id
        sequence.record.epoch, sequence.record.attempt = granted.epoch, request.attempt
        table.received[slot] = self._received(sequence, request, granted.claim)
        table.bound(slot)
        self._lanes.part(sequence, EndReason.FENCED)
        return sequence

    def _restore(self, request: OpenRequest, granted: Granted) -> Sequence:
        """Put the store's checkpoint into memory, in place of anything older that is there."""
        stale = self._sequences.get(request.sequence_id)
        if stale is not None:
            self._lanes.lose(stale)
        self.require_room()
        checkpoint = unpack(granted.checkpoint.data)
        is_clean = bool(granted.previous) and checkpoint.clean_under == granted.previous
        if is_blind(request) and granted.claim is Claim.RESUME and not is_clean:
            raise lost(request, checkpoint)
        table = self._sequences
        durability = self.durability(request)
        record = Record(request.writer, request.attempt, granted.epoch, is_alive=True)
        slot, version = self._place(request, granted, checkpoint)
        step, now = checkpoint.step, self._clock.now()
        sequence = table.create(request.sequence_id, slot, record, step=step, now=now)
        table.received[slot] = checkpoint.floor
        table.keep(sequence, granted.claim_id, durability, step)
        if checkpoint.floor < step:
            held = Held(checkpoint.floor, step - checkpoint.floor, list(checkpoint.outputs))
            sequence.held.append(held)
        if granted.claim is not Claim.CREATE:
            is_exact = checkpoint.arithmetic == version.arithmetic
            self._metrics.restored(is_exact=is_exact)
        table.received[slot] = self._received(sequence, request, granted.claim)
        table.bound(slot)
        return sequence

    def _place(
        self, request: OpenRequest, granted: Granted, checkpoint: Checkpoint
    ) -> tuple[int, Version]:
        """A slot for a checkpoint, on the version that made it. Raises WrongModelError."""
        if granted.claim in (Claim.CREATE, Claim.WIPE) and not request.state is not None:
            # The newest now, even if another one was when the store was asked.
            return self._arena.allocate(), self._versions.newest
        version = self._version(checkpoint.model_digest)
        if len(checkpoint.row) != 4 * version.state_size:
            raise DataLossError("the stored checkpoint has a state of another size")
        row = np.frombuffer(checkpoint.row, "<f4")
        return self._arena.allocate(row, version.plane), version

    def _version(self, digest: str) -> Version:
        """The version that a state is of. Raises WrongModelError."""
        version = self._versions.find(digest)
        if version is None:
            here = ", ".join(one.digest[:12] for one in self._versions)
            raise WrongModelError(
                f"the stored state is of model {digest[:12]}, this server has {here}; serve the "
                "model that made it, or close the sequence and start it again"
            )
        return version

    def _start(self, request: OpenRequest) -> tuple[Array | None, int, int | None]:
        """The row, step and plane a new sequence begins with; no row: the initial state."""
        if not request.state is not None:
            return None, 0, None
        row = self._inputs.state_row(request.state)
        return row, request.state.step, self._version(request.state.model_digest).plane

    def _received(self, sequence: Sequence, request: OpenRequest, claim: Claim) -> int:
        """What the client has, as far as this server can know of it. Raises OutOfRangeError."""
        floor = self._sequences.held_from(sequence.slot)
        step = int(self._sequences.step[sequence.slot])
        if claim in (Claim.WIPE, Claim.CREATE):
            return step
        if not request.received is not None:
            # Outputs of another handle are not this one's.
            return step if claim is Claim.TAKE else floor
        # A client may be ahead of a store that was written some time ago.
        is_ahead = request.received > step and not sequence.is_durable
        if request.received < floor or is_ahead:
            raise OutOfRangeError(
                f"sequence {request.sequence_id!r} holds outputs {floor} to {step}, "
                f"not from {request.received}; resume with received {floor} or more",
                expected_step=step,
            )
        return min(request.received, step)


def _begins_again(request: OpenRequest, found: Sequence) -> bool:
    """True when an open asks for the initial state of a live sequence, and is no repeat."""
    is_repeat = request.writer != b"" and request.writer == found.record.writer
    return request.mode == OpenMode.RESTART and not is_repeat


def is_blind(request: OpenRequest) -> bool:
    """True for the open of a caller that numbers no steps: it would not notice a missing one."""
    return not request.writer and not request.received is not None


def lost(request: OpenRequest, checkpoint: Checkpoint) -> NotFoundError:
    """What such a caller is told where it may have seen outputs beyond the checkpoint.

    Nobody would send the inputs of those steps again.
    """
    return NotFoundError(
        f"sequence {request.sequence_id!r} was lost with its server after step "
        f"{checkpoint.step}, the last that is durable, and later steps may have been answered; "
        "start it again, or open sequences with a writer, which can replay",
        expected_step=checkpoint.step,
    )


def _check_names(request: OpenRequest) -> None:
    """Refuse what no open can mean. Raises InvalidInputError."""
    if request.mode not in TABLE:
        raise InvalidInputError(f"there is no open mode {request.mode}")
    for name, size in (
        ("sequence_id", len(request.sequence_id.encode())),
        ("writer", len(request.writer)),
    ):
        if size > _NAME_BYTES_MAX:
            raise InvalidInputError(f"{name} has {size} bytes; {_NAME_BYTES_MAX} are allowed")
