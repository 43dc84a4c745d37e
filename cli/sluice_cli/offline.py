"""Runs whole sequences, each alone, with plain ONNX Runtime: the reference for what was streamed.

Imports nothing of ours, on purpose. `python offline.py MODEL INPUTS OUTPUTS`.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def run_offline(model: Path, inputs: Path, outputs: Path) -> None:
    """Read `inputs`, write `outputs`, both .npz: `SEQUENCE/NAME` is [steps, …] of that tensor.

    An input called `SEQUENCE/state` [state_size] is what that sequence begins with; zero
    where there is none.
    """
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    sequences: dict[str, dict[str, np.ndarray]] = {}
    with np.load(inputs) as file:
        for key in file.files:
            sequence, _, name = key.partition("/")
            sequences.setdefault(sequence, {})[name] = file[key][np.newaxis]
    names = [value.name for value in session.get_outputs() if value.name != "state_out"]
    found = {}
    for sequence, feed in sequences.items():
        steps = max(array.shape[1] for name, array in feed.items() if name != "state")
        for value in session.get_inputs():
            if value.name == "lengths":
                feed["lengths"] = np.array([steps], np.int32)
            elif value.name == "state" and "state" not in feed:
                feed["state"] = np.zeros((1, value.shape[1]), np.float32)
        for name, array in zip(names, session.run(names, feed), strict=True):
            found[f"{sequence}/{name}"] = array[0]
    np.savez(outputs, **found)


if __name__ == "__main__":
    run_offline(*map(Path, sys.argv[1:]))
