"""Decides whether an open is admitted: by names, room, durability and the model's state."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from sluice_service.batching.versions import Versions
from sluice_service.errors import DrainingError, InvalidInputError, LaneInUseError, LimitError
from sluice_service.sequences.lifecycle import Sequence
from sluice_service.sequences.stream import LANES_MAX, Stream
from sluice_service.sequences.table import SequenceTable
from sluice_service.store.claims import TABLE, Durability, OpenMode, OpenRequest

# The longest sequence id and the longest writer.
_NAME_BYTES_MAX = 512


@dataclass(slots=True)
class Lifecycle:
    """What a model accepts at present; its host sets it."""

    is_draining: bool = False  # the server stops: nothing is opened or run
    is_unloading: bool = False  # live sequences continue, no new ones begin

    @property
    def is_welcoming(self) -> bool:
        """True while sequences may begin."""
        return not self.is_draining and not self.is_unloading


class Admission:
    """Admits opens of one model and reserves room for their sequences."""

    def __init__(
        self,
        table: SequenceTable,
        versions: Versions,
        lifecycle: Lifecycle,
        *,
        durability: Durability,
    ) -> None:
        """`durability` is the strongest that a sequence may have here, and the default."""
        self._table = table
        self._versions = versions
        self._lifecycle = lifecycle
        self._durability = durability
        # Ids of sequences with reserved room, while the store is asked about them.
        self._reserved: set[str] = set()

    def admit(self, stream: Stream, request: OpenRequest) -> None:
        """Check an open on a stream and name a sequence without a name. Raises LaneError."""
        if request.lane >= LANES_MAX:
            raise InvalidInputError(f"lanes are numbers below {LANES_MAX}, not {request.lane}")
        if stream.slot(request.lane) >= 0:
            raise LaneInUseError(
                f"lane {request.lane} has a sequence; take another lane or wait for its Closed"
            )
        self.admit_unattached(request)

    def admit_unattached(self, request: OpenRequest) -> None:
        """As `admit`, for a sequence that gets no lane yet. Raises LaneError."""
        if self._lifecycle.is_draining:
            raise DrainingError("this server is stopping; open the sequence at another")
        _check_names(request)
        if not request.sequence_id:
            request.sequence_id = uuid.uuid4().hex
        found = self._table.get(request.sequence_id)
        if self._lifecycle.is_unloading and (found is None or _begins_again(request, found)):
            raise DrainingError("this model is being unloaded: what lives goes on, nothing begins")
        # A RESUME is checked later: its sequence has to be found first.
        if found is None and request.mode != OpenMode.RESUME:
            self.require_room()
        if request.state is not None:
            self._versions.state_row(request.state)

    def durability(self, request: OpenRequest) -> Durability:
        """The durability of a sequence, or that of its open. Raises InvalidInputError."""
        sequence = self._table.get(request.sequence_id)
        if sequence is not None:
            return sequence.durability
        if request.durability == Durability.SERVER_DEFAULT:
            return self._durability
        if request.durability not in list(Durability):
            raise InvalidInputError(f"there is no durability {request.durability}")
        wanted = Durability(request.durability)
        if wanted > self._durability:
            raise InvalidInputError(
                f"durability {wanted.name.lower()} is more than this server gives "
                f"({self._durability.name.lower()}); ask for less, or serve with a stronger "
                "--durability"
            )
        return wanted

    # Room.

    @property
    def room(self) -> int:
        """How many more sequences may live here."""
        return self._table.slots - len(self._table) - len(self._reserved)

    def require_room(self) -> None:
        """Raise LimitError if no more sequences may live here."""
        if self.room <= 0:
            raise LimitError(
                f"{len(self._table) + len(self._reserved)} sequences are alive or being opened, "
                "as many as sequences_max allows; close some, or serve with a higher "
                "--sequences-max"
            )

    def reserve(self, sequence_id: str) -> None:
        """Reserve room for a sequence while the store is asked about it. Raises LimitError."""
        self.require_room()
        self._reserved.add(sequence_id)

    def release(self, sequence_ids: Iterable[str]) -> None:
        """Release the room of these sequences: the store has answered about them."""
        self._reserved.difference_update(sequence_ids)


def _begins_again(request: OpenRequest, found: Sequence) -> bool:
    """True if an open asks for the initial state of a live sequence and is not a repeat."""
    is_repeat = request.writer != b"" and request.writer == found.record.writer
    return request.mode == OpenMode.RESTART and not is_repeat


def _check_names(request: OpenRequest) -> None:
    """Check the fields of an open. Raises InvalidInputError."""
    if request.mode not in TABLE:
        raise InvalidInputError(f"there is no open mode {request.mode}")
    for name, size in (
        ("sequence_id", len(request.sequence_id.encode())),
        ("writer", len(request.writer)),
    ):
        if size > _NAME_BYTES_MAX:
            raise InvalidInputError(f"{name} has {size} bytes; {_NAME_BYTES_MAX} are allowed")
