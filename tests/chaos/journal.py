"""What a client has received, on disk before anything else happens: it outlives the client."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Journal:
    """The outputs of one sequence, in the order in which they came, one file.

    Beside it lie what the next process needs to go on (`identity`), and a note of how
    the sequence ended (`ending`): "done", or the error that ended it.
    """

    def __init__(self, folder: Path, sequence_id: str, output_size: int) -> None:
        self._outputs = folder / f"{sequence_id}.outputs"
        self._identity = folder / f"{sequence_id}.identity"
        self._ending = folder / f"{sequence_id}.ending"
        self._output_size = output_size

    @property
    def has_begun(self) -> bool:
        """True once a client has been about to open the sequence."""
        return self._outputs.exists()

    def begin(self) -> None:
        """Note that the sequence is about to be opened."""
        self._outputs.touch()

    def append(self, outputs: NDArray[np.float32]) -> None:
        """Add outputs [steps, …], or one [outputs]; the kernel has them when this returns."""
        # One write: a process that is killed has written all of it or nothing.
        descriptor = os.open(self._outputs, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, np.ascontiguousarray(outputs, "<f4").tobytes())
        finally:
            os.close(descriptor)

    @property
    def received(self) -> int:
        """The steps whose outputs are in it."""
        return self._outputs.stat().st_size // (4 * self._output_size)

    def outputs(self) -> NDArray[np.float32]:
        """All of it: [steps, outputs]."""
        # A step that its client is about to write may be there in part.
        size = 4 * self._output_size
        data = self._outputs.read_bytes()
        return np.frombuffer(data[: len(data) // size * size], "<f4").reshape(-1, self._output_size)

    def put_identity(self, identity: dict[str, Any]) -> None:
        """Keep what the next process needs; the last one is kept."""
        fresh = self._identity.with_suffix(".fresh")
        fresh.write_text(json.dumps(identity))
        fresh.replace(self._identity)

    @property
    def identity(self) -> dict[str, Any] | None:
        """What was last put."""
        try:
            value: dict[str, Any] = json.loads(self._identity.read_text())
        except FileNotFoundError:
            return None
        return value

    @property
    def ending(self) -> str | None:
        """How the sequence ended, if it has."""
        return self._ending.read_text() if self._ending.exists() else None

    def end(self, words: str) -> None:
        """Note how the sequence ended."""
        fresh = self._ending.with_suffix(".fresh")
        fresh.write_text(words)
        fresh.replace(self._ending)


def sequence_ids(folder: Path) -> Iterator[str]:
    """The sequences that have a journal in a folder."""
    for path in sorted(folder.glob("*.outputs")):
        yield path.stem
