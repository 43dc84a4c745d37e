"""Runs a model: (inputs, lengths, state) → (outputs, state), a pure function on arrays."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice_model.contract import initial_row, load_proto, parse_contract
from sluice_model.errors import RunError
from sluice_model.graph import open_session
from sluice_protos.contract_pb2 import ModelContract, TensorSpec
from sluice_protos.datatypes import DTYPES

Array = NDArray[Any]

# The limit for inputs and outputs together of a run that the self-test makes.
_VALUES_MAX = 2**25

# Most runs take their lengths from here: a view costs less than a new array.
_ONES = np.ones(4096, np.int32)
_ONES.flags.writeable = False


class Model:
    """A loaded ONNX file with a contract.

    Several threads may run it at the same time, because a run leaves no state behind.
    """

    def __init__(self, data: bytes, contract: ModelContract, *, threads: int = 1) -> None:
        """Load a serialized ONNX model whose contract has been checked.

        `threads` is how many threads one run may use inside an operator. Raises
        NotAModelError if ONNX Runtime cannot load the graph.
        """
        self._session = open_session(data, name=contract.name, threads=threads)
        self.contract = contract
        self.initial_state = initial_row(contract)
        self._bytes = len(data)
        # Values that every run needs of the contract. Protobuf fields are slow, so read them once.
        self._is_one_step = contract.is_one_step
        self._inputs = [(spec.name, self._axes(spec)) for spec in contract.inputs]
        self._output_axes = [self._axes(spec) for spec in contract.outputs]
        self._lengths_input = contract.lengths_input
        self._state_input = contract.state_input
        self._batch_min, self._length_min = contract.batch_min, contract.length_min
        self._output_names = [spec.name for spec in contract.outputs]
        if self._state_input:
            self._output_names.append(contract.state_output)
        self._batch_max = contract.batch_max
        # Without lengths, a graph would update the state with the padding.
        self._is_whole = not self._is_one_step and bool(
            self._lengths_input or not self._state_input
        )

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
                 values beyond a row's length have no effect
        lengths  [batch] int32, each from 1 to steps; None: every row runs all steps
        state    [batch, state_size] float32

        Returns one [batch, steps, …] for each output, which is undefined beyond a row's
        length, and the new state. Raises RunError; then nothing has changed.
        """
        batch, steps = inputs[0].shape[:2]
        if lengths is None:
            is_usual = steps == 1 and batch <= len(_ONES)
            lengths = _ONES[:batch] if is_usual else np.full(batch, steps, np.int32)
        elif len(lengths) and (lengths.min() < 1 or lengths.max() > steps):
            raise RunError(f"a run needs rows of 1 to {steps} steps; it was given {lengths}")
        if batch < 1 or steps < 1:
            # ONNX Runtime aborts the process at batch 0, and sets a state to zero at length 0.
            raise RunError(f"a run needs rows and steps; it was given {batch} rows of {steps}")
        if not self._is_whole and (self._is_one_step or int(lengths.min()) < steps):
            return self._run_pieces(inputs, lengths, state)
        if 0 < self._batch_max < batch:
            return self._run_pieces(inputs, lengths, state)
        return self._run_graph(inputs, lengths, state)

    def _run_pieces(
        self, inputs: Sequence[Array], lengths: NDArray[np.int32], state: NDArray[np.float32]
    ) -> tuple[list[Array], NDArray[np.float32]]:
        """As `run`, with as many runs of the graph as its limits require."""
        state = state.copy()
        outputs: list[Array] = []
        for rows, steps in self._pieces(lengths):
            piece = [array[rows, steps] for array in inputs]
            lengths_run = np.minimum(lengths[rows], piece[0].shape[1])
            results, state[rows] = self._run_graph(piece, lengths_run, state[rows])
            if not outputs:
                whole = inputs[0].shape[:2]
                outputs = [np.zeros((*whole, *array.shape[2:]), array.dtype) for array in results]
            for output, result in zip(outputs, results, strict=True):
                output[rows, steps] = result
        return outputs, state

    def _pieces(self, lengths: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.intp], slice]]:
        """Which rows run which steps together, with the steps of each row in order."""
        for rows, steps in self._groups(lengths):
            size = self._batch_max or len(rows)
            for start in range(0, len(rows), size):
                yield rows[start : start + size], steps

    def _groups(self, lengths: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.intp], slice]]:
        if self._is_one_step:
            for step in range(int(lengths.max())):
                yield np.flatnonzero(lengths > step), slice(step, step + 1)
        elif self._is_whole:
            yield np.arange(len(lengths)), slice(None)
        else:
            for length in np.unique(lengths).tolist():
                yield np.flatnonzero(lengths == length), slice(0, length)

    def _run_graph(
        self, inputs: Sequence[Array], lengths: NDArray[np.int32], state: NDArray[np.float32]
    ) -> tuple[list[Array], NDArray[np.float32]]:
        """As `run`, with one run of the graph, padded to its smallest batch and length."""
        batch, steps = inputs[0].shape[:2]
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

    def affordable_cells(self, multiplications: int, *, at_least: int) -> int:
        """How many rows × steps a run of about that many multiply-adds may have.

        The result is `at_least` that many, unless inputs and outputs would take too much memory.
        """
        specs = (*self.contract.inputs, *self.contract.outputs)
        values = sum(math.prod(spec.shape) for spec in specs)
        # A step uses each weight once, and a weight has four bytes.
        affordable = max(at_least, multiplications * 4 // self._bytes)
        return max(1, min(affordable, _VALUES_MAX // max(1, values)))

    def _axes(self, spec: TensorSpec) -> tuple[int, int | None] | None:
        """The graph's batch axis and its time axis, if it has one; None: first and second."""
        if self._is_one_step:
            return spec.batch_axis, None
        axes = spec.batch_axis, spec.time_axis
        return None if axes == (0, 1) else axes


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
            high = min(high, np.iinfo(dtype).max)
            drawn = generator.integers(low, high, shape, dtype=np.int64, endpoint=True)
            arrays.append(drawn.astype(dtype))
    return arrays


def _pad(array: Array, batch: int, steps: int) -> Array:
    """`array` padded with zero rows and steps to [batch, steps, …]."""
    padded = np.zeros((batch, steps, *array.shape[2:]), array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def _to_graph(array: Array, axes: tuple[int, int | None] | None) -> Array:
    """[batch, steps, …] with its axes in the graph's order."""
    if axes is None:
        return array
    batch, time = axes
    if time is None:
        return np.ascontiguousarray(np.moveaxis(array[:, 0], 0, batch))
    return np.ascontiguousarray(np.moveaxis(array, (0, 1), (batch, time)))


def _from_graph(array: Array, axes: tuple[int, int | None] | None) -> Array:
    """The inverse of `_to_graph`."""
    if axes is None:
        return array
    batch, time = axes
    if time is None:
        return np.moveaxis(array, batch, 0)[:, np.newaxis]
    return np.moveaxis(array, (batch, time), (0, 1))
