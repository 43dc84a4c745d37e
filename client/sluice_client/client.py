"""The client for threads."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from secrets import token_bytes
from types import TracebackType
from typing import Final, Self
from uuid import uuid4

import grpc

from sluice_client.arguments import check_count
from sluice_client.errors import ClientClosed, SequenceNotFound
from sluice_client.handles import GroupHandle, GroupResult, Handle, SequenceHandle, Step
from sluice_client.protocol.calls import (
    Mode,
    Opening,
    Request,
    SequenceState,
    fork_request,
    group_openings,
    read_state,
    ticket_opening,
)
from sluice_client.protocol.replay_buffer import KEPT_BYTES_MAX, KEPT_STEPS_MAX, Bounds
from sluice_client.protocol.signature import Input, Output
from sluice_client.protocol.tickets import Durability, Ticket
from sluice_client.transport.retry import CHANNEL_OPTIONS, QUESTION_SECONDS_MAX, read_addresses
from sluice_client.transport.thread_stream import Route, ThreadStream
from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import (
    CloseSequenceRequest,
    GetStateRequest,
    ListModelsRequest,
    ListSequencesRequest,
    ModelInfo,
    SequenceInfo,
)
from sluice_protos.sequences_pb2_grpc import ModelsStub, SequencesStub

# How long a server that has gone back may answer before its stream is lost.
_GOING_BACK_SECONDS: Final = 0.05
_GOING_BACK_MAX: Final = 200


class Client:
    """Streams sequences through the models of a Sluice server, from any number of threads.

    All sequences of one model share one stream, and the steps that are pending at
    the same time leave as one message. A lost stream is mended without its users
    noticing, for as long as the server still has the sequences.
    """

    def __init__(
        self,
        address: str | Iterable[str] = "127.0.0.1:8001",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        reconnect_seconds_max: float = 60.0,
        kept_steps_max: int = KEPT_STEPS_MAX,
        kept_bytes_max: int = KEPT_BYTES_MAX,
    ) -> None:
        """Make a client; nothing is sent yet.

        address                `host:port`, any gRPC target such as `dns:///name:port`, or
                               several of them, tried in turn when one does not answer
        credentials            for TLS; None: plain text
        reconnect_seconds_max  how long steps wait for a server to answer again
        kept_steps_max         inputs of one sequence that are kept until they are durable
        kept_bytes_max         what they may take, of all sequences of one model
        """
        self._channels = [_dial(target, credentials) for target in read_addresses(address)]
        self._reconnect_seconds_max = reconnect_seconds_max
        self._bounds = Bounds(kept_steps_max, kept_bytes_max)
        self._streams: dict[str, ThreadStream] = {}
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let everything go: open sequences are parked, waiting steps get ClientClosed."""
        self._is_closed = True
        error = ClientClosed("the client was closed")
        for stream in list(self._streams.values()):
            stream.close(error)
        for channel in self._channels:
            channel.close()

    def models(self) -> list[ModelInfo]:
        """The models the server has."""
        answer = self._route().ask(
            lambda channel: ModelsStub(channel).ListModels(
                ListModelsRequest(), timeout=QUESTION_SECONDS_MAX
            )
        )
        return list(answer.models)

    def model(self, name: str) -> ModelContract:
        """What a model takes and gives. Raises ModelNotFound."""
        return self._route().contract(name)

    def sequence(
        self,
        model: str,
        sequence_id: str | None = None,
        *,
        mode: Mode = Mode.START,
        state: SequenceState | None = None,
        durability: Durability | None = None,
        holds_outputs: bool = False,
    ) -> "Sequence":
        """A sequence, opened by `with`; None: with an id of its own, from `state` if given.

        durability     what shall survive the server's death: "off", "periodic" or
                       "strict"; None, and at the most, what the server is set to
        holds_outputs  the server holds outputs until `confirm` says that they are safe,
                       for whoever may have to `resume` in another process

        Opening raises SequenceExists, SequenceNotFound, ModelNotFound, LimitReached,
        WrongModel, DataLoss or Unavailable.
        """
        opening = Opening(sequence_id or uuid4().hex, mode, state, durability, holds_outputs)
        return Sequence(self, self._stream(model), model, opening)

    def resume(self, ticket: Ticket, *, received: int | None = None) -> "Sequence":
        """The sequence of a ticket, where its handle stood; opened by `with`.

        For a process whose predecessor was killed. `received` is how many outputs are
        safe in its journal (None: as many as the ticket says). What the server has
        beyond them comes from `settle`; `replays_from` tells whether it needs inputs
        again. Of several handles with one ticket the latest has the sequence.
        """
        opening = ticket_opening(ticket.renew(received))
        return Sequence(self, self._stream(ticket.model), ticket.model, opening)

    def fork(
        self,
        model: str,
        sequence_id: str,
        fork_id: str | None = None,
        *,
        durability: Durability | None = None,
    ) -> "Sequence":
        """A copy of a live sequence, whoever has it, that goes on from the same state.

        It is there when this returns, and is opened by `with`. Raises
        SequenceNotFound, or SequenceExists where `fork_id` is alive.
        """
        writer = token_bytes(16)
        request = fork_request(model, sequence_id, fork_id, writer, durability)
        answer = self._route().ask(
            lambda channel: SequencesStub(channel).Fork(request, timeout=QUESTION_SECONDS_MAX),
            not_found=SequenceNotFound,
            sequence_id=sequence_id,
        )
        ticket = Ticket(
            model, answer.fork_id, writer, 0, answer.step, answer.step, durability=durability
        )
        return Sequence(self, self._stream(model), model, ticket_opening(ticket))

    def state(self, model: str, sequence_id: str) -> SequenceState:
        """The state of a live sequence, whoever has it. Raises SequenceNotFound."""
        request = GetStateRequest(model=model, sequence_id=sequence_id)
        answer = self._route().ask(
            lambda channel: SequencesStub(channel).GetState(request, timeout=QUESTION_SECONDS_MAX),
            not_found=SequenceNotFound,
            sequence_id=sequence_id,
        )
        return read_state(answer)

    def close_sequence(self, model: str, sequence_id: str) -> int:
        """Drop a live sequence, whoever has it; how many steps it had. Raises SequenceNotFound."""
        request = CloseSequenceRequest(model=model, sequence_id=sequence_id)
        answer = self._route().ask(
            lambda channel: SequencesStub(channel).CloseSequence(
                request, timeout=QUESTION_SECONDS_MAX
            ),
            not_found=SequenceNotFound,
            sequence_id=sequence_id,
        )
        return answer.step

    def sequences(self, model: str | None = None) -> list[SequenceInfo]:
        """The live sequences of one model, or of all. Raises ModelNotFound."""
        request = ListSequencesRequest(model=model or "")
        return self._route().ask(
            lambda channel: list(
                SequencesStub(channel).ListSequences(request, timeout=QUESTION_SECONDS_MAX)
            )
        )

    def group(
        self,
        model: str,
        sequence_ids: Iterable[str],
        *,
        mode: Mode = Mode.START,
        durability: Durability | None = None,
    ) -> "Group":
        """Sequences that step together, opened by `with`: all of them or none."""
        openings = group_openings(sequence_ids, mode, durability)
        return Group(self._stream(model), openings)

    def _stream(self, model: str) -> ThreadStream:
        # setdefault: two threads that come at once get the same one.
        return self._streams.get(model) or self._streams.setdefault(
            model, ThreadStream(model, self._route(), self._reconnect_seconds_max, self._bounds)
        )

    def _route(self) -> Route:
        if self._is_closed:
            raise ClientClosed("the client was closed; make another one")
        return Route(self._channels)


class _SyncHandle(Handle):
    """What a Sequence and a Group do alike."""

    _link: ThreadStream

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            # Not waited for: the error must not be held up by a server that does not answer.
            self._ask_end(is_parking=True)

    def open(self) -> None:
        """Open it now; `with` does."""
        self._link.meet()
        request = self._ask_open()
        try:
            self._link.wait(request)
        except BaseException:
            self._let_go()
            raise
        if request.errors:
            # What was opened beside it must be gone before the caller tries again.
            self._end(self._let_go())
            raise request.errors[min(request.errors)]
        self._note_opened()

    def close(self) -> None:
        """Drop the state at the server, once all outputs have arrived. May be called again."""
        self._end(self._ask_end(is_parking=False))

    def park(self) -> None:
        """Leave the state at the server, once all outputs have arrived: Mode.TAKEOVER goes on."""
        self._end(self._ask_end(is_parking=True))

    def _end(self, request: Request | None) -> None:
        if request is not None:
            self._link.wait(request)
            for error in request.errors.values():
                raise error

    def _take(self, x: Input, timeout: float | None) -> Step:
        step = self._give(x)
        assert step is not None  # it follows nothing
        try:
            self._link.wait(step.call, timeout)
        except TimeoutError:
            raise self._timed_out(step, timeout) from None
        except BaseException:
            self._leave(step)
            raise
        return step

    def _settle(self, timeout: float | None) -> list[Step]:
        """The steps nobody has taken: up to the first that failed, or that one alone."""
        settled: list[Step] = []
        while self._unsettled:
            step = self._unsettled[0]
            self._link.wait(step.call, timeout)
            if settled and step.call.errors:
                break
            settled.append(self._unsettled.pop(0))
        return settled


class Sequence(_SyncHandle, SequenceHandle):
    """One sequence: its steps are applied in the order in which they are given, each once."""

    def __init__(self, client: Client, link: ThreadStream, model: str, opening: Opening) -> None:
        super().__init__(link, model, opening)
        self._client = client

    def step(self, x: Input, *, timeout: float | None = None) -> Output:
        """Apply one step, or a chunk of steps, and return its output.

        x  [features] to [outputs], or [steps, features] to [steps, outputs]: the
           shapes of one step are the contract's; a dict by name where the model has
           several inputs

        Raises InvalidInput, RunFailed or NonFinite with the state as before the step
        that failed; SequenceError when the sequence has gone. When it is interrupted,
        or after `timeout` seconds (StepTimedOut), the step may have been applied: the
        next step raises StepUnsettled until `settle` was called.
        """
        return self._result(self._take(x, timeout))

    def settle(self, *, timeout: float | None = None) -> list[Output]:
        """Wait for the steps that were interrupted or timed out; return their outputs in order.

        A step that failed raises its error here, after the outputs before it were
        returned by a call of their own.
        """
        return [self._result(step) for step in self._settle(timeout)]

    def stream(self, inputs: Iterable[Input], *, ahead: int = 256) -> Iterator[Output]:
        """The output of each input, in order, with up to `ahead` inputs under way at once.

        Outputs come between one input and the next: where `inputs` waits for the
        world, `step` or AsyncClient give each output as soon as it is there. The first
        failed step raises; what was given behind it was not applied. Leaving early
        leaves what was under way to `settle`.
        """
        check_count("ahead", ahead, least=1)
        steps: deque[Step] = deque()
        last: Step | None = None
        try:
            for x in inputs:
                last = self._give(x, last.call if last else None)
                if last is None:
                    break
                steps.append(last)
                while steps and (steps[0].call.is_done or len(steps) >= ahead):
                    yield self._next(steps)
            while steps:
                yield self._next(steps)
        finally:
            self._unsettled += [step for step in steps if not step.call.errors]

    def _next(self, steps: deque[Step]) -> Output:
        self._link.wait(steps[0].call)
        return self._result(steps.popleft())

    def state(self) -> SequenceState:
        """The state after all steps given so far, as a value that can start another sequence."""
        for _ in range(_GOING_BACK_MAX):
            self._rest()
            with suppress(SequenceNotFound):
                state = self._client.state(self._model, self.sequence_id)
                if state.step >= self.step_count:
                    return state
            # The server has just gone back: the stream is about to notice.
            time.sleep(_GOING_BACK_SECONDS)
        raise self._gone_back_error()

    def fork(
        self, fork_id: str | None = None, *, durability: Durability | None = None
    ) -> "Sequence":
        """A copy that goes on from the state after all steps given so far.

        None: with an id of its own. It is there when this returns, and is opened by
        `with`. Raises SequenceExists where the id is alive.
        """
        for _ in range(_GOING_BACK_MAX):
            self._rest()
            with suppress(SequenceNotFound):
                fork = self._client.fork(
                    self._model, self.sequence_id, fork_id, durability=durability
                )
                if fork._starts_at >= self.step_count:
                    return fork
                self._client.close_sequence(self._model, fork.sequence_id)
            time.sleep(_GOING_BACK_SECONDS)
        raise self._gone_back_error()

    def _rest(self) -> None:
        request = self._ask_rest()
        self._link.wait(request)
        for error in request.errors.values():
            raise error


class Group(_SyncHandle, GroupHandle):
    """Sequences whose steps come as the rows of one array and leave as one message."""

    def step(self, x: Input, *, timeout: float | None = None) -> GroupResult:
        """Apply one step, or a chunk of as many steps, of every sequence.

        x  [sequences, features], or [sequences, steps, features]

        A row that fails is not ok in the result, the others are as if it were not
        there; the next call goes on from where each row stands. Raises InvalidInput
        for what is wrong with the whole array. Interrupting is as for one sequence.
        """
        return self._result(self._take(x, timeout))

    def settle(self, *, timeout: float | None = None) -> list[GroupResult]:
        """Wait for the steps that were interrupted or timed out; return their results in order."""
        return [self._result(step) for step in self._settle(timeout)]


def _dial(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
