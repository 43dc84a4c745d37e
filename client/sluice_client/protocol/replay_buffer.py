"""Which answered inputs are kept, because the server may go back and need them again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sluice_client.protocol.calls import Call
from sluice_client.protocol.signature import Array
from sluice_client.protocol.tables import NONE, Numbers, Table

KEPT_STEPS_MAX: Final = 65_536
KEPT_BYTES_MAX: Final = 256 * 2**20

# What keeping a chunk costs beside its rows, about: Python's own, and its place in the tables.
_CHUNK_BYTES: Final = 512
# So many lanes are worth a pass of array operations for each of their chunks.
_LANES_MANY: Final = 16


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept at most of inputs that are not durable.

    Beyond it no further step is sent until the server says that more is durable.
    """

    steps_max: int = KEPT_STEPS_MAX  # of one sequence, those under way included
    bytes_max: int = KEPT_BYTES_MAX  # of all sequences of one model, once answered

    def __post_init__(self) -> None:
        if self.steps_max < 1 or self.bytes_max < 1:
            raise ValueError("kept_steps_max and kept_bytes_max are at least 1")


@dataclass(slots=True)
class KeptInputs:
    """The inputs of one call, and how many of its chunks are kept."""

    inputs: Sequence[Array]
    chunks: int = 0


class Kept:
    """The answered chunks of the ledger's lanes that stay in their lanes' chains."""

    def __init__(self, lanes: Table, chunks: Table) -> None:
        self._lanes = lanes
        self._chunks = chunks
        # By the number of the call that gave them.
        self.sources: dict[int, KeptInputs] = {}
        self._row_count = 0
        self._chunk_count = 0

    def bytes(self, step_bytes: int) -> int:
        """What is kept takes about so many bytes."""
        return self._row_count * step_bytes + self._chunk_count * _CHUNK_BYTES

    def keep(self, lanes: Numbers, chunk: Numbers, calls: Mapping[int, Call]) -> None:
        """These chunks, the next one of each lane, have been answered and stay."""
        oldest = self._lanes.rare["oldest"][lanes]
        self._lanes.rare["oldest"][lanes] = np.where(oldest == NONE, chunk, oldest)
        self._lanes.rare["newest"][lanes] = chunk
        mine = self._chunks.rows[chunk]
        self._row_count += _row_count(mine)
        self._chunk_count += len(mine)
        for number, count in _counted(mine["call"]):
            source = self.sources.get(number)
            if source is None:
                source = self.sources[number] = KeptInputs(calls[number].inputs)
            source.chunks += count

    def forget(self, lanes: Numbers) -> None:
        """Let go of the chunks that no server will ask for again."""
        mine = self._lanes.rare[lanes]
        some = mine["oldest"] != NONE
        if not some.any():
            return
        lanes, mine = lanes[some], mine[some]
        received = self._lanes["received"][lanes]
        until = np.where(mine["trails"], np.minimum(mine["durable"], received), received)
        if len(lanes) < _LANES_MANY:
            pairs = zip(lanes.tolist(), until.tolist(), strict=True)
            gone = [self._pass(lane, step) for lane, step in pairs]
        else:
            gone = self._pass_many(lanes, until)
        chunk = np.concatenate(gone)
        mine = self._chunks.rows[chunk]
        self._row_count -= _row_count(mine)
        self._chunk_count -= len(mine)
        for number, count in _counted(mine["call"]):
            source = self.sources[number]
            source.chunks -= count
            if not source.chunks:
                del self.sources[number]
        self._chunks.give(chunk)

    def _pass(self, lane: int, until: int) -> Numbers:
        """Take the chunks before step `until` out of those that are kept; which they were."""
        rare, stop, after = self._lanes.rare[lane], self._chunks["stop"], self._chunks["next"]
        chunk, newest = int(rare["oldest"]), int(rare["newest"])
        gone: list[int] = []
        while chunk != NONE and stop[chunk] <= until:
            gone.append(chunk)
            if chunk == newest:
                if after[chunk] == NONE:
                    self._lanes["tail"][lane] = NONE
                chunk = NONE
            else:
                chunk = int(after[chunk])
        rare["oldest"] = chunk
        return np.array(gone, np.int64)

    def _pass_many(self, lanes: Numbers, until: Numbers) -> list[Numbers]:
        """As `_pass`, for many lanes at once."""
        rare, chunks = self._lanes.rare, self._chunks.rows
        chunk = rare["oldest"][lanes]
        gone: list[Numbers] = []
        while lanes.size:
            past = chunks["stop"][chunk] <= until
            rare["oldest"][lanes[~past]] = chunk[~past]
            lanes, chunk, until = lanes[past], chunk[past], until[past]
            gone.append(chunk)
            after = chunks["next"][chunk]
            is_newest = chunk == rare["newest"][lanes]
            rare["oldest"][lanes[is_newest]] = NONE
            self._lanes["tail"][lanes[is_newest & (after == NONE)]] = NONE
            lanes, chunk, until = lanes[~is_newest], after[~is_newest], until[~is_newest]
        return gone


def _row_count(chunks: NDArray[np.void]) -> int:
    return int((chunks["stop"] - chunks["first"]).sum())


def _counted(numbers: Numbers) -> Iterable[tuple[int, int]]:
    """Each number with how often it is there."""
    if len(numbers) <= 1:
        return [(number, 1) for number in numbers.tolist()]
    unique, counts = np.unique(numbers, return_counts=True)
    return zip(unique.tolist(), counts.tolist(), strict=True)
