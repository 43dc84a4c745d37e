"""Compares a server's outputs, bit for bit, with offline runs of whole sequences."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice_cli.bench.inputs import Inputs
from sluice_cli.bench.run import Result
from sluice_cli.reference import OfflineError, run_offline


class DifferenceError(Exception):
    """The server's outputs differ from those of the file; the message says where."""


def verify(model: Path, result: Result) -> int:
    """Compare all recorded outputs and return how many steps. Raises DifferenceError."""
    inputs = Inputs(result.contract, result.plan.seed)
    answered = []
    sequences = []
    for recording in result.recordings:
        for row in np.flatnonzero(recording.counts).tolist():
            count = int(recording.counts[row])
            sequences.append(inputs.whole(int(recording.offsets[row]), count))
            answered.append({name: y[row, :count] for name, y in recording.outputs.items()})
    if not sequences:
        raise DifferenceError("nothing was answered, so nothing can be compared")
    try:
        expected = run_offline(model, sequences)
    except OfflineError as error:
        raise DifferenceError(f"{model} cannot run what the server was sent: {error}") from error
    for number, (mine, theirs) in enumerate(zip(answered, expected, strict=True)):
        compare(number, mine, theirs)
    return sum(len(next(iter(outputs.values()))) for outputs in answered)


def compare(
    number: int, answered: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]
) -> None:
    """Compare the outputs of one sequence: [steps, …] by name. Raises DifferenceError."""
    for name, mine in answered.items():
        theirs = expected.get(name)
        if theirs is None or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            raise DifferenceError(f"the server's output {name!r} is not one of the file's")
        steps = [
            step for step in range(len(mine)) if mine[step].tobytes() != theirs[step].tobytes()
        ]
        if steps:
            raise DifferenceError(
                f"sequence {number}, output {name!r}: {len(steps):,} of {len(mine):,} steps "
                f"differ from the offline run, the first is step {steps[0]}; is it the file "
                "that is served?"
            )
