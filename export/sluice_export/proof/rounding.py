"""Finds the operators that round the last values of a run in another way than the rest."""

import math
from collections.abc import Iterator
from typing import Final

import onnx
from onnx import inliner, shape_inference

from sluice_export.graphs import STANDARD_DOMAINS, label, subgraphs, walk_nodes

# ONNX Runtime computes these four values at a time, and the remaining ones with other code:
# measured by comparing every element-wise operator on 1 to 48 values with the same values in one
# large run.
_OPERATORS: Final = frozenset(
    ("Acos", "Asin", "Atan", "Celu", "Cos", "Elu", "Log", "Mish", "Selu", "Sin", "Softplus")
)
PACKET: Final = 4


def find_uneven_operators(proto: onnx.ModelProto) -> list[str]:
    """The operators whose last one to three values depend on how many a run computes.

    An operator is safe where its values are a multiple of four at every number of rows and
    steps. The others are named as messages name them.
    """
    whole = inliner.inline_local_functions(proto) if proto.functions else proto
    if not any(map(_is_packed, walk_nodes(whole.graph))):
        return []
    return list(_walk_uneven(shape_inference.infer_shapes(whole).graph))


def _is_packed(node: onnx.NodeProto) -> bool:
    """Whether ONNX Runtime computes an operator's values four at a time."""
    return node.op_type in _OPERATORS and node.domain in STANDARD_DOMAINS


def _walk_uneven(graph: onnx.GraphProto) -> Iterator[str]:
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type for value in values}
    for node in graph.node:
        if _is_packed(node) and not any(
            _is_even(types[name]) for name in (node.input[0], node.output[0]) if name in types
        ):
            yield label(node)
        for inner in subgraphs(node):
            yield from _walk_uneven(inner)


def _is_even(tensor: onnx.TypeProto.Tensor) -> bool:
    """Whether a tensor has the same number of values in every run, or always whole packets."""
    if not tensor.HasField("shape"):
        return False
    dims = tensor.shape.dim
    known = [dim.dim_value for dim in dims if dim.HasField("dim_value")]
    return len(known) == len(dims) or math.prod(known) % PACKET == 0
