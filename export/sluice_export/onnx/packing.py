"""Gives an ONNX graph the inputs that Sluice serves: one packed state, and lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sluice_export.contract import LENGTHS, STATE, STATE_OUT
from sluice_export.errors import LayerError
from sluice_export.graphs import LENGTHS_SLOT, RECURRENT
from sluice_export.onnx.axes import BATCH, Axes
from sluice_export.onnx.editing import free_name, rename_value, set_input
from sluice_export.onnx.pairing import StatePair

# The types whose values float32 holds without loss.
_EXACT: Final = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.BOOL,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
}


@dataclass(frozen=True)
class Part:
    """One state of a file, and its place in the packed row."""

    pair: StatePair
    axes: Axes
    element_type: int
    offset: int
    initial: list[float] = field(default_factory=list)

    @property
    def batch_axis(self) -> int | None:
        """Where its batch axis is; None: it has none, it belongs to one row."""
        return self.axes.index(BATCH) if BATCH in self.axes else None

    @property
    def shape(self) -> list[int]:
        """The shape of one row, without the batch axis."""
        return [axis for axis in self.axes if isinstance(axis, int)]

    @property
    def size(self) -> int:
        """How many values it has."""
        return int(np.prod(self.shape, dtype=np.int64))


def check_state_type(name: str, element_type: int) -> None:
    """Raise LayerError unless float32 holds every value of the state's type."""
    if element_type not in _EXACT:
        raise LayerError(
            f"state {name!r} is {helper.tensor_dtype_to_string(element_type)}, of which float32 "
            "does not hold every value; make it float32, or integers of at most 16 bits"
        )


def pack_states(graph: onnx.GraphProto, parts: Sequence[Part]) -> tuple[str, str]:
    """Replace all state inputs and outputs by one of each, [batch, floats]; returns their names."""
    names = free_name(graph, STATE), free_name(graph, STATE_OUT)
    size = sum(part.size for part in parts)
    before = [node for part in parts for node in _unpack(graph, part, names[0])]
    after = [node for part in parts for node in _pack(graph, part)]
    rows = [_row_name(part) for part in parts]
    after.append(helper.make_node("Concat", rows, [names[1]], axis=1))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    dropped = {part.pair.input for part in parts}, {part.pair.output for part in parts}
    for values, gone, name in zip((graph.input, graph.output), dropped, names, strict=True):
        kept = [value for value in values if value.name not in gone]
        del values[:]
        values.extend(kept)
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, size]))
    return names


def add_lengths(graph: onnx.GraphProto) -> str:
    """Make each recurrent operator stop where its rows end. Returns the input's name, or ""."""
    nodes = [node for node in graph.node if node.op_type in RECURRENT]
    if not nodes or any(len(n.input) > LENGTHS_SLOT and n.input[LENGTHS_SLOT] for n in nodes):
        return ""
    name = free_name(graph, LENGTHS)
    for node in nodes:
        set_input(node, LENGTHS_SLOT, name)
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, [BATCH]))
    return name


def _row_name(part: Part) -> str:
    return f"packing/{part.pair.input}/row"


def _order(part: Part) -> list[int]:
    """The axes of a state in the order that has its batch axis first."""
    place = part.batch_axis or 0
    return [place, *(axis for axis in range(len(part.axes)) if axis != place)]


def _constant(graph: onnx.GraphProto, name: str, values: Sequence[int] | int) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name


def _unpack(graph: onnx.GraphProto, part: Part, state: str) -> list[onnx.NodeProto]:
    """Nodes that compute a state, in the graph's own form, from the packed row."""
    name = part.pair.input
    prefix = f"packing/{name}"
    held = [tensor for tensor in graph.initializer if tensor.name == name]
    for tensor in held:  # a default, which the contract has as the initial value
        graph.initializer.remove(tensor)
    inner = f"{prefix}/before"
    rename_value(graph, name, inner)
    start = _constant(graph, f"{prefix}/start", [part.offset])
    stop = _constant(graph, f"{prefix}/stop", [part.offset + part.size])
    axis = _constant(graph, f"{prefix}/axis", [1])
    if part.batch_axis is None:
        shape = _constant(graph, f"{prefix}/shape", part.shape)
    else:
        shape = _constant(graph, f"{prefix}/shape", [-1, *part.shape])
    values = [f"{prefix}/{what}" for what in ("slice", "reshaped", "placed")]
    nodes = [
        helper.make_node("Slice", [state, start, stop, axis], [values[0]]),
        helper.make_node("Reshape", [values[0], shape], [values[1]]),
    ]
    if part.batch_axis is not None:
        back = [int(place) for place in np.argsort(_order(part))]
        nodes.append(helper.make_node("Transpose", [values[1]], [values[2]], perm=back))
    nodes.append(helper.make_node("Cast", [nodes[-1].output[0]], [inner], to=part.element_type))
    return nodes


def _pack(graph: onnx.GraphProto, part: Part) -> list[onnx.NodeProto]:
    """Nodes that compute a part of the packed row from the graph's own form of a state."""
    prefix = f"packing/{part.pair.input}"
    value = part.pair.output
    nodes: list[onnx.NodeProto] = []
    if part.pair.index is not None:
        nodes += _unstack(graph, part, value)
        value = nodes[-1].output[0]
    if part.batch_axis is not None:
        turned = f"{prefix}/turned"
        nodes.append(helper.make_node("Transpose", [value], [turned], perm=_order(part)))
        value = turned
    rows = -1 if part.batch_axis is not None else 1
    shape = _constant(graph, f"{prefix}/flat_shape", [rows, part.size])
    flat = f"{prefix}/flat"
    return [
        *nodes,
        helper.make_node("Reshape", [value, shape], [flat]),
        helper.make_node("Cast", [flat], [_row_name(part)], to=TensorProto.FLOAT),
    ]


def _unstack(graph: onnx.GraphProto, part: Part, value: str) -> list[onnx.NodeProto]:
    """Nodes that take one state out of an output that stacks several along its first axis."""
    prefix, index = f"packing/{part.pair.input}", part.pair.index or 0
    rank = _rank(graph, value)
    if rank == len(part.axes) + 1:
        place = _constant(graph, f"{prefix}/index", index)
        return [helper.make_node("Gather", [value, place], [f"{prefix}/taken"], axis=0)]
    first = part.axes[0]
    if not isinstance(first, int):
        raise LayerError(
            f"output {value!r} joins states along their batch axis; give each its own output"
        )
    bounds = [
        _constant(graph, f"{prefix}/{what}", [at])
        for what, at in (("from", index * first), ("to", (index + 1) * first), ("along", 0))
    ]
    return [helper.make_node("Slice", [value, *bounds], [f"{prefix}/taken"])]


def _rank(graph: onnx.GraphProto, name: str) -> int:
    for value in (*graph.output, *graph.value_info):
        if value.name == name and value.type.tensor_type.HasField("shape"):
            return len(value.type.tensor_type.shape.dim)
    raise LayerError(f"the shape of output {name!r} is unknown; save the file with shapes")
