"""Questions to a server outside its streams, each with how its answer is read."""

from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_bytes
from typing import Any, Final, Generic, TypeVar

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message

from sluice_client.errors import ModelNotFound, SequenceNotFound, SluiceError
from sluice_client.protocol.openings import SequenceState
from sluice_client.protocol.tickets import (
    WIRE_DURABILITY,
    Durability,
    Ticket,
    check_durability,
)
from sluice_protos import sequences_pb2 as wire
from sluice_protos.contract_pb2 import ModelContract
from sluice_protos.sequences_pb2_grpc import ModelsStub, SequencesStub

# How long a server may take to answer a question.
QUESTION_SECONDS_MAX: Final = 10.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Question(Generic[Result]):
    """One call of a server, blocking or with asyncio as its channel is."""

    stub: Callable[[Any], ModelsStub | SequencesStub]
    method: str
    request: Message
    # Makes the result from the answer, or from the list of all answers of a stream.
    read: Callable[[Any], Result]
    is_stream: bool = False
    # The error for the status NOT_FOUND.
    not_found: type[SluiceError] = ModelNotFound
    sequence_id: str | None = None

    def call(self, channel: "grpc.Channel | grpc.aio.Channel") -> Any:
        """Start the call: returns its answer, or what is to be awaited or iterated."""
        return getattr(self.stub(channel), self.method)(self.request, timeout=QUESTION_SECONDS_MAX)


def models() -> Question[list[wire.ModelInfo]]:
    """The models of the server."""
    request = wire.ListModelsRequest()
    return Question(ModelsStub, "ListModels", request, lambda answer: list(answer.models))


def contract(model: str) -> Question[ModelContract]:
    """The inputs and outputs of a model."""
    request = wire.GetModelRequest(name=model)
    return Question(ModelsStub, "GetModel", request, lambda answer: answer)


def sequences(model: str | None) -> Question[list[wire.SequenceInfo]]:
    """The live sequences of one model, or of all."""
    request = wire.ListSequencesRequest(model=model or "")
    return Question(SequencesStub, "ListSequences", request, list, is_stream=True)


def state(model: str, sequence_id: str) -> Question[SequenceState]:
    """The state of a live sequence."""
    request = wire.GetStateRequest(model=model, sequence_id=sequence_id)
    return _about_sequence("GetState", request, _read_state, sequence_id)


def close_sequence(model: str, sequence_id: str) -> Question[int]:
    """Drop a live sequence; the number of its steps."""
    request = wire.CloseSequenceRequest(model=model, sequence_id=sequence_id)
    return _about_sequence("CloseSequence", request, lambda answer: answer.step, sequence_id)


def fork(
    model: str, sequence_id: str, fork_id: str | None, durability: Durability | None
) -> Question[Ticket]:
    """Copy a live sequence; the ticket of the copy."""
    writer = token_bytes(16)
    request = wire.ForkRequest(
        model=model,
        sequence_id=sequence_id,
        fork_id=fork_id or "",
        writer=writer,
        durability=WIRE_DURABILITY[check_durability(durability)],
    )

    def read(answer: wire.ForkResponse) -> Ticket:
        step = answer.step
        return Ticket(model, answer.fork_id, writer, 0, step, step, durability=durability)

    return _about_sequence("Fork", request, read, sequence_id)


def _about_sequence(
    method: str, request: Message, read: Callable[[Any], Result], sequence_id: str
) -> Question[Result]:
    return Question(
        SequencesStub,
        method,
        request,
        read,
        not_found=SequenceNotFound,
        sequence_id=sequence_id,
    )


def _read_state(answer: wire.SequenceState) -> SequenceState:
    row = np.frombuffer(answer.row, "<f4").astype(np.float32)
    return SequenceState(answer.model_digest, answer.step, row)
