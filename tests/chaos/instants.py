"""How far each sequence of a server is, in a file that outlives the server, and traps in it.

The server's process writes (`launcher`), the harness reads and sets traps. It is a few
numbers in shared memory: a kill -9 takes nothing of it away.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

ROWS = 256
_NAME_BYTES = 56


class Instant(IntEnum):
    """What a server has just done when a trap springs."""

    APPLIED = 0  # state and output of some steps are there, and nothing of it has left
    RESPONDED = 1  # outputs are with the network
    CHECKPOINTED = 2  # a checkpoint is taken, the store is about to be asked
    DURABLE = 3  # the store has it, the server is about to learn that
    CLAIMING = 4  # the store is about to be asked for a sequence
    CLAIMED = 5  # the store has given it, the client is about to learn that
    CLOSED = 6  # the store has closed it, the client is about to learn that


class Refusal(IntEnum):
    """How a store that is down answers."""

    NONE = 0
    BEFORE = 1  # it does nothing
    AFTER = 2  # it does what it is asked, and nobody learns it


@dataclass(frozen=True, slots=True)
class Progress:
    """How many steps of one sequence had come how far."""

    applied: int
    responded: int
    checkpointed: int
    durable: int


class Trace:
    """The file, mapped."""

    def __init__(self, path: Path, *, is_fresh: bool = False) -> None:
        kinds = [
            ("trap", np.int64),
            ("trap_left", np.int64),
            ("trap_signal", np.int64),
            ("store_refusal", np.int64),
            ("store_delay_microseconds", np.int64),
            ("clock_offset_seconds", np.int64),
            ("names", f"S{_NAME_BYTES}", (ROWS,)),
            ("rows", np.int64, (ROWS, 4)),
        ]
        if is_fresh:
            path.write_bytes(bytes(np.dtype(kinds).itemsize))
        self._map = np.memmap(path, np.dtype(kinds), "r+")[0]
        self._indices: dict[str, int] = {}

    # What the harness does.

    def arm(self, instant: Instant, count: int, signal: int) -> None:
        """Have the server's process signal itself the `count`th time it comes to `instant`."""
        self.disarm()
        self._map["trap"], self._map["trap_signal"] = instant, signal
        self._map["trap_left"] = count

    def disarm(self) -> bool:
        """Take the trap away; False when it has sprung."""
        was_armed = int(self._map["trap_left"]) > 0
        self._map["trap_left"] = 0
        return was_armed

    @property
    def is_armed(self) -> bool:
        """True until the trap springs."""
        return int(self._map["trap_left"]) > 0

    def slow_store(self, seconds: float) -> None:
        """Hold up every call of the store."""
        self._map["store_delay_microseconds"] = int(seconds * 1e6)

    def refuse_store(self, refusal: Refusal) -> None:
        """Have every call of the store fail, before or after it has been done."""
        self._map["store_refusal"] = refusal

    def jump_clock(self, seconds: int) -> None:
        """Have the wall clock show another time."""
        self._map["clock_offset_seconds"] = seconds

    def progress(self) -> Iterator[tuple[str, Progress]]:
        """How far each live sequence is."""
        for name, row in zip(self._map["names"].tolist(), self._map["rows"].tolist(), strict=True):
            if name:
                yield name.decode(), Progress(*row)

    # What the server's process does.

    def begin(self) -> None:
        """A process begins: it has no sequence."""
        self._map["trap_left"] = 0
        self._map["names"] = b""
        self._map["rows"] = 0

    def put(self, sequence_id: str, instant: Instant, step: int) -> None:
        """A live sequence has come to `instant` with its first `step` steps."""
        index = self._indices.get(sequence_id)
        if index is None:
            return
        self._map["rows"][index, instant] = max(step, self._map["rows"][index, instant])

    def enter(self, sequence_id: str, step: int) -> None:
        """A sequence is here, with `step` steps; no news where that is known."""
        if sequence_id not in self._indices:
            index = next(n for n, name in enumerate(self._map["names"].tolist()) if not name)
            self._indices[sequence_id] = index
            self._map["rows"][index] = step
            self._map["names"][index] = sequence_id.encode()

    def leave(self, sequence_id: str) -> None:
        """A sequence has ended."""
        index = self._indices.pop(sequence_id, None)
        if index is not None:
            self._map["names"][index] = b""

    def pass_by(self, instant: Instant) -> int:
        """The signal of a trap that springs now, or 0."""
        if not self._map["trap_left"] or self._map["trap"] != instant:
            return 0
        self._map["trap_left"] -= 1
        return 0 if self._map["trap_left"] else int(self._map["trap_signal"])

    @property
    def store_seconds(self) -> float:
        """How long a call of the store is held up."""
        return float(self._map["store_delay_microseconds"]) / 1e6

    @property
    def store_refusal(self) -> Refusal:
        """How the store answers."""
        return Refusal(int(self._map["store_refusal"]))

    @property
    def clock_offset_seconds(self) -> int:
        """How far the wall clock is off."""
        return int(self._map["clock_offset_seconds"])
