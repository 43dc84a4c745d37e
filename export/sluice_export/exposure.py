"""Exposes the state of recurrent operators of an ONNX graph that keep it to themselves."""

from collections.abc import Collection
from typing import Final

import onnx
from onnx import TensorProto, helper

from sluice_export.axes import BATCH
from sluice_export.errors import BidirectionalError, LayerError
from sluice_export.pairing import StatePair
from sluice_export.signature import LENGTHS
from sluice_export.surgery import (
    RECURRENT,
    constants_of,
    free_name,
    inputs_of,
    label,
    read_attribute,
)

_LENGTHS_SLOT: Final = 4
_STATES: Final = {"LSTM": ("h", "c"), "GRU": ("h",), "RNN": ("h",)}


def expose_states(graph: onnx.GraphProto, states: Collection[str]) -> list[StatePair]:
    """Give each recurrent operator that starts from zeros a state input and a state output.

    Operators that start from one of the inputs `states` have theirs already.

    Raises BidirectionalError or LayerError, naming the operator, where it has no
    state that could be carried.
    """
    pairs: list[StatePair] = []
    for node in graph.node:
        if node.op_type in RECURRENT and not _starts_from_state(graph, node, states):
            _check(graph, node)
            pairs += _expose(graph, node)
    return pairs


def add_lengths(graph: onnx.GraphProto) -> str:
    """Let each recurrent operator stop where its rows end. Gives the input's name, or ""."""
    nodes = [node for node in graph.node if node.op_type in RECURRENT]
    if not nodes or any(len(n.input) > _LENGTHS_SLOT and n.input[_LENGTHS_SLOT] for n in nodes):
        return ""
    name = free_name(graph, LENGTHS)
    for node in nodes:
        _put(node, _LENGTHS_SLOT, name)
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, [BATCH]))
    return name


def _check(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    direction = read_attribute(node, "direction", b"forward")
    if direction != b"forward":
        raise BidirectionalError(
            f"{label(node)} has direction {direction.decode()}: each of its outputs needs the "
            "whole future of the sequence; train it forward only"
        )
    if read_attribute(node, "layout", 0):
        raise LayerError(
            f"{label(node)} has layout=1, which ONNX Runtime does not run; "
            "export it with the time axis first"
        )
    if node.input[1] not in constants_of(graph):
        raise LayerError(f"{label(node)} has computed weights; save the file with constant ones")


def _starts_from_state(
    graph: onnx.GraphProto, node: onnx.NodeProto, states: Collection[str]
) -> bool:
    """Whether an operator's state comes from a state input already.

    Raises LayerError where it is computed from other inputs, or is constant but not zero.
    """
    producers = {name: other for other in graph.node for name in other.output}
    constants = constants_of(graph)
    given = set(inputs_of(graph))
    waiting, seen = [name for name in node.input[5:7] if name], set[str]()
    while waiting:
        name = waiting.pop()
        other = producers.get(name)
        # The size of an input is no value of it.
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
    if seen & set(states):
        return True
    made = [producers[name] for name in seen if name in producers]
    filled = [one for one in made if one.op_type == "ConstantOfShape" and not _is_zero(one)]
    if filled or any(constants[name].any() for name in node.input[5:7] if name in constants):
        raise LayerError(
            f"{label(node)} starts from a constant state that is not zero; make its initial "
            "state an input of the file, with the constant as its default"
        )
    return False


def _is_zero(node: onnx.NodeProto) -> bool:
    value = read_attribute(node, "value", None)
    return value is None or not onnx.numpy_helper.to_array(value).any()


def _expose(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[StatePair]:
    hidden = int(read_attribute(node, "hidden_size", 0))
    name = node.name.strip("/").replace("/", ".") or node.output[0]
    pairs = []
    for place, state in enumerate(_STATES[node.op_type]):
        before = free_name(graph, f"{name}.{state}")
        _put(node, 5 + place, before)
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


def _put(node: onnx.NodeProto, place: int, name: str) -> None:
    while len(node.input) <= place:
        node.input.append("")
    node.input[place] = name
