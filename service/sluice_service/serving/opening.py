"""Takes an open through its stages: admit → reserve → claim → place → attach.

A sequence that is in no store is claimed in memory, by the same table, while it is placed.
`durability/ownership` claims all others.
"""

from sluice_service.errors import LaneError
from sluice_service.sequences.events import Opened
from sluice_service.sequences.lifecycle import Sequence
from sluice_service.sequences.stream import LANES_MAX, Stream, Streams
from sluice_service.sequences.table import SequenceTable
from sluice_service.serving.admission import Admission
from sluice_service.serving.faults import Faults
from sluice_service.serving.outputs import OutputBuffer
from sluice_service.serving.placement import Placement
from sluice_service.store import Granted
from sluice_service.store.claims import OpenRequest


class Opening:
    """Opens sequences of one model on streams, or tells their clients why they are refused."""

    def __init__(
        self,
        table: SequenceTable,
        streams: Streams,
        admission: Admission,
        placement: Placement,
        outputs: OutputBuffer,
        faults: Faults,
    ) -> None:
        self._table = table
        self._streams = streams
        self._admission = admission
        self._placement = placement
        self._outputs = outputs
        self._faults = faults

    def open_in_memory(self, stream: Stream, request: OpenRequest) -> None:
        """Take an open of a sequence that is in no store through all stages; between runs only."""
        if self.admit(stream, request):
            self.complete(stream, request, None)

    def admit(self, stream: Stream, request: OpenRequest) -> bool:
        """True if an open is admitted; else its client is told why not."""
        try:
            self._admission.admit(stream, request)
            self._admission.durability(request)
        except LaneError as error:
            self._refuse(stream, request, error)
            return False
        return True

    def complete(
        self, stream: Stream, request: OpenRequest, answer: Granted | LaneError | None
    ) -> None:
        """Place and attach an admitted request, or send its fault; between runs only.

        `answer` is the store's; None: the sequence is in no store.
        """
        try:
            if isinstance(answer, LaneError):
                raise answer
            # If the stream has ended meanwhile, the sequence is parked.
            is_open = self._streams.get(stream.number) is not None
            if is_open:
                self._admission.admit(stream, request)
            sequence = self._placement.place(request, answer)
            if is_open:
                self._attach(stream, sequence, request)
        except LaneError as error:
            self._refuse(stream, request, error)

    def _attach(self, stream: Stream, sequence: Sequence, request: OpenRequest) -> None:
        """Send Opened to the client, then the outputs that are held for it."""
        table, slot = self._table, sequence.slot
        is_counted = stream.has_counters and request.received is not None
        sequence.is_counted = is_counted and sequence.is_durable
        table.attach(sequence, stream.number, request.lane)
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
        self._outputs.resend(stream, sequence, request.lane)

    def _refuse(self, stream: Stream, request: OpenRequest, error: LaneError) -> None:
        if request.lane < LANES_MAX and stream.slot(request.lane) < 0:
            # Chunks that were sent together with the open get no separate fault.
            stream.end_lane(request.lane, None)
        self._faults.tell(stream, request.lane, error, expected_step=error.expected_step)
