"""What an undisturbed run gives: numpy and plain onnxruntime, and nothing of ours."""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray


class Reference:
    """The outputs of whole sequences, each alone and in one piece."""

    def __init__(self, lstm: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            lstm, options, providers=["CPUExecutionProvider"]
        )
        (state,) = (item for item in self._session.get_inputs() if item.name == "state")
        self._state = np.zeros((1, state.shape[1]), np.float32)

    def outputs(self, model: str, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """The outputs [steps, …] of a sequence with `inputs` [steps, features]."""
        if model == "accumulator":
            # Whole numbers below 2^24: the sum is exact in whichever order it is made.
            return np.cumsum(inputs.astype(np.int64), axis=0).astype(np.float32)
        feed = {"lengths": np.array([len(inputs)], np.int32), "state": self._state}
        names = [item.name for item in self._session.get_inputs()]
        (name,) = set(names) - set(feed)
        (output,) = (item.name for item in self._session.get_outputs() if item.name != "state_out")
        (result,) = self._session.run([output], {name: inputs[np.newaxis], **feed})
        rows: NDArray[np.float32] = result[0]
        return rows
