"""Loads and runs plain ONNX graphs: the only module that calls ONNX Runtime."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from sluice_model.errors import NotAModelError, RunError

Array = NDArray[Any]


def open_session(data: bytes, *, name: str, threads: int = 1) -> onnxruntime.InferenceSession:
    """Load a serialized ONNX model with the options that Sluice always uses.

    `threads` is how many threads one run may use inside an operator. Raises NotAModelError
    if ONNX Runtime cannot load the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # A thread that spins between runs takes the core from the code that reads messages.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Keep denormals: a plain run of the file does not flush them either.
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    options.log_severity_level = 4  # failures are raised, so do not print them as well
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise NotAModelError(f"{name}: ONNX Runtime cannot load it ({error})") from error


class Graph:
    """An ONNX graph without a contract; tensors are given by name."""

    def __init__(self, data: bytes, *, name: str) -> None:
        """Load a serialized ONNX model. Raises NotAModelError."""
        self._session = open_session(data, name=name)
        self._name = name

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs for the named inputs. Raises RunError."""
        try:
            results = self._session.run(list(outputs), dict(feed))
        except Exception as error:
            raise RunError(f"{self._name}: the run failed ({error})") from error
        return [np.asarray(result) for result in results]
