"""Keeps the answer to the last request of every sequence that counts its steps, for its repeat."""

import hashlib
from collections import OrderedDict

import numpy as np

from sluice_service.rpc.open_inference.messages import Request
from sluice_service.rpc.open_inference.refusals import Lane

# Of one model's answers: the oldest are forgotten beyond it.
_BYTES_MAX = 256 * 2**20
# What is kept of each beside its outputs.
_BYTES_EACH = 1024


class _Answer:
    """One request that was answered, and with what."""

    __slots__ = ("_digest", "_place", "bytes", "is_end", "outputs", "version")

    def __init__(self, request: Request) -> None:
        self._place, self._digest = _place(request), _digest(request)
        self.is_end = request.is_end
        self.outputs = request.outputs
        self.version = request.version
        self.bytes = _BYTES_EACH + sum(map(len, request.outputs))

    def is_to(self, request: Request) -> bool:
        """True when `request` is that request once more."""
        # The next one is at another place: only a repeat's inputs are worth a look.
        return (
            request.first is not None
            and _place(request) == self._place
            and _digest(request) == self._digest
        )


def _place(request: Request) -> tuple[object, ...]:
    """Where in its sequence a request is."""
    return request.first, request.steps, request.is_start, request.is_end


def _digest(request: Request) -> bytes:
    """Of its inputs."""
    inputs = hashlib.blake2b(digest_size=16)
    for array in request.inputs:
        inputs.update(np.ascontiguousarray(array).data)
    return inputs.digest()


class Answers:
    """One model's answers by sequence, and how many bytes they take."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Answer] = OrderedDict()
        self._bytes = 0

    def repeat(self, lane: Lane, request: Request) -> bool:
        """True where a request was the last of its sequence once more, and is answered as then."""
        kept = self._kept.get(lane.key)
        # Where the sequence has gone, only its END tells that it was the same one.
        if kept is None or not (lane.is_open or kept.is_end) or not kept.is_to(request):
            return False
        request.outputs, request.version = kept.outputs, kept.version
        request.finish()
        return True

    def keep(self, lane: Lane, request: Request) -> None:
        """Keep the answer to a request in place of the one before, if its client counts steps."""
        self.forget(lane)
        if request.first is None:
            return
        kept = self._kept[lane.key] = _Answer(request)
        self._bytes += kept.bytes
        while self._bytes > _BYTES_MAX:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.bytes

    def forget(self, lane: Lane) -> None:
        """Have no answer for a lane's sequence: it has gone on, or begun."""
        kept = self._kept.pop(lane.key, None)
        if kept is not None:
            self._bytes -= kept.bytes

    def lose(self, lane: Lane) -> None:
        """A lane's sequence has gone: have no answer for it but that to its END."""
        kept = self._kept.get(lane.key)
        if kept is not None and not kept.is_end:
            self.forget(lane)
