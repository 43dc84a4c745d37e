"""What the handles of sequences and groups share, for threads and for coroutines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sluice_client.errors import (
    ReplayNeeded,
    SequenceClosed,
    SluiceError,
    StepFailed,
    StepTimedOut,
    StepUnsettled,
    Unavailable,
)
from sluice_client.protocol.calls import Call, LaneRequest
from sluice_client.protocol.lane import Lane
from sluice_client.protocol.openings import Mode, Opening
from sluice_client.protocol.signature import Input, Output
from sluice_client.protocol.tables import Numbers
from sluice_client.protocol.tickets import Durability, Ticket
from sluice_client.transport.stream import BaseStream

# A server that was killed comes back at an older step: for a short while its streams do
# not know, and a question about a state is answered with an old one. So it is asked again.
REWOUND_ATTEMPTS_MAX: Final = 200
REWOUND_PAUSE_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class GroupResult:
    """The result of one step of a group.

    outputs  [sequences, …] or [sequences, steps, …]; a dict by name if the model has
             several; zero where a step failed
    ok       [sequences]: all steps of the row were applied
    errors   by row of the group, for the rows that are not ok
    """

    outputs: Output
    ok: NDArray[np.bool_]
    errors: dict[int, SluiceError]

    def check(self) -> Output:
        """The outputs, if all rows are ok. Raises the first row's error otherwise."""
        for row in sorted(self.errors):
            raise self.errors[row]
        return self.outputs


class BaseHandle:
    """Sequences that were opened together, and the steps under way for them."""

    def __init__(
        self, stream: BaseStream[Any], openings: Sequence[Opening], leading: tuple[int, ...]
    ) -> None:
        self._stream = stream
        self._openings = openings
        # The axes of an input before those of a step or chunk.
        self._leading = leading
        # The numbers of the lanes, once it was asked to open them.
        self._numbers: Numbers | None = None
        # The lanes, once they are open.
        self._lanes: list[Lane] = []
        self._is_closed = False
        # The steps received and durable for each sequence, when it was closed or parked.
        self._final: tuple[Numbers, Numbers] | None = None
        # Steps that nobody waits for any more: `settle` returns their outputs.
        self._unsettled: list[Call] = []

    # -- opening and ending -----------------------------------------------------------

    def _request_open(self) -> LaneRequest:
        if self._numbers is not None or self._is_closed:
            raise SequenceClosed("a handle opens once; make another one", sequence_id=self._id)
        with self._stream.lock:
            request = self._stream.connection.open(self._openings)
            self._numbers = request.lanes
            self._stream.flush()
        return request

    def _note_opened(self, request: LaneRequest) -> None:
        """All lanes are open: `settle` returns the outputs of steps that another handle sent."""
        with self._stream.lock:
            lanes = self._stream.connection.lanes
            self._lanes = [lanes[number] for number in request.lanes.tolist()]
        for lane in self._lanes:
            if lane.inherited is not None:
                self._unsettled.append(lane.inherited)

    def _request_undo_open(self) -> LaneRequest | None:
        """Close the sequences that this handle has started, park those that it has not."""
        mode = self._openings[0].mode
        return self._request_end(is_parking=mode in (Mode.TAKEOVER, Mode.START_OR_RESUME))

    def _request_end(self, *, is_parking: bool) -> LaneRequest | None:
        """Close or park, once; None if there is nothing to end."""
        numbers, was_closed = self._numbers, self._is_closed
        self._is_closed = True
        if numbers is None or was_closed:
            return None
        with self._stream.lock:
            connection = self._stream.connection
            # The numbers of the lanes may soon be used by others.
            self._final = connection.received(numbers), connection.durable(numbers)
            request = (connection.park if is_parking else connection.close)(numbers)
            self._stream.flush()
        return request

    def _request_idle(self) -> LaneRequest:
        """A request that is done when all submitted steps are applied at the present server."""
        with self._stream.lock:
            return self._stream.connection.lanes.when_idle(self._open_numbers)

    @property
    def _open_numbers(self) -> Numbers:
        if self._numbers is None or self._is_closed:
            why = "was closed" if self._is_closed else "is not open; use it in a `with` block"
            raise SequenceClosed(f"this handle {why}", sequence_id=self._id)
        return self._numbers

    @property
    def _id(self) -> str | None:
        return self._openings[0].sequence_id if len(self._openings) == 1 else None

    # -- steps ------------------------------------------------------------------------

    def _submit(self, x: Input, follows: Call | None = None) -> Call | None:
        """Submit the next steps; None if `follows` has failed, since they would not follow it.

        Raises InvalidInput, StepUnsettled, ReplayNeeded, SequenceClosed.
        """
        numbers = self._open_numbers
        if self._unsettled or (self._lanes and self._lanes[0].replays_from is not None):
            self._refuse_step()
        connection = self._stream.connection
        try:
            inputs, steps = connection.signature.to_rows(x, *self._leading)
        except SluiceError as error:
            raise error.at(self._id, None) from None
        counts = np.full(len(numbers), 1 if steps is None else steps, np.int64)
        with self._stream.lock:
            if follows is not None and follows.errors:
                return None
            call = connection.submit(numbers, counts, inputs)
            call.steps = steps
            self._stream.flush()
        return call

    def _refuse_step(self) -> None:
        """Raise what must be done before the next step."""
        if self._unsettled:
            raise StepUnsettled(
                "it was cancelled or timed out, and may have been applied; "
                "call settle() to wait for its output, then continue",
                sequence_id=self._id,
                step=self._first_step(self._unsettled[0]),
            )
        first = self._lanes[0].replays_from
        raise ReplayNeeded(
            f"the server is at step {first}, and needs inputs again that another handle had; "
            "pass them to replay()",
            sequence_id=self._id,
            step=first,
        )

    def _first_step(self, call: Call) -> int:
        with self._stream.lock:
            return self._stream.connection.first_step(call)

    def _timed_out(self, call: Call, timeout: float | None) -> StepTimedOut:
        """Leave a step to `settle`; the error for its caller."""
        self._unsettled.append(call)
        return StepTimedOut(
            f"no output within {timeout} s; the step may have been applied, or will be: "
            "settle() waits for its output",
            sequence_id=self._id,
            step=self._first_step(call),
        )

    def _rewound_error(self) -> Unavailable:
        return Unavailable(
            "the server is behind this sequence and does not catch up; try again",
            sequence_id=self._id,
        )

    # -- progress -----------------------------------------------------------------------

    def _received(self) -> Numbers:
        """The outputs of each sequence that have arrived: [sequences]."""
        if self._final is not None:
            return self._final[0]
        if self._numbers is None:
            return np.zeros(len(self._openings), np.int64)
        with self._stream.lock:
            return self._stream.connection.received(self._numbers)

    def _durable(self) -> Numbers:
        """The steps of each sequence that are durable: [sequences]."""
        if self._final is not None:
            return self._final[1]
        if self._numbers is None:
            return np.zeros(len(self._openings), np.int64)
        with self._stream.lock:
            return self._stream.connection.durable(self._numbers)


class BaseSequence(BaseHandle):
    """One sequence."""

    def __init__(self, stream: BaseStream[Any], model: str, opening: Opening) -> None:
        super().__init__(stream, [opening], ())
        self._model = model

    @property
    def sequence_id(self) -> str:
        """The id of the sequence at the server."""
        return self._openings[0].sequence_id

    @property
    def step_count(self) -> int:
        """The number of steps whose outputs have arrived."""
        return int(self._received()[0])

    @property
    def durability(self) -> Durability | None:
        """What the server grants; None before the sequence is open."""
        return self._lanes[0].durability if self._lanes else None

    @property
    def durable_step(self) -> int:
        """The number of steps that are known to survive the death of the server."""
        return int(self._durable()[0])

    @property
    def replays_from(self) -> int | None:
        """The step from which `replay` must be given inputs before the next step; None: no need.

        Only after `client.resume`, if the server has gone back to a checkpoint.
        """
        return self._lanes[0].replays_from if self._lanes else None

    @property
    def _started_at(self) -> int:
        """The steps that a sequence from a ticket had before it was opened."""
        ticket = self._openings[0].ticket
        return ticket.received if ticket is not None else 0

    def replay(self, x: Input) -> None:
        """Send the inputs of the steps from `replays_from` to `step_count` again: [steps, …].

        Their outputs are not returned: the caller has them. Raises InvalidInput when
        they are not as many.
        """
        inputs, _ = self._stream.connection.signature.to_rows(x)
        with self._stream.lock:
            self._stream.connection.replay(self._lanes[0].number, inputs)
            self._stream.flush()

    def confirm(self, step: int) -> None:
        """The outputs before `step` are stored: the server may forget them.

        Only for a sequence with `holds_outputs`: any other acknowledges outputs when
        they arrive.
        """
        with self._stream.lock:
            if not self._is_closed and self._lanes:
                self._stream.connection.confirm(self._lanes[0].number, step)
                self._stream.flush()

    def ticket(self) -> Ticket:
        """What a journal must store, so that `client.resume` can replace this handle."""
        if not self._lanes:
            raise SequenceClosed("this handle is not open", sequence_id=self.sequence_id)
        opening = self._openings[0]
        received = self.step_count
        if opening.holds_outputs and not self._is_closed:
            with self._stream.lock:
                received = self._stream.connection.acknowledged(self._lanes[0].number)
        return Ticket(
            self._model,
            opening.sequence_id,
            opening.writer,
            opening.ticket.attempt if opening.ticket is not None else 0,
            received,
            self.durable_step,
            opening.durability,
            opening.holds_outputs,
        )

    def _result(self, call: Call) -> Output:
        """The output in the shape of the input. Raises the step's error."""
        from_rows = self._stream.connection.signature.from_rows
        error = call.errors.get(0)
        if error is None:
            return from_rows(call.outputs, call.steps)
        if isinstance(error, StepFailed) and error.step is not None and call.steps is not None:
            applied = max(0, error.step - call.first_step)
            error.outputs = from_rows([array[:applied] for array in call.outputs], applied)
        raise error


class BaseGroup(BaseHandle):
    """Several sequences that step together."""

    def __init__(self, stream: BaseStream[Any], openings: Sequence[Opening]) -> None:
        super().__init__(stream, openings, (len(openings),))

    @property
    def sequence_ids(self) -> list[str]:
        """The ids of the sequences at the server, row by row."""
        return [opening.sequence_id for opening in self._openings]

    @property
    def step_counts(self) -> NDArray[np.int64]:
        """The number of steps of each sequence whose outputs have arrived: [sequences]."""
        return self._received()

    @property
    def durabilities(self) -> list[Durability | None]:
        """What the server grants, row by row; empty before the group is open."""
        return [lane.durability for lane in self._lanes]

    @property
    def durable_steps(self) -> NDArray[np.int64]:
        """The number of steps of each that are known to survive the server's death: [sequences]."""
        return self._durable()

    def _result(self, call: Call) -> GroupResult:
        ok = np.ones(len(self._openings), bool)
        ok[list(call.errors)] = False
        outputs = self._stream.connection.signature.from_rows(
            call.outputs, call.steps, len(self._openings)
        )
        return GroupResult(outputs, ok, call.errors)
