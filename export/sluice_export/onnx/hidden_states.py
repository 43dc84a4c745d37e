"""Exposes hidden states: those of recurrent operators that a file neither takes nor returns."""

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sluice_export.errors import BidirectionalError, LayerError
from sluice_export.graphs import (
    RECURRENT,
    STATE_SLOTS,
    constants_of,
    evaluate,
    initial_states_of,
    inputs_of,
    label,
    producers_of,
    read_attribute,
)
from sluice_export.onnx.axes import BATCH, Layout
from sluice_export.onnx.editing import free_name, set_input
from sluice_export.onnx.pairing import StatePair

_STATES: Final = {"LSTM": ("h", "c"), "GRU": ("h",), "RNN": ("h",)}


def expose_states(proto: onnx.ModelProto, layout: Layout) -> list[StatePair]:
    """Give each recurrent operator with a hidden state an input and an output for it.

    Operators that start from a state of `layout` have both already. A constant that an operator
    starts from becomes the default of its input. Raises BidirectionalError or LayerError, naming
    the operator, where no state can be carried.
    """
    graph = proto.graph
    pairs: list[StatePair] = []
    for node in graph.node:
        if node.op_type in RECURRENT and not _starts_from_state(graph, node, layout.states):
            _check(graph, node)
            starts = [_find_start(proto, node, name, layout) for name in initial_states_of(node)]
            pairs += _expose(graph, node, starts)
    return pairs


def _check(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    direction = read_attribute(node, "direction", b"forward")
    if direction != b"forward":
        raise BidirectionalError(
            f"{label(node)} has direction {direction.decode()}: each of its outputs needs the "
            "whole future of the sequence; train it forward only"
        )
    if node.input[1] not in constants_of(graph):
        raise LayerError(f"{label(node)} has computed weights; save the file with constant ones")


def _starts_from_state(
    graph: onnx.GraphProto, node: onnx.NodeProto, states: Collection[str]
) -> bool:
    """Whether an operator starts from a state input.

    Raises LayerError where it starts from what is computed from other inputs.
    """
    producers = producers_of(graph)
    given = set(inputs_of(graph))
    waiting, seen = [name for name in initial_states_of(node) if name], set[str]()
    while waiting:
        name = waiting.pop()
        other = producers.get(name)
        # A state may depend on the size of an input, but not on its values.
        if name in seen or (other is not None and other.op_type in {"Shape", "Size"}):
            continue
        seen.add(name)
        waiting.extend(other.input if other is not None else [])
    if seen & given - set(states):
        raise LayerError(
            f"{label(node)} starts from a state that is computed from input "
            f"{min(seen & given - set(states))!r}; a stream carries the state from step to step, "
            "so let it start from zeros, or from a state input (--state input=output)"
        )
    return bool(seen & set(states))


def _find_start(
    proto: onnx.ModelProto, node: onnx.NodeProto, name: str, layout: Layout
) -> NDArray[np.float32] | None:
    """What an operator starts from, [1, 1, hidden]; None for zeros.

    Raises LayerError where it differs from row to row, or is unknown.
    """
    if not name:
        return None
    batch = 2 if layout.has_batch else 1
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    given = {
        key: np.zeros(layout.shape(key, batch, 3), helper.tensor_dtype_to_np_dtype(types[key]))
        for key in layout.inputs
    }
    value = evaluate(proto, name, given)
    if value is None or (value != value[:, :1]).any():
        raise LayerError(
            f"{label(node)} starts from a state that is not the same for every sequence, or "
            "is unknown; make it an input of the file, with its value as its default"
        )
    return value[:, :1].astype(np.float32) if value.any() else None


def _expose(
    graph: onnx.GraphProto, node: onnx.NodeProto, starts: Sequence[NDArray[np.float32] | None]
) -> list[StatePair]:
    hidden = int(read_attribute(node, "hidden_size", 0))
    name = node.name.strip("/").replace("/", ".") or node.output[0]
    pairs = []
    for place, state in enumerate(_STATES[node.op_type]):
        before = free_name(graph, f"{name}.{state}")
        start = starts[place]
        if start is not None:
            graph.initializer.append(numpy_helper.from_array(start, before))
        set_input(node, STATE_SLOTS[place], before)
        while len(node.output) < 2 + place:
            node.output.append("")
        after = node.output[1 + place] or free_name(graph, f"{before}.after")
        node.output[1 + place] = after
        shape: list[str | int | None] = [1, BATCH, hidden]
        graph.input.append(helper.make_tensor_value_info(before, TensorProto.FLOAT, shape))
        if after not in {value.name for value in graph.output}:
            graph.output.append(helper.make_tensor_value_info(after, TensorProto.FLOAT, shape))
        pairs.append(StatePair(before, after))
    return pairs
