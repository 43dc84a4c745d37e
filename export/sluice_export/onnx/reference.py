"""Runs an ONNX file as its author made it: what every proof of it compares with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sluice_export.errors import InputError
from sluice_export.graphs import constants_of
from sluice_export.onnx.axes import BATCH, TIME, Axes, Layout, find_output_axes
from sluice_export.onnx.packing import Part
from sluice_export.proof.evidence import Expected
from sluice_model.errors import ModelError
from sluice_model.graph import Graph
from sluice_model.model import Array


class FileReference:
    """The file, run one row after another, with its states passed from run to run."""

    name = "the file as it was"

    def __init__(
        self,
        proto: onnx.ModelProto,
        layout: Layout,
        parts: Sequence[Part],
        outputs: Sequence[str],
    ) -> None:
        """`parts` are the states that the file itself takes and returns; `outputs` its data."""
        self._graph = Graph(proto.SerializeToString(), name="the file")
        self._layout = layout
        self._parts = parts
        self._outputs = list(outputs)
        self._states = list(dict.fromkeys(part.pair.output for part in parts))
        self._defaults = constants_of(proto.graph)
        self._types = {
            value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in proto.graph.input
        }
        # The axes of each output; set by `learn_outputs`.
        self._axes: dict[str, Axes] = {}

    def learn_outputs(
        self, ranges: Mapping[str, tuple[int, int]]
    ) -> dict[str, tuple[Axes, np.dtype[Any]]]:
        """The axes and the type of each output, from two runs of different sizes.

        `ranges` has (first, last) of each integer input. Raises InputError where the file does
        not run with the shapes that its layout says.
        """
        sizes = [(2 if self._layout.has_batch else 1, 5), (3 if self._layout.has_batch else 1, 7)]
        runs = []
        for batch, length in sizes:
            generator = np.random.default_rng(0)
            feed = self._states_at(batch)
            for name in self._layout.inputs:
                shape, dtype = self._layout.shape(name, batch, length), self._types[name]
                low, high = ranges.get(name, (0, 1))
                is_float = dtype.kind == "f"
                feed[name] = (
                    generator.standard_normal(shape)
                    if is_float
                    else generator.integers(low, high, shape, endpoint=True)
                ).astype(dtype)
            try:
                runs.append(self._graph.run(feed, [*self._outputs, *self._states]))
            except ModelError as error:
                shapes = {name: list(array.shape) for name, array in feed.items()}
                raise InputError(
                    f"the file does not run with {shapes} ({error}); name its axes: "
                    "--input name:batch,time,80 or, without time axis, name:batch,80"
                ) from error
        batches = (sizes[0][0], sizes[1][0]) if self._layout.has_batch else None
        steps = (sizes[0][1], sizes[1][1]) if self._layout.has_time else None
        found = {}
        for place, name in enumerate(self._outputs):
            small, large = runs[0][place], runs[1][place]
            axes = find_output_axes(name, small.shape, large.shape, batches=batches, steps=steps)
            found[name] = axes, small.dtype
            self._axes[name] = axes
        return found

    def run(self, inputs: Sequence[Array]) -> Expected:
        """As Reference.run: each row alone, whole where the file has a time axis."""
        rows = [self._run_row([array[row] for array in inputs]) for row in range(len(inputs[0]))]
        outputs = [np.stack(arrays) for arrays in zip(*(row[0] for row in rows), strict=True)]
        names = [part.pair.input for part in self._parts]
        return Expected(outputs, {name: np.stack([row[1][name] for row in rows]) for name in names})

    def _run_row(self, row: Sequence[Array]) -> tuple[list[Array], dict[str, Array]]:
        """One row, [steps, …] each: outputs [steps, …] each, and each state, [size]."""
        feed = self._states_at(1)
        steps = len(row[0])
        pieces: list[list[Array]] = []
        width = steps if self._layout.has_time else 1
        for start in range(0, steps, width):
            for (name, axes), array in zip(self._layout.inputs.items(), row, strict=True):
                feed[name] = self._from_steps(array[start : start + width], axes)
            results = self._graph.run(feed, [*self._outputs, *self._states])
            states = dict(zip(self._states, results[len(self._outputs) :], strict=True))
            feed |= {part.pair.input: _unstack(part, states) for part in self._parts}
            named = zip(self._outputs, results, strict=False)
            pieces.append([self._to_steps(result, self._axes[name]) for name, result in named])
        outputs = [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]
        return outputs, {
            part.pair.input: self._flatten(part, feed[part.pair.input]) for part in self._parts
        }

    def _from_steps(self, steps: Array, axes: Axes) -> Array:
        """An input [steps, …] of one row in the shape that the file takes."""
        row = steps[np.newaxis]
        if TIME not in axes:
            return np.ascontiguousarray(np.moveaxis(row[:, 0], 0, axes.index(BATCH)))
        return np.ascontiguousarray(np.moveaxis(row, (0, 1), (axes.index(BATCH), axes.index(TIME))))

    def _to_steps(self, result: Array, axes: Axes) -> Array:
        """An output of one row as [steps, …]."""
        if TIME not in axes:
            return np.moveaxis(result, axes.index(BATCH), 0)
        lifted: Array = np.moveaxis(result, (axes.index(BATCH), axes.index(TIME)), (0, 1))[0]
        return lifted

    def _states_at(self, batch: int) -> dict[str, Array]:
        """The states before the first step."""
        states = {}
        for part in self._parts:
            name = part.pair.input
            shape = self._layout.shape(name, batch, 0)
            default = self._defaults.get(name, np.zeros((), self._types[name]))
            states[name] = np.ascontiguousarray(np.broadcast_to(default, shape))
        return states

    def _flatten(self, part: Part, value: Array) -> NDArray[np.float32]:
        """A state of one row as it stands in the packed row."""
        if part.batch_axis is not None:
            value = np.moveaxis(value, part.batch_axis, 0)
        row: NDArray[np.float32] = value.reshape(-1).astype(np.float32)
        return row


def _unstack(part: Part, states: Mapping[str, Array]) -> Array:
    """A state after a run, taken out of the output that holds it."""
    value = states[part.pair.output]
    if part.pair.index is None:
        return value
    if value.ndim == len(part.axes) + 1:
        return np.ascontiguousarray(value[part.pair.index])
    size = part.axes[0]
    assert isinstance(size, int)
    return np.ascontiguousarray(value[part.pair.index * size : (part.pair.index + 1) * size])
