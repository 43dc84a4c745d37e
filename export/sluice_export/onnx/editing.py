"""Edits ONNX graphs: fixes inputs, folds conditions, renames values and keeps names apart."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sluice_export.errors import InputError, UnsupportedModuleError

RECURRENT: Final = frozenset({"LSTM", "GRU", "RNN"})
_STANDARD: Final = ("", "ai.onnx")


def inputs_of(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """The inputs that a caller gives, by name: those without a default."""
    held = {tensor.name for tensor in graph.initializer}
    return {value.name: value for value in graph.input if value.name not in held}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node such as If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def walk_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, also those inside others."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from walk_nodes(inner)


def label(node: onnx.NodeProto) -> str:
    """What messages call a node."""
    return f"{node.op_type} {node.name or node.output[0]!r}"


def read_attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or `default`."""
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def constants_of(graph: onnx.GraphProto) -> dict[str, np.ndarray[Any, Any]]:
    """The values that are known before any run, by name: weights and Constant nodes."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    known[node.output[0]] = numpy_helper.to_array(attribute.t)
    return known


def set_input(node: onnx.NodeProto, place: int, name: str) -> None:
    """Let a node read `name` as its input number `place`."""
    while len(node.input) <= place:
        node.input.append("")
    node.input[place] = name


def free_name(graph: onnx.GraphProto, wanted: str) -> str:
    """`wanted`, or the like of it that nothing in `graph` has yet."""
    taken = {value.name for value in (*graph.input, *graph.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    taken |= {name for node in walk_nodes(graph) for name in (*node.input, *node.output)}
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def rename_value(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Call the value `old` `new` wherever nodes read or make it; inputs and outputs stay."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
        for place, name in enumerate(node.output):
            if name == old:
                node.output[place] = new
        for inner in subgraphs(node):
            rename_value(inner, old, new)
            for value in inner.output:
                if value.name == old:
                    value.name = new


def fix_inputs(graph: onnx.GraphProto, fixed: Mapping[str, float]) -> None:
    """Give each named input its value once and for all.

    Raises InputError for an input that is not there, or is no single value.
    """
    inputs = inputs_of(graph)
    for name, value in fixed.items():
        if name not in inputs:
            raise InputError(f"--set {name}: the file has no such input, but {', '.join(inputs)}")
        tensor = inputs[name].type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        if any(size != 1 for size in shape):
            raise InputError(f"--set {name}: it has shape {shape}; only single values can be fixed")
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        graph.initializer.append(numpy_helper.from_array(np.full(shape, value, dtype), name))
        graph.input.remove(inputs[name])


def fold_conditions(proto: onnx.ModelProto) -> None:
    """Replace every If whose condition does not depend on the inputs by the branch it takes.

    Raises UnsupportedModuleError where a recurrent operator stays inside another node.
    """
    graph = proto.graph
    count = 0
    while (found := _find_foldable(proto)) is not None:
        place, is_true = found
        node = graph.node[place]
        branch = next(
            attribute.g
            for attribute in node.attribute
            if attribute.name == ("then_branch" if is_true else "else_branch")
        )
        inlined = _inline(branch, list(node.output), f"folded{count}/")
        graph.initializer.extend(branch.initializer)
        nodes = [*graph.node[:place], *inlined, *graph.node[place + 1 :]]
        del graph.node[:]
        graph.node.extend(nodes)
        count += 1
    for node in graph.node:
        for inner in subgraphs(node):
            held = [child for child in walk_nodes(inner) if child.op_type in RECURRENT]
            if held:
                raise UnsupportedModuleError(
                    f"{label(held[0])} is inside {label(node)}, whose course depends on the input; "
                    "fix what it depends on (--set name=value), or export the model without it"
                )


def _find_foldable(proto: onnx.ModelProto) -> tuple[int, bool] | None:
    """The first If of the graph whose condition is known: where, and what it is."""
    for place, node in enumerate(proto.graph.node):
        if node.op_type == "If" and node.domain in _STANDARD:
            value = evaluate(proto, node.input[0], {})
            if value is not None:
                return place, bool(value.reshape(-1)[0])
    return None


def evaluate(
    proto: onnx.ModelProto, name: str, given: Mapping[str, np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any] | None:
    """What a value is, where it follows from constants and what is `given`; None where not."""
    graph = proto.graph
    producers = {output: node for node in graph.node for output in node.output}
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


def _inline(branch: onnx.GraphProto, outputs: list[str], prefix: str) -> list[onnx.NodeProto]:
    """The nodes of a branch under names of their own, giving `outputs`."""
    results = [value.name for value in branch.output]
    local = [tensor.name for tensor in branch.initializer]
    local += [name for node in branch.node for name in node.output if name]
    for name in local:
        rename_value(branch, name, prefix + name)
    for tensor in branch.initializer:
        tensor.name = prefix + tensor.name
    known = set(local)
    ends = [
        helper.make_node("Identity", [prefix + name if name in known else name], [output])
        for name, output in zip(results, outputs, strict=True)
    ]
    return [*branch.node, *ends]


def keep_batch(proto: onnx.ModelProto) -> bool:
    """Let each Reshape to a fixed batch of 1 keep the batch it is given. Tells whether any did.

    The batch axis is where shape inference finds the symbol "batch".
    """
    graph = proto.graph
    changed = False
    constants = constants_of(graph)
    for node in [node for node in graph.node if node.op_type == "Reshape"]:
        target = constants.get(node.input[1])
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        shapes = {
            v.name: v.type.tensor_type.shape.dim for v in (*graph.input, *inferred.value_info)
        }
        dims = shapes.get(node.input[0])
        places = [at for at, dim in enumerate(dims or []) if dim.dim_param == "batch"]
        if target is None or len(places) != 1 or places[0] >= len(target):
            continue
        if target[places[0]] == 1 and not read_attribute(node, "allowzero", 0):
            name = f"{node.output[0]}/shape"
            kept = target.copy()
            kept[places[0]] = 0
            graph.initializer.append(numpy_helper.from_array(kept, name))
            node.input[1] = name
            changed = True
    return changed
