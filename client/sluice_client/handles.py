"""What a sequence and a group know of themselves, whoever waits: a coroutine or a thread."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

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
from sluice_client.protocol.calls import Call, Mode, Opening, Request
from sluice_client.protocol.connection import Connection
from sluice_client.protocol.lane import Lane
from sluice_client.protocol.resume import told
from sluice_client.protocol.signature import Input, Output
from sluice_client.protocol.tables import Numbers
from sluice_client.protocol.tickets import Durability, Ticket


class Link(Protocol):
    """What a handle needs of the stream it shares with others."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while the connection is used."""
        ...

    @property
    def connection(self) -> Connection:
        """The stream's logic; there once the stream has met its server."""
        ...

    def flush(self) -> None:
        """Have what was asked of the connection sent."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """A call with what its handle must know to give its output back in shape."""

    call: Call
    # Of the chunk; None where one step was given.
    steps: int | None


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What one step of a group gave.

    outputs  [sequences, …] or [sequences, steps, …]; by name where the model has
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


class Handle:
    """Sequences that were opened together, and the steps under way for them."""

    def __init__(self, link: Link, openings: Sequence[Opening], leading: tuple[int, ...]) -> None:
        self._link = link
        self._openings = openings
        self._leading = leading
        self._lanes: Numbers | None = None
        # What is known of the lanes, once they have been opened.
        self._known: list[Lane] = []
        self._is_closed = False
        # How far each sequence was when the lanes were let go: received, durable.
        self._last: tuple[Numbers, Numbers] | None = None
        # Steps whose output nobody waits for any more.
        self._unsettled: list[Step] = []

    def _ask_open(self) -> Request:
        if self._lanes is not None or self._is_closed:
            raise SequenceClosed("a handle is opened once; make another one", sequence_id=self._id)
        with self._link.lock:
            request = self._link.connection.open(self._openings)
            self._lanes = request.lanes
            self._link.flush()
        return request

    def _ask_rest(self) -> Request:
        if self._lanes is None or self._is_closed:
            raise SequenceClosed("this handle is not open", sequence_id=self._id)
        with self._link.lock:
            return self._link.connection.rest(self._lanes)

    def _note_opened(self) -> None:
        """All lanes are open: what came of steps that another handle gave is for `settle`."""
        assert self._lanes is not None
        with self._link.lock:
            self._known = [self._link.connection.lane(number) for number in self._lanes.tolist()]
        for lane in self._known:
            if lane.restored is not None:
                self._unsettled.append(Step(lane.restored, int(lane.restored.counts[0])))

    def _let_go(self) -> Request | None:
        """Leave: what this handle has made is closed, the rest is parked."""
        mode = self._openings[0].mode
        return self._ask_end(is_parking=mode in (Mode.TAKEOVER, Mode.START_OR_RESUME))

    def _ask_end(self, *, is_parking: bool) -> Request | None:
        """Close or park, once; None where there is nothing (more) to end."""
        if self._lanes is None or self._is_closed:
            self._is_closed = True
            return None
        self._is_closed = True
        with self._link.lock:
            connection = self._link.connection
            # The lanes' numbers may soon be others'.
            self._last = self._look(connection)
            request = (connection.park if is_parking else connection.close)(self._lanes)
            self._link.flush()
        return request

    def _give(self, x: Input, follows: Call | None = None) -> Step | None:
        """Give the next steps; None where `follows` has failed, for then they would follow it not.

        Raises InvalidInput, StepUnsettled, SequenceClosed.
        """
        if self._lanes is None or self._is_closed:
            why = "is not open; use it in a `with` block" if self._lanes is None else "was closed"
            raise SequenceClosed(f"this handle {why}", sequence_id=self._id)
        if self._unsettled:
            raise self._unsettled_error()
        if self._known and self._known[0].replays_from is not None:
            raise self._replay_error(self._known[0].replays_from)
        connection = self._link.connection
        try:
            inputs, steps = connection.signature.take(x, *self._leading)
        except SluiceError as error:
            raise error.at(self._id, None) from None
        counts = np.full(len(self._lanes), 1 if steps is None else steps, np.int64)
        with self._link.lock:
            if follows is not None and follows.errors:
                return None
            call = connection.submit(self._lanes, counts, inputs)
            self._link.flush()
        return Step(call, steps)

    def _leave(self, step: Step) -> None:
        """Nobody waits for this step any more: its output is for `settle`."""
        self._unsettled.append(step)

    def _gone_back_error(self) -> Unavailable:
        return Unavailable(
            "the server does not come to where this sequence stands; try again",
            sequence_id=self._id,
        )

    def _timed_out(self, step: Step, timeout: float | None) -> StepTimedOut:
        self._leave(step)
        return StepTimedOut(
            f"no output within {timeout} s; it may have been applied, or will be: "
            "settle() waits for it",
            sequence_id=self._id,
            step=self._first_step(step),
        )

    def _unsettled_error(self) -> StepUnsettled:
        return StepUnsettled(
            "it was cancelled or timed out, and may have been applied; "
            "settle() waits for its output, then go on",
            sequence_id=self._id,
            step=self._first_step(self._unsettled[0]),
        )

    def _replay_error(self, first: int) -> ReplayNeeded:
        return ReplayNeeded(
            f"the server is at step {first}, and needs inputs again that another handle was "
            "given; replay() takes them",
            sequence_id=self._id,
            step=first,
        )

    def _first_step(self, step: Step) -> int:
        with self._link.lock:
            self._link.connection.ledger.admit()
            return step.call.first_step

    def _received(self) -> NDArray[np.int64]:
        """Outputs that have arrived, for each sequence."""
        if self._last is not None:
            return self._last[0]
        if self._lanes is None:
            return np.zeros(len(self._openings), np.int64)
        with self._link.lock:
            return self._link.connection.ledger.lanes["received"][self._lanes].copy()

    def _durable(self) -> NDArray[np.int64]:
        """Steps that are durable, for each sequence."""
        if self._last is not None:
            return self._last[1]
        if self._lanes is None:
            return np.zeros(len(self._openings), np.int64)
        with self._link.lock:
            return self._look(self._link.connection)[1]

    def _look(self, connection: Connection) -> tuple[Numbers, Numbers]:
        assert self._lanes is not None
        received = connection.ledger.lanes["received"][self._lanes].copy()
        return received, np.array([connection.durable(lane) for lane in self._lanes.tolist()])

    @property
    def _id(self) -> str | None:
        return self._openings[0].sequence_id if len(self._openings) == 1 else None


class SequenceHandle(Handle):
    """One sequence."""

    def __init__(self, link: Link, model: str, opening: Opening) -> None:
        super().__init__(link, [opening], ())
        self._model = model

    @property
    def sequence_id(self) -> str:
        """What the server knows the sequence by."""
        return self._openings[0].sequence_id

    @property
    def step_count(self) -> int:
        """Steps of the sequence whose outputs have arrived."""
        return int(self._received()[0])

    @property
    def durability(self) -> Durability | None:
        """What the server has given; None before the sequence was opened."""
        return self._known[0].durability if self._known else None

    @property
    def durable_step(self) -> int:
        """Steps that are known to survive the death of the server."""
        return int(self._durable()[0])

    @property
    def replays_from(self) -> int | None:
        """From which step on `replay` must be given inputs before the next step; None: it need not.

        Only after `client.resume`, where the server has gone back to a checkpoint.
        """
        return self._known[0].replays_from if self._known else None

    @property
    def _starts_at(self) -> int:
        """How many steps a fork has before it was opened."""
        ticket = self._openings[0].ticket
        return ticket.received if ticket is not None else 0

    def replay(self, x: Input) -> None:
        """Give the inputs of the steps from `replays_from` to `step_count` again: [steps, …].

        Their outputs are not returned: the caller has them. Raises InvalidInput when
        they are not as many.
        """
        inputs, _ = self._link.connection.signature.take(x)
        with self._link.lock:
            self._link.connection.replay(self._known[0].number, inputs)
            self._link.flush()

    def confirm(self, step: int) -> None:
        """The outputs before `step` are safe: the server may forget them.

        For a sequence with `holds_outputs`; any other confirms what has arrived by itself.
        """
        with self._link.lock:
            if not self._is_closed and self._known:
                self._link.connection.confirm(self._known[0].number, step)
                self._link.flush()

    def ticket(self) -> Ticket:
        """What a journal must have so that `client.resume` can go on as this handle."""
        if not self._known:
            raise SequenceClosed("this handle is not open", sequence_id=self.sequence_id)
        opening = self._openings[0]
        received = self.step_count
        if opening.holds_outputs and not self._is_closed:
            with self._link.lock:
                received = told(self._known[0], self._link.connection.ledger)
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

    def _result(self, step: Step) -> Output:
        """The output in the shape of the input, or the error raised."""
        give = self._link.connection.signature.give
        error = step.call.errors.get(0)
        if error is None:
            return give(step.call.outputs, step.steps)
        if isinstance(error, StepFailed) and error.step is not None and step.steps is not None:
            applied = max(0, error.step - step.call.first_step)
            error.outputs = give([array[:applied] for array in step.call.outputs], applied)
        raise error


class GroupHandle(Handle):
    """Several sequences that step together."""

    def __init__(self, link: Link, openings: Sequence[Opening]) -> None:
        super().__init__(link, openings, (len(openings),))

    @property
    def sequence_ids(self) -> list[str]:
        """What the server knows the sequences by, row by row."""
        return [opening.sequence_id for opening in self._openings]

    @property
    def step_counts(self) -> NDArray[np.int64]:
        """Steps of each sequence whose outputs have arrived: [sequences]."""
        return self._received()

    @property
    def durabilities(self) -> list[Durability | None]:
        """What the server has given, row by row; empty before the group was opened."""
        return [lane.durability for lane in self._known]

    @property
    def durable_steps(self) -> NDArray[np.int64]:
        """Steps of each sequence that are known to survive the death of the server: [sequences]."""
        return self._durable()

    def _result(self, step: Step) -> GroupResult:
        ok = np.ones(len(self._openings), bool)
        ok[list(step.call.errors)] = False
        outputs = self._link.connection.signature.give(
            step.call.outputs, step.steps, len(self._openings)
        )
        return GroupResult(outputs, ok, step.call.errors)
