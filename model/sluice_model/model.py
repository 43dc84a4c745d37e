"""Runs a model: (inputs, lengths, state) → (outputs, state), a pure function on arrays.

The only module that calls ONNX Runtime.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from sluice_model.contract import initial_row, load_proto, parse_contract
from sluice_model.errors import NotAModelError, RunError
from sluice_protos.contract_pb2 import ModelContract, TensorSpec
from sluice_protos.datatypes import DTYPES

Array = NDArray[Any]


class Model:
    """An ONNX file with a contract, loaded.

    Safe to run from several threads at once: nothing of a run stays behind.
    """

    def __init__(self, data: bytes, contract: ModelContract, *, threads: int = 1) -> None:
        """Load a serialized ONNX model whose contract has been checked.

        `threads` is what one run may use inside an operator. Raises
        NotAModelError when ONNX Runtime cannot load the graph.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # A thread that spins between runs takes the core from the next decode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Denormals stay: flushing them would differ from a plain run of the file.
        options.add_session_config_entry("session.set_denormal_as_zero", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                data, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise NotAModelError(
                f"{contract.name}: ONNX Runtime cannot load it ({error})"
            ) from error
        self.contract = contract
        self.initial_state = initial_row(contract)
        # What every run asks of the contract, looked up once: protobuf fields cost time.
        self._inputs = [(spec.name, _axes(spec)) for spec in contract.inputs]
        self._output_axes = [_axes(spec) for spec in contract.outputs]
        self._lengths_input = contract.lengths_input
        self._state_input = contract.state_input
        self._batch_min, self._length_min = contract.batch_min, contract.length_min
        self._output_names = [spec.name for spec in contract.outputs]
        if self._state_input:
            self._output_names.append(contract.state_output)

    @classmethod
    def load(cls, path: str | Path, *, threads: int = 1) -> "Model":
        """Load the file at `path`. Raises NotAModelError or ContractError."""
        path = Path(path)
        proto = load_proto(path)
        contract = parse_contract(proto, name=str(path))
        return cls(proto.SerializeToString(), contract, threads=threads)

    def run(
        self,
        inputs: Sequence[Array],
        lengths: NDArray[np.int32] | None,
        state: NDArray[np.float32],
    ) -> tuple[list[Array], NDArray[np.float32]]:
        """Run each row `lengths[b]` steps on from `state[b]`.

        inputs   one [batch, steps, …] for each input, in the contract's order;
                 what lies beyond a row's length does not matter
        lengths  [batch] int32, each from 1 to steps; None: every row runs all steps
        state    [batch, state_size] float32

        Returns one [batch, steps, …] for each output, meaningless beyond a row's
        length, and the new state. Raises RunError; nothing has changed then.
        """
        batch, steps = inputs[0].shape[:2]
        if lengths is None:
            lengths = np.full(batch, steps, np.int32)
        elif len(lengths) and (lengths.min() < 1 or lengths.max() > steps):
            raise RunError(f"a run needs rows of 1 to {steps} steps; it was given {lengths}")
        if batch < 1 or steps < 1:
            # ONNX Runtime would abort the process at batch 0, zero a state at length 0.
            raise RunError(f"a run needs rows and steps; it was given {batch} rows of {steps}")
        is_small = batch < self._batch_min or steps < self._length_min
        if is_small:
            batch_run = max(batch, self._batch_min)
            steps_run = max(steps, self._length_min)
            inputs = [_pad(array, batch_run, steps_run) for array in inputs]
            lengths = np.pad(lengths, (0, batch_run - batch), constant_values=1)
            state = np.pad(state, ((0, batch_run - batch), (0, 0)))
        feed = {
            name: _to_graph(array, axes)
            for (name, axes), array in zip(self._inputs, inputs, strict=True)
        }
        if self._lengths_input:
            feed[self._lengths_input] = lengths
        if self._state_input:
            feed[self._state_input] = state
        try:
            results = self._session.run(self._output_names, feed)
        except Exception as error:
            raise RunError(f"{self.contract.name}: the run failed ({error})") from error
        state_out = results.pop() if self._state_input else state
        outputs = [
            _from_graph(array, axes) for axes, array in zip(self._output_axes, results, strict=True)
        ]
        if is_small:
            return [array[:batch, :steps] for array in outputs], state_out[:batch]
        return outputs, state_out


def example_inputs(
    contract: ModelContract, batch: int, steps: int, *, seed: int = 0
) -> list[Array]:
    """Valid inputs drawn from `seed`: one [batch, steps, …] for each input of the contract."""
    generator = np.random.default_rng(seed)
    arrays: list[Array] = []
    for spec in contract.inputs:
        dtype = DTYPES[spec.datatype]
        shape = (batch, steps, *spec.shape)
        if dtype.kind == "f":
            arrays.append(generator.standard_normal(shape).astype(dtype))
        elif dtype.kind == "b":
            arrays.append(generator.integers(0, 2, shape).astype(dtype))
        else:
            low, high = (spec.valid.min, spec.valid.max) if spec.HasField("valid") else (0, 1)
            arrays.append(generator.integers(low, high, shape, dtype=np.int64, endpoint=True))
            arrays[-1] = arrays[-1].astype(dtype)
    return arrays


def _pad(array: Array, batch: int, steps: int) -> Array:
    """`array` with zero rows and steps behind it, up to [batch, steps, …]."""
    padded = np.zeros((batch, steps, *array.shape[2:]), array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def _axes(spec: TensorSpec) -> tuple[int, int] | None:
    """Where the graph has the batch and the time axis; None: first and second."""
    axes = spec.batch_axis, spec.time_axis
    return None if axes == (0, 1) else axes


def _to_graph(array: Array, axes: tuple[int, int] | None) -> Array:
    """[batch, steps, …] with the axes where the graph has them."""
    if axes is None:
        return array
    return np.ascontiguousarray(np.moveaxis(array, (0, 1), axes))


def _from_graph(array: Array, axes: tuple[int, int] | None) -> Array:
    """The inverse of `_to_graph`."""
    return array if axes is None else np.moveaxis(array, axes, (0, 1))
