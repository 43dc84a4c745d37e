"""Finds the valid values of the integer inputs of an ONNX file."""

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
from onnx import helper

from sluice_export.contract import require_range
from sluice_export.errors import InputError
from sluice_export.graphs import constants_of, inputs_of, producers_of, read_attribute
from sluice_export.onnx.axes import Layout

# Operations that pass integers on as they are.
_MOVES: Final = {"Cast", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Identity", "Flatten"}


def find_ranges(
    graph: onnx.GraphProto, layout: Layout, valid: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """(first, last) of each integer input: as in `valid`, or as in the tables that it indexes.

    Raises InputError for a range that an input cannot have, and for an unknown one.
    """
    unknown = valid.keys() - layout.inputs.keys()
    if unknown:
        raise InputError(f"--valid names {sorted(unknown)}; the inputs are {[*layout.inputs]}")
    ranges = {**_ranges_of_tables(graph, layout), **valid}
    values = inputs_of(graph)
    for name in layout.inputs:
        dtype = helper.tensor_dtype_to_np_dtype(values[name].type.tensor_type.elem_type)
        if name in ranges:
            limits = np.iinfo(dtype) if dtype.kind in "iu" else None
            held = (int(limits.min), int(limits.max)) if limits else None
            require_range(name, held, ranges[name])
        elif dtype.kind in "iu":
            raise InputError(
                f"input {name!r} has integers that go into no table directly, so their range is "
                f"unknown; name it: --valid {name}:0:9"
            )
    return ranges


def _ranges_of_tables(graph: onnx.GraphProto, layout: Layout) -> dict[str, tuple[int, int]]:
    """The rows of the smallest table that each input indexes: (first, last)."""
    constants, producers = constants_of(graph), producers_of(graph)
    ranges: dict[str, tuple[int, int]] = {}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in constants:
            name = node.input[1]
            while name in producers and producers[name].op_type in _MOVES:
                name = producers[name].input[0]
            last = constants[node.input[0]].shape[read_attribute(node, "axis", 0)] - 1
            if name in layout.inputs:
                ranges[name] = (0, min(last, ranges.get(name, (0, last))[1]))
    return ranges
