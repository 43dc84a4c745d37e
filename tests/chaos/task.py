"""What one client process is told to do, in a file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """Sequences, one after another on each worker, until there is a file `stop` beside it."""

    addresses: list[str]
    seed: int
    client: int
    workers: int
    steps_max: int  # of a sequence
    # Between steps, on average: so that sequences also stand still now and then.
    pause_seconds: float
    # What the library has handed over is acknowledged only once it is journaled: only
    # then may the client be killed.
    holds_outputs: bool

    def write(self, folder: Path) -> None:
        """Put it where the process will look."""
        (folder / "task.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Task":
        """The inverse of `write`."""
        return cls(**json.loads((folder / "task.json").read_text()))
