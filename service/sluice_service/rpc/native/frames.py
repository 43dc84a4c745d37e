"""Converts the messages of a stream: requests to arrays, outputs and events to responses."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from sluice_protos.sequences_pb2 import InferRequest, InferResponse
from sluice_service.arrays import Array, Integers, ones
from sluice_service.batching.inputs import STEPS_MAX, InputRules
from sluice_service.errors import InvalidInputError, RequestError
from sluice_service.rpc.native.values import put_notice
from sluice_service.rpc.native.wire import encode_outputs
from sluice_service.sequences.events import Durable, Ended, Event, Failed, Limits, Opened, Outputs
from sluice_service.sequences.table import NONE

# The most bytes that a response has for each chunk in addition to the rows.
_CHUNK_BYTES = 24
_RESPONSE_BYTES = 1024
# The most events in one response. More would block the event loop.
_NOTICES_MAX = 256
_RANK = {Limits: 0, Opened: 0, Durable: 1, Failed: 2, Ended: 3}
RESPONSE_BYTES_DEFAULT = 4 * 2**20


def parse(data: bytes) -> InferRequest:
    """Parse a request. Raises RequestError, which ends the stream."""
    try:
        return InferRequest.FromString(data)
    except DecodeError as error:
        raise RequestError(
            "a message that is not a sluice.v1.InferRequest (truncated, or of another service)"
        ) from error


@dataclass(slots=True)
class Chunks:
    """Chunks of a message: [chunks], [chunks], [chunks] or None, one [sum(steps), …] an input.

    An error that concerns all chunks may be in the place of the inputs.
    """

    lanes: Integers
    steps: Integers
    first: Integers | None
    inputs: list[Array] | InvalidInputError

    def parts(self, chunks_max: int) -> "Iterator[Chunks]":
        """Split it into pieces of at most `chunks_max` chunks, with copies of their rows."""
        if len(self.lanes) <= chunks_max:
            yield self
            return
        row = 0
        for start in range(0, len(self.lanes), chunks_max):
            part = slice(start, start + chunks_max)
            steps = self.steps[part]
            rows = slice(row, row := row + int(steps.sum()))
            yield Chunks(
                self.lanes[part],
                steps,
                None if self.first is None else self.first[part],
                self.inputs
                if isinstance(self.inputs, InvalidInputError)
                else [array[rows].copy() for array in self.inputs],
            )


def read_chunks(request: InferRequest, rules: InputRules) -> Chunks:
    """The chunks of a request."""
    count = len(request.lane)
    lanes: Integers = np.fromiter(request.lane, np.int64, count)
    steps, first = ones(count), None
    inputs: list[Array] | InvalidInputError
    try:
        if request.steps:
            steps = _parallel("steps", np.array(request.steps, np.int64), count)
        if request.first_step:
            named = np.minimum(np.array(request.first_step, np.uint64), STEPS_MAX)
            first = _parallel("first_step", named.astype(np.int64), count)
        rows = int(steps.sum()) if request.steps else count
        inputs = rules.as_rows(rules.check(request.inputs, rows))
    except InvalidInputError as error:
        # Without its traceback, which would keep the whole message in memory.
        inputs = error.with_traceback(None)
    return Chunks(lanes, steps, first, inputs)


def read_single(
    request: InferRequest, rules: InputRules
) -> tuple[int, int, int, list[bytes]] | None:
    """The lane, steps, first step (or NONE) and rows of a request of one chunk.

    None if it has more chunks or anything unusual. Then `read_chunks` reads it.
    """
    lanes, lengths, named = request.lane, request.steps, request.first_step
    if len(lanes) != 1 or len(lengths) > 1 or len(named) > 1:
        return None
    steps = lengths[0] if lengths else 1
    first = named[0] if named else NONE
    if not 1 <= steps <= rules.chunk_steps_max or first > STEPS_MAX:
        return None
    try:
        return lanes[0], steps, first, rules.check(request.inputs, steps)
    except InvalidInputError:
        return None


def _parallel(name: str, values: Integers, count: int) -> Integers:
    if len(values) != count:
        raise InvalidInputError(
            f"{len(values)} values in {name} for {count} chunks in lane; give one for each chunk"
        )
    return values


class Encoder:
    """Packs an outbox into as few responses as order and size allow."""

    def __init__(self, rules: InputRules, *, response_bytes_max: int) -> None:
        # A response has at least one row or one event, even if the client accepts less.
        budget = max(1, (response_bytes_max or RESPONSE_BYTES_DEFAULT) - _RESPONSE_BYTES)
        self._bytes_max = budget
        self._rows_max = max(1, budget // (rules.output_step_bytes + _CHUNK_BYTES))

    def notices(self, outbox: "deque[Event]") -> bytes:
        """Take the events at the front out of the outbox, as one response.

        A client reads a response's opens, then its faults, then its ends. Events that
        happened in another order go into another response.
        """
        response = InferResponse()
        rank, size = 0, 0
        for _ in range(min(len(outbox), _NOTICES_MAX)):
            notice = outbox[0]
            if size > self._bytes_max:
                break
            if isinstance(notice, Outputs) or _RANK[type(notice)] < rank:
                break
            outbox.popleft()
            rank = _RANK[type(notice)]
            size += put_notice(notice, response) + _CHUNK_BYTES
        return response.SerializeToString()

    def frames(self, delivery: Outputs) -> list[bytes]:
        """The responses that carry one delivery's outputs."""
        if delivery.rows <= self._rows_max:
            return [_encode(delivery)]
        return [_encode(part) for part in delivery.split(self._rows_max)]


def _encode(delivery: Outputs) -> bytes:
    return encode_outputs(delivery.lanes, delivery.lengths, delivery.first, delivery.outputs)
