"""Finds how an ONNX file can run many sequences at once, and keeps the best way that is proven."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import onnx
from onnx import numpy_helper

from sluice_export.errors import ExportError, notify
from sluice_export.graphs import constants_of, read_attribute
from sluice_export.onnx.axes import BATCH, Axes, Layout, declare_axes
from sluice_export.onnx.reference import FileReference
from sluice_export.onnx.unpacked_model import UnpackedModel
from sluice_export.proof.evidence import Evidence, Reference
from sluice_export.proof.parity import prove_ragged
from sluice_export.proof.sizes import set_minimums
from sluice_model.errors import ModelError
from sluice_model.model import Model
from sluice_protos.contract_pb2 import ModelContract

# How many ways of placing the batch axis are tried before rows run one by one.
_PLACEMENTS_MAX: Final = 64

_Packed = tuple[onnx.ModelProto, ModelContract]


def pack_for_batches(model: UnpackedModel, reference: Reference, tolerance: float) -> _Packed:
    """The packed graph, and its contract, in the fastest form that is equal to the file."""
    for proto, contract in _add_lengths(model) if model.layout.has_batch else _add_batch(model):
        if _is_equal(proto, contract, reference, tolerance):
            return proto, contract
    proto, contract = model.pack()
    if contract.batch_max:
        notify(
            "the file takes one row at a time, and no way to run several at once gives the same "
            "result: its sequences run one by one, which is slower"
        )
    elif not contract.is_one_step:
        notify("the file has no lengths of rows: only chunks of equal length share a run")
    return proto, contract


def _add_lengths(model: UnpackedModel) -> Iterator[_Packed]:
    """The graph with lengths for its recurrent operators, where they hold all of the state."""
    if model.layout.has_time:
        proto, contract = model.pack(has_lengths=True)
        if contract.lengths_input:
            yield proto, contract


def _add_batch(model: UnpackedModel) -> Iterator[_Packed]:
    """The graph of one row as a graph of many, for each way in which batch axes may lie."""
    names = [*model.layout.inputs, *(part.pair.input for part in model.parts)]
    choices = [_batch_placements(axes) for axes in model.layout.inputs.values()]
    choices += [_batch_placements(part.axes) for part in model.parts]
    for chosen in itertools.islice(itertools.product(*choices), _PLACEMENTS_MAX):
        axes = dict(zip(names, chosen, strict=True))
        parts = [replace(part, axes=axes[part.pair.input]) for part in model.parts]
        layout = Layout(
            {name: axes[name] for name in model.layout.inputs},
            {part.pair.input: part.axes for part in parts},
        )
        for proto in _free_batch(model.proto, layout):
            try:
                wide = FileReference(proto, layout, parts, list(model.outputs))
                found = wide.learn_outputs(model.ranges)
                yield replace(model, proto=proto, layout=layout, parts=parts, outputs=found).pack()
            except (ExportError, ModelError):
                continue


def _batch_placements(axes: Axes) -> list[Axes]:
    """Every way in which an axis of size 1 may be the batch axis, the likeliest first."""
    fixed = tuple(1 if axis == BATCH else axis for axis in axes)
    places = [place for place, axis in enumerate(fixed) if axis == 1]
    return [(*fixed[:place], BATCH, *fixed[place + 1 :]) for place in places]


def _free_batch(proto: onnx.ModelProto, layout: Layout) -> Iterator[onnx.ModelProto]:
    """The graph with a batch of any size: first as it is, then with reshapes that keep the batch.

    The second is the first one changed: use the first before the next is drawn.
    """
    wide = copy.deepcopy(proto)
    declare_axes(wide.graph.input, layout.inputs | layout.states, has_batch=True)
    for value in wide.graph.output:
        value.type.tensor_type.ClearField("shape")
    yield wide
    if _keep_batch_in_reshapes(wide):
        yield wide


def _keep_batch_in_reshapes(proto: onnx.ModelProto) -> bool:
    """Make each Reshape to a batch of 1 keep the batch it is given; whether any was changed.

    The batch axis is where shape inference finds the symbol "batch".
    """
    graph = proto.graph
    is_changed = False
    constants = constants_of(graph)
    for node in [node for node in graph.node if node.op_type == "Reshape"]:
        target = constants.get(node.input[1])
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        shapes = {
            v.name: v.type.tensor_type.shape.dim for v in (*graph.input, *inferred.value_info)
        }
        dims = shapes.get(node.input[0])
        places = [at for at, dim in enumerate(dims or []) if dim.dim_param == BATCH]
        if target is None or len(places) != 1 or places[0] >= len(target):
            continue
        if target[places[0]] == 1 and not read_attribute(node, "allowzero", 0):
            name = f"{node.output[0]}/shape"
            kept = target.copy()
            kept[places[0]] = 0  # in a Reshape: as large as it was
            graph.initializer.append(numpy_helper.from_array(kept, name))
            node.input[1] = name
            is_changed = True
    return is_changed


def _is_equal(
    proto: onnx.ModelProto, contract: ModelContract, reference: Reference, tolerance: float
) -> bool:
    """Whether rows of many lengths in one run give what each gives alone, at any batch size."""
    try:
        sizes = set_minimums(proto, contract)
        model = Model(proto.SerializeToString(), contract)
        is_equal = prove_ragged(Evidence(model, reference, tolerance=tolerance)).passed
    except ModelError:
        return False
    return is_equal and (sizes.passed or bool(contract.lengths_input))
