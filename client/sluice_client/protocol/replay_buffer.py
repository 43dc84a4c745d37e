"""Answered inputs that are retained, because a server may go back and need them again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sluice_client.protocol.calls import Call
from sluice_client.protocol.signature import Array
from sluice_client.protocol.tables import NONE, Numbers, Table

RETAINED_STEPS_MAX: Final = 65_536
RETAINED_BYTES_MAX: Final = 256 * 2**20

_ENDLESS: Final = 2**62
# What a retained chunk costs beside its rows, roughly: Python objects and table rows.
_CHUNK_BYTES: Final = 512
# From this many lanes on, array operations are faster than a loop over the lanes.
_LANES_MANY: Final = 16


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many inputs that are not durable are retained at most.

    Beyond a bound no further step is sent until the server says that more is durable.
    """

    steps_max: int = RETAINED_STEPS_MAX  # of one sequence, including unanswered steps
    bytes_max: int = RETAINED_BYTES_MAX  # of all sequences of one model, answered steps only

    def __post_init__(self) -> None:
        if self.steps_max < 1 or self.bytes_max < 1:
            raise ValueError("kept_steps_max and kept_bytes_max are at least 1")


@dataclass(slots=True)
class RetainedInputs:
    """The inputs of one call, and how many of its chunks are in the buffer."""

    inputs: Sequence[Array]
    chunks: int = 0


class ReplayBuffer:
    """The answered chunks of all lanes that may have to be sent again.

    Retained chunks stay in the chain of their lane, in front of the unanswered ones.
    """

    def __init__(self, lanes: Table, chunks: Table, bounds: Bounds | None = None) -> None:
        self._lanes = lanes
        self._chunks = chunks
        self._bounds = bounds or Bounds()
        # By the number of the call that submitted them.
        self.sources: dict[int, RetainedInputs] = {}
        # How many lanes await durable, and how many retain.
        self.lanes_awaiting = self.lanes_retaining = 0
        self._row_count = 0
        self._chunk_count = 0

    def bytes(self, step_bytes: int) -> int:
        """The size of the buffer, roughly, for steps of `step_bytes`."""
        return self._row_count * step_bytes + self._chunk_count * _CHUNK_BYTES

    def await_durable(self, lane: int, *, is_awaiting: bool) -> None:
        """Set whether the server may go back on this lane, to what it has said is durable."""
        rare = self._lanes.rare[lane]
        self.lanes_awaiting += int(is_awaiting) - int(rare["awaits_durable"])
        rare["awaits_durable"] = is_awaiting

    def set_retaining(self, lane: int, *, is_retaining: bool) -> None:
        """Set whether answered chunks of this lane are retained."""
        rare = self._lanes.rare[lane]
        self.lanes_retaining += int(is_retaining) - int(rare["retains"])
        rare["retains"] = is_retaining

    def replay_floor(self, lane: int) -> int:
        """The step that no server goes back behind: inputs before it are not retained."""
        rare = self._lanes.rare[lane]
        may_go_back = rare["retains"] or rare["awaits_durable"]
        return int(rare["durable"] if may_go_back else self._lanes["received"][lane])

    def chunk_at(self, lane: int, step: int) -> int:
        """The chunk of a lane that holds a step; NONE if none does."""
        stop, after = self._chunks["stop"], self._chunks["next"]
        chunk = int(self._lanes.rare["oldest"][lane])
        if chunk == NONE:
            chunk = int(self._lanes["head"][lane])
        while chunk != NONE and stop[chunk] <= step:
            chunk = int(after[chunk])
        return chunk

    def send_limits(self, lanes: Numbers, step_bytes: int) -> Numbers:
        """Up to which step each of `lanes` may send, by the bounds: [lanes]."""
        mine, rare = self._lanes.rows[lanes], self._lanes.rare[lanes]
        # What has been answered may always be sent again: it is retained already.
        limit = mine["received"]
        if self.bytes(step_bytes) < self._bounds.bytes_max:
            limit = np.maximum(limit, rare["durable"] + self._bounds.steps_max)
        return np.where(rare["awaits_durable"], limit, _ENDLESS)

    def retain(self, lanes: Numbers, chunk: Numbers, calls: Mapping[int, Call]) -> None:
        """Add the chunks, the next one of each lane, which have been answered."""
        oldest = self._lanes.rare["oldest"][lanes]
        self._lanes.rare["oldest"][lanes] = np.where(oldest == NONE, chunk, oldest)
        self._lanes.rare["newest"][lanes] = chunk
        mine = self._chunks.rows[chunk]
        self._row_count += _row_count(mine)
        self._chunk_count += len(mine)
        for number, count in _counted(mine["call"]):
            source = self.sources.get(number)
            if source is None:
                source = self.sources[number] = RetainedInputs(calls[number].inputs)
            source.chunks += count

    def insert(self, lane: int, call: Call) -> None:
        """Add the inputs of a call as if they had been answered just before `received`."""
        row, chunk = self._lanes.rows[lane], self._chunks.allocate(1)
        fresh = np.zeros(1, self._chunks.rows.dtype)
        fresh["stop"], fresh["next"], fresh["call"] = row["received"], NONE, call.number
        fresh["first"] = row["received"] - int(call.counts[0])
        self._chunks.rows[chunk] = fresh
        self.retain(np.array([lane]), chunk, {call.number: call})
        row["tail"], self._lanes.rare["inputs_from"][lane] = chunk[0], fresh["first"][0]

    def mark_durable(self, lanes: Numbers, steps: Numbers) -> Numbers:
        """The server says that so many steps of these lanes are durable: [lanes], [lanes].

        Returns the lanes for which that is wrong: so many steps were never sent.
        """
        known = lanes < len(self._lanes)
        known[known] = (self._lanes["is_attached"] & self._lanes.rare["awaits_durable"])[
            lanes[known]
        ]
        lanes, steps = lanes[known], steps[known]
        is_right = steps <= self._lanes["sent"][lanes]
        np.maximum.at(self._lanes.rare["durable"], lanes[is_right], steps[is_right])
        self.release(np.unique(lanes[is_right]))
        return lanes[~is_right]

    def release(self, lanes: Numbers) -> None:
        """Drop the chunks of these lanes that no server will need again."""
        mine = self._lanes.rare[lanes]
        some = mine["oldest"] != NONE
        if not some.any():
            return
        lanes, mine = lanes[some], mine[some]
        received = self._lanes["received"][lanes]
        until = np.where(mine["retains"], np.minimum(mine["durable"], received), received)
        if len(lanes) < _LANES_MANY:
            pairs = zip(lanes.tolist(), until.tolist(), strict=True)
            dropped = [self._unlink(lane, step) for lane, step in pairs]
        else:
            dropped = self._unlink_many(lanes, until)
        chunk = np.concatenate(dropped)
        mine = self._chunks.rows[chunk]
        self._row_count -= _row_count(mine)
        self._chunk_count -= len(mine)
        for number, count in _counted(mine["call"]):
            source = self.sources[number]
            source.chunks -= count
            if not source.chunks:
                del self.sources[number]
        self._chunks.free(chunk)

    def _unlink(self, lane: int, until: int) -> Numbers:
        """Take the retained chunks before step `until` out of a lane's chain; returns them."""
        rare, stop, after = self._lanes.rare[lane], self._chunks["stop"], self._chunks["next"]
        chunk, newest = int(rare["oldest"]), int(rare["newest"])
        dropped: list[int] = []
        while chunk != NONE and stop[chunk] <= until:
            dropped.append(chunk)
            if chunk == newest:
                if after[chunk] == NONE:
                    self._lanes["tail"][lane] = NONE
                chunk = NONE
            else:
                chunk = int(after[chunk])
        rare["oldest"] = chunk
        return np.array(dropped, np.int64)

    def _unlink_many(self, lanes: Numbers, until: Numbers) -> list[Numbers]:
        """As `_unlink`, for many lanes at once."""
        rare, chunks = self._lanes.rare, self._chunks.rows
        chunk = rare["oldest"][lanes]
        dropped: list[Numbers] = []
        while lanes.size:
            past = chunks["stop"][chunk] <= until
            rare["oldest"][lanes[~past]] = chunk[~past]
            lanes, chunk, until = lanes[past], chunk[past], until[past]
            dropped.append(chunk)
            after = chunks["next"][chunk]
            is_newest = chunk == rare["newest"][lanes]
            rare["oldest"][lanes[is_newest]] = NONE
            self._lanes["tail"][lanes[is_newest & (after == NONE)]] = NONE
            lanes, chunk, until = lanes[~is_newest], after[~is_newest], until[~is_newest]
        return dropped


def _row_count(chunks: NDArray[np.void]) -> int:
    return int((chunks["stop"] - chunks["first"]).sum())


def _counted(numbers: Numbers) -> Iterable[tuple[int, int]]:
    """Each number with how often it occurs."""
    if len(numbers) <= 1:
        return [(number, 1) for number in numbers.tolist()]
    unique, counts = np.unique(numbers, return_counts=True)
    return zip(unique.tolist(), counts.tolist(), strict=True)
