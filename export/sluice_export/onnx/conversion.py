"""Makes an ONNX file of others a candidate: its state found and packed, and a reference for it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from sluice_export.errors import NoRecurrentLayerError, notify
from sluice_export.graphs import constants_of
from sluice_export.onnx.axes import BATCH, Axes, Layout, declare_axes, find_layout
from sluice_export.onnx.batching import pack_for_batches
from sluice_export.onnx.hidden_states import expose_states
from sluice_export.onnx.integer_ranges import find_ranges
from sluice_export.onnx.loading import load_file
from sluice_export.onnx.packing import Part, check_state_type
from sluice_export.onnx.pairing import StatePair, could_be_states, pair_states
from sluice_export.onnx.reference import FileReference
from sluice_export.onnx.unpacked_model import UnpackedModel
from sluice_export.proof.explanation import explain_failure
from sluice_export.proof.proofs import Candidate, Progress


def convert_file(
    source: Path,
    name: str,
    *,
    states: Mapping[str, str],
    fixed: Mapping[str, float],
    axes: Mapping[str, Axes],
    valid: Mapping[str, tuple[int, int]],
    tolerance: float,
    tell: Progress,
) -> Candidate:
    """The file `source` in the form that Sluice serves; options as of export_onnx.

    Raises ExportError, and ModelError or InferenceError where the file does not run.
    """
    tell("looking at the file", 0.0)
    proto = load_file(source, fixed)
    model, reference = _take_apart(proto, name, states=states, axes=axes, valid=valid)
    tell("packing the state", 0.1)
    packed, contract = pack_for_batches(model, reference, tolerance)
    with_shapes = onnx.shape_inference.infer_shapes(packed)
    return Candidate(packed, contract, reference, partial(explain_failure, with_shapes))


def _take_apart(
    proto: onnx.ModelProto,
    name: str,
    *,
    states: Mapping[str, str],
    axes: Mapping[str, Axes],
    valid: Mapping[str, tuple[int, int]],
) -> tuple[UnpackedModel, FileReference]:
    """What is known of a file, with all of its state as inputs and outputs; and its reference.

    Raises ModelError where the file does not run.
    """
    pairs = pair_states(proto, states)
    layout = find_layout(proto.graph, [pair.input for pair in pairs], axes)
    declare_axes(proto.graph.input, layout.inputs | layout.states, has_batch=layout.has_batch)
    ranges = find_ranges(proto.graph, layout, valid)
    parts = _lay_out_parts(proto.graph, layout, pairs)
    state_outputs = {pair.output for pair in pairs}
    outputs = [value.name for value in proto.graph.output if value.name not in state_outputs]
    reference = FileReference(proto, layout, parts, outputs)
    found = reference.learn_outputs(ranges)
    _notify_doubts(proto.graph, pairs)
    exposed = copy.deepcopy(proto)
    hidden = expose_states(exposed, layout) if layout.has_time else []
    if not pairs and not hidden:
        raise NoRecurrentLayerError(
            "no state was found in the file: no input comes back as an output, and no LSTM, "
            "GRU or RNN runs over a time axis; name it: --state input=output"
        )
    sizes = {pair.input: _hidden_size(exposed.graph, pair) for pair in hidden}
    layout.states.update({state: (1, BATCH, size) for state, size in sizes.items()})
    parts = _lay_out_parts(exposed.graph, layout, [*pairs, *hidden])
    return UnpackedModel(exposed, name, layout, parts, found, ranges), reference


def _lay_out_parts(
    graph: onnx.GraphProto, layout: Layout, pairs: Sequence[StatePair]
) -> list[Part]:
    """The place of each state in the packed row."""
    values = {value.name: value for value in graph.input}
    defaults = constants_of(graph)
    parts: list[Part] = []
    offset = 0
    for pair in pairs:
        element_type = values[pair.input].type.tensor_type.elem_type
        check_state_type(pair.input, element_type)
        part = Part(pair, layout.states[pair.input], element_type, offset)
        if pair.input in defaults:
            value = np.broadcast_to(defaults[pair.input], layout.shape(pair.input, 1, 0))
            part = replace(part, initial=value.astype(np.float32).reshape(-1).tolist())
        offset += part.size
        parts.append(part)
    return parts


def _hidden_size(graph: onnx.GraphProto, pair: StatePair) -> int:
    """The size of a state that was exposed, [1, batch, hidden]."""
    value = next(value for value in graph.input if value.name == pair.input)
    return int(value.type.tensor_type.shape.dim[2].dim_value)


def _notify_doubts(graph: onnx.GraphProto, pairs: Sequence[StatePair]) -> None:
    """Warn about inputs that may be states although they are read as data."""
    for name in could_be_states(graph, pairs) if pairs else ():
        notify(
            f"input {name!r} is read as data: an output has its shape, but nothing else "
            "says that it comes back. If it is a state, name all states: --state input=output"
        )
