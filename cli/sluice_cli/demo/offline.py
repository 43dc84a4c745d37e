"""Runs whole sequences, each alone, with plain ONNX Runtime: the reference for what was streamed.

Imports nothing of ours, on purpose. `python offline.py MODEL INPUTS OUTPUTS`.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def run_offline(model: Path, inputs: Path, outputs: Path) -> None:
    """Read `inputs` [sequences, steps, …], write `outputs` [sequences, steps, …], both .npy."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (x,) = (value.name for value in session.get_inputs() if value.name not in ("lengths", "state"))
    (y,) = (value.name for value in session.get_outputs() if value.name != "state_out")
    (state,) = (value for value in session.get_inputs() if value.name == "state")
    rows = []
    for sequence in np.load(inputs):
        feed = {
            x: sequence[np.newaxis],
            "lengths": np.array([len(sequence)], np.int32),
            "state": np.zeros((1, state.shape[1]), np.float32),
        }
        rows.append(session.run([y], feed)[0][0])
    np.save(outputs, np.stack(rows))


if __name__ == "__main__":
    run_offline(*map(Path, sys.argv[1:]))
