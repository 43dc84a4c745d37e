"""Defines what the server tells the client of a stream, as plain values; `rpc/` encodes them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from sluice_service.arrays import Integers
from sluice_service.errors import LaneError
from sluice_service.sequences.states import Slots
from sluice_service.store.claims import Durability


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for the client of a stream. They are the first event of every stream."""

    request_bytes_max: int
    chunk_steps_max: int
    credit_steps: int  # steps of inputs that may be outstanding
    credit_bytes: int  # the same in bytes
    unacknowledged_steps_max: int  # a sequence with that many held outputs does not run


@dataclass(slots=True)
class Opened:
    """A lane has its sequence."""

    lane: int
    sequence_id: str
    epoch: int
    applied: int  # steps that the state holds
    durable: int  # steps that survive the server's process
    held_from: int  # the first output that is still held
    durability: Durability


@dataclass(slots=True)
class Failed:
    """An open or a chunk of a lane was refused; the state is as it was."""

    lane: int
    error: LaneError
    expected_step: int  # of an open lane: the steps applied


class EndReason(Enum):
    """Why a sequence left its lane; named as in sluice.v1.Closed.Reason."""

    CLIENT = auto()  # closed by the client
    PARKED = auto()  # parked by the client
    IDLE = auto()  # no step for too long; the state is gone
    FENCED = auto()  # another lane or server has the sequence now
    DRAINING = auto()  # the server stops


@dataclass(slots=True)
class Ended:
    """A lane has no sequence any more."""

    lane: int
    reason: EndReason


@dataclass(slots=True)
class Durable:
    """The store has a lane's sequence up to `step`. The client may drop inputs below it."""

    lane: int
    step: int


@dataclass(slots=True)
class Outputs:
    """Outputs of one run for one stream: chunks of several lanes, rows one after another."""

    slots: Slots
    generations: NDArray[np.int64]
    lanes: Integers
    first: Integers
    lengths: Integers
    rows: int
    outputs: list[bytes]
    # How many responses the stream had sent when the last of these outputs was sent.
    responses: int = 0

    def chunks(self) -> Iterator[tuple[int, int, int, list[bytes]]]:
        """Each chunk alone: (index, first, steps, outputs), the bytes copied."""
        rows, start = self.rows, 0
        chunks = zip(self.first.tolist(), self.lengths.tolist(), strict=True)
        for index, (first, steps) in enumerate(chunks):
            end = start + steps
            yield index, first, steps, [cut(output, rows, start, end) for output in self.outputs]
            start = end

    def chunk(self, index: int) -> tuple[int, int, list[bytes]]:
        """One chunk: (first, steps, outputs), the bytes copied."""
        steps, start = int(self.lengths[index]), int(self.lengths[:index].sum())
        outputs = [cut(output, self.rows, start, start + steps) for output in self.outputs]
        return int(self.first[index]), steps, outputs

    def only(self, chosen: NDArray[np.bool_]) -> "Outputs":
        """The same outputs, but only of the chunks that are `chosen` [chunks]."""
        row_bytes = [len(output) // self.rows for output in self.outputs]
        rows = np.repeat(chosen, self.lengths)
        return replace(
            self,
            slots=self.slots[chosen],
            generations=self.generations[chosen],
            lanes=self.lanes[chosen],
            first=self.first[chosen],
            lengths=self.lengths[chosen],
            rows=int(rows.sum()),
            outputs=[
                np.frombuffer(output, np.uint8).reshape(self.rows, size)[rows].tobytes()
                for output, size in zip(self.outputs, row_bytes, strict=True)
            ],
        )

    def split(self, rows_max: int) -> Iterator["Outputs"]:
        """The same outputs in pieces of at most `rows_max` rows."""
        rows = self.rows
        if rows <= rows_max:
            yield self
            return
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        for start in range(0, rows, rows_max):
            stop = min(start + rows_max, rows)
            chosen = np.flatnonzero((starts < stop) & (ends > start))
            skipped = np.maximum(start - starts[chosen], 0)
            yield replace(
                self,
                slots=self.slots[chosen],
                generations=self.generations[chosen],
                lanes=self.lanes[chosen],
                first=self.first[chosen] + skipped,
                lengths=np.minimum(ends[chosen], stop) - starts[chosen] - skipped,
                rows=stop - start,
                outputs=[cut(output, rows, start, stop) for output in self.outputs],
            )


Notice = Limits | Opened | Failed | Ended | Durable
Event = Notice | Outputs


def cut(output: bytes, rows: int, start: int, stop: int) -> bytes:
    """Rows `start` to `stop` of an output that has `rows` rows."""
    row_bytes = len(output) // rows
    return output[start * row_bytes : stop * row_bytes]
