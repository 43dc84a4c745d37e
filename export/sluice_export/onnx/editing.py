"""Edits ONNX graphs: sets inputs of nodes, finds free names, renames values."""

import onnx

from sluice_export.graphs import subgraphs, walk_nodes


def set_input(node: onnx.NodeProto, place: int, name: str) -> None:
    """Make `name` a node's input number `place`."""
    while len(node.input) <= place:
        node.input.append("")
    node.input[place] = name


def free_name(graph: onnx.GraphProto, wanted: str) -> str:
    """`wanted`, with a number behind it where `graph` has that name already."""
    taken = {value.name for value in (*graph.input, *graph.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    taken |= {name for node in walk_nodes(graph) for name in (*node.input, *node.output)}
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def rename_value(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a value wherever nodes read or compute it; the graph's inputs and outputs stay."""
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
