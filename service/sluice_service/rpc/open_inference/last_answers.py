"""Keeps the answer to the last request of every sequence that counts its steps, for a repeat."""

import hashlib
from collections import OrderedDict

import numpy as np

from sluice_service.rpc.open_inference.requests import InferRequest, RequestLane

# For all answers of one model. Beyond it the oldest are dropped.
_BYTES_MAX = 256 * 2**20
# The bytes of an answer in addition to its outputs.
_BYTES_EACH = 1024


class _Answer:
    """One answered request, with its answer."""

    __slots__ = ("_digest", "_place", "bytes", "is_end", "outputs", "version")

    def __init__(self, request: InferRequest) -> None:
        self._place, self._digest = _place(request), _digest(request)
        self.is_end = request.is_end
        self.outputs = request.outputs
        self.version = request.version
        self.bytes = _BYTES_EACH + sum(map(len, request.outputs))

    def is_to(self, request: InferRequest) -> bool:
        """True if `request` repeats this request."""
        # The next request begins at another step, so only a repeat needs a digest.
        return (
            request.first_step is not None
            and _place(request) == self._place
            and _digest(request) == self._digest
        )


def _place(request: InferRequest) -> tuple[object, ...]:
    """The position of a request in its sequence."""
    return request.first_step, request.steps, request.is_start, request.is_end


def _digest(request: InferRequest) -> bytes:
    """A hash of the inputs."""
    inputs = hashlib.blake2b(digest_size=16)
    for array in request.inputs:
        inputs.update(np.ascontiguousarray(array).data)
    return inputs.digest()


class LastAnswers:
    """One model's last answers by sequence, and how many bytes they take."""

    def __init__(self) -> None:
        self.bytes = 0
        self._answers: OrderedDict[str, _Answer] = OrderedDict()

    def answer_repeat(self, lane: RequestLane, request: InferRequest) -> bool:
        """Finish a request that repeats the last one of its sequence; False if it does not."""
        answer = self._answers.get(lane.sequence_id)
        # If the sequence has ended, only its END shows that it was the same sequence.
        if answer is None or not (lane.is_open or answer.is_end) or not answer.is_to(request):
            return False
        request.outputs, request.version = answer.outputs, answer.version
        request.finish()
        return True

    def remember(self, lane: RequestLane, request: InferRequest) -> None:
        """Replace the answer of a lane's sequence; by none if its client counts no steps."""
        self.forget(lane)
        if request.first_step is None:
            return
        answer = self._answers[lane.sequence_id] = _Answer(request)
        self.bytes += answer.bytes
        while self.bytes > _BYTES_MAX:
            _, oldest = self._answers.popitem(last=False)
            self.bytes -= oldest.bytes

    def forget(self, lane: RequestLane) -> None:
        """Drop the answer of a lane's sequence, which has continued or begun again."""
        answer = self._answers.pop(lane.sequence_id, None)
        if answer is not None:
            self.bytes -= answer.bytes

    def forget_unless_end(self, lane: RequestLane) -> None:
        """Drop the answer of a sequence that has gone, unless it is the answer to its END."""
        answer = self._answers.get(lane.sequence_id)
        if answer is not None and not answer.is_end:
            self.forget(lane)
