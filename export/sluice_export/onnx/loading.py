"""Reads ONNX files made by others: with all weights, conditions folded, time first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx
from onnx import external_data_helper, helper

from sluice_export.errors import InputError
from sluice_export.graphs import (
    RECURRENT,
    STANDARD_DOMAINS,
    STATE_SLOTS,
    read_attribute,
    subgraphs,
    walk_nodes,
)
from sluice_export.onnx.editing import set_input
from sluice_export.onnx.folding import fix_inputs, fold_conditions
from sluice_model.contract import parse_proto
from sluice_model.errors import NotAModelError

_OPSET_MIN: Final = 10


def load_file(source: Path, fixed: Mapping[str, float]) -> onnx.ModelProto:
    """The file, with its `fixed` inputs and the conditions that depend on them folded.

    Raises InputError for what cannot be read.
    """
    try:
        proto = parse_proto(source)
    except NotAModelError as error:
        raise InputError(str(error)) from error
    opset = next((o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS), 0)
    if opset < _OPSET_MIN:
        raise InputError(
            f"{source}: is of opset {opset}, at least {_OPSET_MIN} is needed; convert it: "
            "onnx.version_converter.convert_version(model, 17)"
        )
    _load_external_weights(proto, source)
    fix_inputs(proto.graph, fixed)
    fold_conditions(proto)
    _put_time_first(proto.graph)
    del proto.graph.value_info[:]
    return proto


def _load_external_weights(proto: onnx.ModelProto, source: Path) -> None:
    """Read the weights that a file keeps in other files of its folder.

    Raises InputError for a file that is missing, or in another folder.
    """
    folder = source.resolve().parent
    inner = (graph for node in walk_nodes(proto.graph) for graph in subgraphs(node))
    tensors = [tensor for graph in (proto.graph, *inner) for tensor in graph.initializer]
    tensors += [a.t for node in walk_nodes(proto.graph) for a in node.attribute if a.HasField("t")]
    for tensor in filter(external_data_helper.uses_external_data, tensors):
        place = external_data_helper.ExternalDataInfo(tensor).location
        if not (folder / place).resolve().is_relative_to(folder):
            raise InputError(
                f"{source}: keeps weights in {place!r}, outside its own folder; put that file "
                "beside it and save the model again with that location"
            )
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except Exception as error:  # from the file system, or from the checks of onnx
            raise InputError(
                f"{source}: its weights in {place!r} cannot be read ({error}); put that file "
                "beside it"
            ) from error
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")


def _put_time_first(graph: onnx.GraphProto) -> None:
    """Transpose around recurrent operators whose first axis is the batch: runtimes want time first.

    Source: the attribute `layout` of LSTM, GRU and RNN of ONNX opset 14.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type not in RECURRENT or not read_attribute(node, "layout", 0):
            nodes.append(node)
            continue
        kept = [attribute for attribute in node.attribute if attribute.name != "layout"]
        del node.attribute[:]
        node.attribute.extend(kept)
        for place in (0, *STATE_SLOTS):
            if place < len(node.input) and node.input[place]:
                name = f"{node.output[0]}/turned/{place}"
                nodes.append(
                    helper.make_node("Transpose", [node.input[place]], [name], perm=[1, 0, 2])
                )
                set_input(node, place, name)
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name:
                node.output[place] = f"{name}/time_first"
                perm = [2, 0, 1, 3] if place == 0 else [1, 0, 2]
                nodes.append(helper.make_node("Transpose", [node.output[place]], [name], perm=perm))
    del graph.node[:]
    graph.node.extend(nodes)
