"""What a caller waits for, and the calls whose outputs are outstanding."""

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from sluice_client.errors import SluiceError
from sluice_client.protocol.signature import Array
from sluice_client.protocol.tables import Numbers, expand, groups


class Pending:
    """A request for one or several lanes that is done when it is done for all of them.

    `errors` has what went wrong, by position in `lanes`.
    """

    __slots__ = ("errors", "is_done", "lanes", "wake")

    def __init__(self, lanes: Numbers) -> None:
        self.lanes = lanes
        self.errors: dict[int, SluiceError] = {}
        self.is_done = False
        # Called once, when done; set by whoever waits.
        self.wake: Callable[[], None] = _wake_nobody

    def check(self) -> None:
        """Raise the error of the first lane that failed, if any did."""
        for position in sorted(self.errors):
            raise self.errors[position]

    def finish(self) -> None:
        """Mark as done, and wake whoever waits."""
        self.is_done = True
        self.wake()


class LaneRequest(Pending):
    """An open, a close, a park, or the wait for lanes to be idle: done when each lane is."""

    __slots__ = ("_left",)

    def __init__(self, lanes: Numbers) -> None:
        super().__init__(lanes)
        self._left = len(lanes)

    def resolve(self, position: int, error: SluiceError | None = None) -> None:
        """Finish one lane, with an error or without."""
        if error is not None:
            self.errors[position] = error
        self._left -= 1
        if not self._left:
            self.finish()


class Call(Pending):
    """The chunks that a caller submits together: one chunk for each of `lanes`.

    lanes    [chunks], each lane once
    counts   [chunks], the steps of each chunk
    inputs   [sum(counts), …] for each input of the model
    outputs  [sum(counts), …] for each output; rows whose step failed have no meaning
    """

    __slots__ = ("counts", "first_step", "inputs", "number", "outputs", "rows_left", "steps")

    _numbers = count()

    def __init__(
        self, lanes: Numbers, counts: Numbers, inputs: Sequence[Array], outputs: list[Array]
    ) -> None:
        super().__init__(lanes)
        self.counts = counts
        self.inputs = inputs
        self.outputs = outputs
        self.number = next(self._numbers)
        self.rows_left = len(inputs[0])
        # The steps of each chunk; None for single steps, whose outputs have no axis of steps.
        self.steps: int | None = None
        # Of the first lane; known once the steps of the call are numbered.
        self.first_step = -1


class OutstandingCalls(dict[int, Call]):
    """The calls that wait for outputs, by their number; a call leaves with its last row."""

    def deliver(
        self,
        chunks: NDArray[np.void],
        rows: Numbers,
        counts: Numbers,
        source: Numbers,
        outputs: list[Array],
    ) -> None:
        """Copy outputs to the calls of `chunks`: `counts` rows each, from `source` to `rows`."""
        order, runs = groups(chunks["call"])
        rows, counts, source = rows[order], counts[order], source[order]
        for number, start, stop in runs:
            call = self[number]
            if stop - start == 1:
                size, at, origin = int(counts[start]), int(rows[start]), int(source[start])
                for mine, array in zip(call.outputs, outputs, strict=True):
                    mine[at : at + size] = array[origin : origin + size]
            else:
                index = expand(rows[start:stop], counts[start:stop])
                origins = expand(source[start:stop], counts[start:stop])
                size = len(index)
                for mine, array in zip(call.outputs, outputs, strict=True):
                    mine[index] = array[origins]
            self._count_down(call, size)

    def fail(self, number: int, position: int, rows: int, error: SluiceError) -> None:
        """No output will come for `rows` rows of the chunk at `position` of a call."""
        call = self[number]
        call.errors[position] = error
        self._count_down(call, rows)

    def _count_down(self, call: Call, rows: int) -> None:
        call.rows_left -= rows
        if not call.rows_left:
            del self[call.number]
            call.finish()


def concatenate(calls: list[Call]) -> tuple[Numbers, Numbers, Numbers, Numbers, Numbers]:
    """All chunks of some calls: lanes, counts, call numbers, positions in the call, first rows."""
    lanes = np.concatenate([call.lanes for call in calls])
    counts = np.concatenate([call.counts for call in calls])
    sizes = np.array([len(call.lanes) for call in calls])
    positions = expand(np.zeros(len(calls), np.int64), sizes)
    if len(calls) == len(lanes):
        rows = positions
    else:
        rows = np.cumsum(counts) - counts
        rows -= np.repeat(rows[np.cumsum(sizes) - sizes], sizes)
    numbers = np.repeat(np.array([call.number for call in calls]), sizes)
    return lanes, counts, numbers, positions, rows


def _wake_nobody() -> None:
    pass
