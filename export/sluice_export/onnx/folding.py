"""Fixes inputs of an ONNX graph to one value, and folds the conditions that depend on them."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice_export.errors import InputError, UnsupportedModuleError
from sluice_export.graphs import (
    RECURRENT,
    STANDARD_DOMAINS,
    evaluate,
    inputs_of,
    label,
    read_attribute,
    subgraphs,
    walk_nodes,
)
from sluice_export.onnx.editing import rename_value


def fix_inputs(graph: onnx.GraphProto, fixed: Mapping[str, float]) -> None:
    """Replace each named input by a constant.

    Raises InputError for an input that does not exist or has more than one value.
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
        branch = read_attribute(node, "then_branch" if is_true else "else_branch", None)
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
    """The first If of the graph whose condition is known: its place and the condition."""
    for place, node in enumerate(proto.graph.node):
        if node.op_type == "If" and node.domain in STANDARD_DOMAINS:
            value = evaluate(proto, node.input[0], {})
            if value is not None:
                return place, bool(value.reshape(-1)[0])
    return None


def _inline(branch: onnx.GraphProto, outputs: list[str], prefix: str) -> list[onnx.NodeProto]:
    """The nodes of a branch, with a prefix before their names, that compute `outputs`."""
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
