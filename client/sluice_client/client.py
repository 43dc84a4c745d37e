"""The client for threads."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Self

import grpc

from sluice_client.arguments import check_count
from sluice_client.errors import SequenceNotFound
from sluice_client.faces import BaseClient
from sluice_client.handles import (
    REWOUND_ATTEMPTS_MAX,
    REWOUND_PAUSE_SECONDS,
    BaseGroup,
    BaseHandle,
    BaseSequence,
    GroupResult,
)
from sluice_client.protocol.calls import Call, LaneRequest
from sluice_client.protocol.openings import Opening, SequenceState, ticket_opening
from sluice_client.protocol.signature import Input, Output
from sluice_client.protocol.tickets import Durability
from sluice_client.transport import questions
from sluice_client.transport.channel import CHANNEL_OPTIONS
from sluice_client.transport.thread_stream import Route, ThreadStream
from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2 import ModelInfo, SequenceInfo


class Client(BaseClient[grpc.Channel, ThreadStream, "Sequence", "Group"]):
    """Streams sequences through the models of a Sluice server, from any number of threads.

    All sequences of one model share one stream, and the steps that are pending at
    the same time leave as one message. A lost stream is replaced without its users
    noticing, as long as the server still has the sequences.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all streams: open sequences are parked, waiting steps get ClientClosed."""
        error = self._mark_closed()
        for stream in list(self._streams.values()):
            stream.close(error)
        for channel in self._channels:
            channel.close()

    def models(self) -> list[ModelInfo]:
        """The models of the server."""
        return self._route().ask(questions.models())

    def model(self, name: str) -> ModelContract:
        """The inputs and outputs of a model. Raises ModelNotFound."""
        return self._route().ask(questions.contract(name))

    def sequences(self, model: str | None = None) -> list[SequenceInfo]:
        """The live sequences of one model, or of all. Raises ModelNotFound."""
        return self._route().ask(questions.sequences(model))

    def state(self, model: str, sequence_id: str) -> SequenceState:
        """The state of a live sequence, whoever has it. Raises SequenceNotFound."""
        return self._route().ask(questions.state(model, sequence_id))

    def close_sequence(self, model: str, sequence_id: str) -> int:
        """Drop a live sequence, whoever has it; how many steps it had. Raises SequenceNotFound."""
        return self._route().ask(questions.close_sequence(model, sequence_id))

    def fork(
        self,
        model: str,
        sequence_id: str,
        fork_id: str | None = None,
        *,
        durability: Durability | None = None,
    ) -> "Sequence":
        """A copy of a live sequence, whoever has it, that continues from the same state.

        The copy exists when this returns, and is opened by `with`. Raises
        SequenceNotFound, or SequenceExists if `fork_id` is in use.
        """
        ticket = self._route().ask(questions.fork(model, sequence_id, fork_id, durability))
        return self._make_sequence(model, ticket_opening(ticket))

    def _route(self) -> Route:
        return Route(self._open_channels())

    def _make_channel(self, address: str) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)

    def _make_stream(self, model: str) -> ThreadStream:
        return ThreadStream(model, self._route(), self._reconnect_seconds_max, self._bounds)

    def _make_sequence(self, model: str, opening: Opening) -> "Sequence":
        return Sequence(self, self._stream(model), model, opening)

    def _make_group(self, model: str, openings: list[Opening]) -> "Group":
        return Group(self._stream(model), openings)


class _ThreadHandle(BaseHandle):
    """What a Sequence and a Group share."""

    _stream: ThreadStream

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            # Do not wait: a server that does not answer must not delay the error.
            self._request_end(is_parking=True)

    def open(self) -> None:
        """Open it now; `with` does."""
        self._stream.start()
        request = self._request_open()
        try:
            self._stream.wait(request)
        except BaseException:
            self._request_undo_open()
            raise
        if request.errors:
            # Undo the rest of a group before the caller tries again.
            self._finish(self._request_undo_open())
            request.check()
        self._note_opened(request)

    def close(self) -> None:
        """Drop the state at the server, once all outputs have arrived. May be called again."""
        self._finish(self._request_end(is_parking=False))

    def park(self) -> None:
        """Leave the state at the server, for Mode.TAKEOVER, once all outputs have arrived."""
        self._finish(self._request_end(is_parking=True))

    def _finish(self, request: LaneRequest | None) -> None:
        if request is not None:
            self._stream.wait(request)
            request.check()

    def _step(self, x: Input, timeout: float | None) -> Call:
        call = self._submit(x)
        assert call is not None  # it follows no other
        try:
            self._stream.wait(call, timeout)
        except TimeoutError:
            raise self._timed_out(call, timeout) from None
        except BaseException:
            self._unsettled.append(call)
            raise
        return call

    def _settle(self, timeout: float | None) -> list[Call]:
        """The unsettled steps: those before the first that failed, or else that one alone."""
        settled: list[Call] = []
        while self._unsettled:
            call = self._unsettled[0]
            self._stream.wait(call, timeout)
            if settled and call.errors:
                break
            settled.append(self._unsettled.pop(0))
        return settled


class Sequence(_ThreadHandle, BaseSequence):
    """One sequence: its steps are applied in the order in which they are given, each once."""

    def __init__(self, client: Client, stream: ThreadStream, model: str, opening: Opening) -> None:
        super().__init__(stream, model, opening)
        self._client = client

    def step(self, x: Input, *, timeout: float | None = None) -> Output:
        """Apply one step, or a chunk of steps, and return its output.

        x  [features] to [outputs], or [steps, features] to [steps, outputs]: the
           shapes of one step are the contract's; a dict by name for several inputs

        Raises InvalidInput, RunFailed or NonFinite with the state as before the step
        that failed; SequenceError when the sequence has gone. When it is interrupted,
        or after `timeout` seconds (StepTimedOut), the step may have been applied: the
        next step raises StepUnsettled until `settle` was called.
        """
        return self._result(self._step(x, timeout))

    def settle(self, *, timeout: float | None = None) -> list[Output]:
        """Wait for the steps that were interrupted or timed out; return their outputs in order.

        If a step failed, the outputs before it are returned first, and the next call
        raises its error.
        """
        return [self._result(call) for call in self._settle(timeout)]

    def stream(self, inputs: Iterable[Input], *, ahead: int = 256) -> Iterator[Output]:
        """The output of each input, in order, with up to `ahead` inputs under way at once.

        Outputs are returned between one input and the next: if `inputs` has to wait,
        `step` or AsyncClient return each output sooner. The first failed step raises,
        and later inputs were not applied. After leaving early, `settle` returns the
        outputs of what was under way.
        """
        check_count("ahead", ahead, least=1)
        calls: deque[Call] = deque()
        last: Call | None = None
        try:
            for x in inputs:
                last = self._submit(x, last)
                if last is None:
                    break
                calls.append(last)
                while calls and (calls[0].is_done or len(calls) >= ahead):
                    yield self._next(calls)
            while calls:
                yield self._next(calls)
        finally:
            self._unsettled += [call for call in calls if not call.errors]

    def _next(self, calls: deque[Call]) -> Output:
        self._stream.wait(calls[0])
        return self._result(calls.popleft())

    def state(self) -> SequenceState:
        """The state after all steps given so far, as a value that can start another sequence."""
        for _ in range(REWOUND_ATTEMPTS_MAX):
            self._finish(self._request_idle())
            with suppress(SequenceNotFound):
                state = self._client.state(self._model, self.sequence_id)
                if state.step >= self.step_count:
                    return state
            time.sleep(REWOUND_PAUSE_SECONDS)
        raise self._rewound_error()

    def fork(
        self, fork_id: str | None = None, *, durability: Durability | None = None
    ) -> "Sequence":
        """A copy that continues from the state after all steps given so far.

        fork_id  None: a random id

        The copy exists when this returns, and is opened by `with`. Raises
        SequenceExists if the id is in use.
        """
        for _ in range(REWOUND_ATTEMPTS_MAX):
            self._finish(self._request_idle())
            with suppress(SequenceNotFound):
                fork = self._client.fork(
                    self._model, self.sequence_id, fork_id, durability=durability
                )
                if fork._started_at >= self.step_count:
                    return fork
                self._client.close_sequence(self._model, fork.sequence_id)
            time.sleep(REWOUND_PAUSE_SECONDS)
        raise self._rewound_error()


class Group(_ThreadHandle, BaseGroup):
    """Sequences whose steps are the rows of one array, sent as one message."""

    def step(self, x: Input, *, timeout: float | None = None) -> GroupResult:
        """Apply one step, or a chunk of as many steps, of every sequence.

        x  [sequences, features], or [sequences, steps, features]

        A row that fails is not ok in the result and does not affect the others; the
        next step of each row follows its last applied one. Raises InvalidInput for
        what is wrong with the whole array. Interrupting is as for one sequence.
        """
        return self._result(self._step(x, timeout))

    def settle(self, *, timeout: float | None = None) -> list[GroupResult]:
        """Wait for the steps that were interrupted or timed out; return their results in order."""
        return [self._result(call) for call in self._settle(timeout)]
