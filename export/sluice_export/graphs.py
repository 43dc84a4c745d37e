"""Reads ONNX graphs: inputs, constants, attributes, nodes inside nodes, and values known early."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

RECURRENT: Final = frozenset({"LSTM", "GRU", "RNN"})
STANDARD_DOMAINS: Final = ("", "ai.onnx")
# Which inputs of a recurrent operator have the lengths of its rows, and its initial h and c.
LENGTHS_SLOT: Final = 4
STATE_SLOTS: Final = (5, 6)


def inputs_of(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """The inputs that a caller must give, by name: those without a default."""
    defaults = {tensor.name for tensor in graph.initializer}
    return {value.name: value for value in graph.input if value.name not in defaults}


def constants_of(graph: onnx.GraphProto) -> dict[str, np.ndarray[Any, Any]]:
    """The values that are known before any run, by name: weights and Constant nodes."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    known[node.output[0]] = numpy_helper.to_array(attribute.t)
    return known


def producers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that computes each value, by the value's name."""
    return {name: node for node in graph.node for name in node.output}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node such as If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def walk_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, including those inside other nodes."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from walk_nodes(inner)


def initial_states_of(node: onnx.NodeProto) -> list[str]:
    """The names of what a recurrent operator starts from, h and c; "" where there is none."""
    return [node.input[slot] if slot < len(node.input) else "" for slot in STATE_SLOTS]


def label(node: onnx.NodeProto) -> str:
    """What messages call a node."""
    return f"{node.op_type} {node.name or node.output[0]!r}"


def read_attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or `default`."""
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def evaluate(
    proto: onnx.ModelProto, name: str, given: Mapping[str, np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any] | None:
    """A value that follows from constants and what is `given`; None for any other."""
    graph = proto.graph
    producers = producers_of(graph)
    held: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
    needed: list[onnx.NodeProto] = []
    waiting, seen = [name], set[str]()
    while waiting:
        value = waiting.pop()
        if value in seen or value in held or value in given or not value:
            continue
        seen.add(value)
        node = producers.get(value)
        if node is None or any(True for _ in subgraphs(node)):
            return None
        needed.append(node)
        waiting.extend(node.input)
    order = [node for node in graph.node if any(node is other for other in needed)]
    if not order:
        return numpy_helper.to_array(held[name])
    used = [held[value] for value in {v for node in order for v in node.input} if value in held]
    output = helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for n, array in given.items()
    ]
    part = helper.make_graph(order, "part", inputs, [output], used)
    model = helper.make_model(part, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    results: Any = ReferenceEvaluator(model).run(None, dict(given))
    return np.asarray(results[0])
