"""Runs whole sequences offline in a process that imports nothing of Sluice."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
_PROGRAM = Path(__file__).with_name("offline.py")


class OfflineError(Exception):
    """The offline run failed; the message is the last line that it printed."""


def run_offline(model: Path, sequences: Sequence[Arrays]) -> list[dict[str, NDArray[Any]]]:
    """The outputs of each sequence, run alone in plain ONNX Runtime: arrays [steps, …] by name.

    `sequences` has the inputs of each: arrays [steps, …] by name. Raises OfflineError.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        arrays: dict[str, Any] = {
            f"{number}/{name}": array
            for number, sequence in enumerate(sequences)
            for name, array in sequence.items()
        }
        np.savez(inputs, **arrays)
        done = subprocess.run(
            # -P keeps modules in the folder of the program from shadowing libraries.
            [sys.executable, "-P", _PROGRAM, model, inputs, outputs],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise OfflineError((done.stderr.strip().splitlines() or ["it was killed"])[-1])
        found: list[dict[str, NDArray[Any]]] = [{} for _ in sequences]
        with np.load(outputs) as file:
            for key in file.files:
                number, _, name = key.partition("/")
                found[int(number)][name] = file[key]
    return found
