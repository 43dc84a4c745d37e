"""Exports an ONNX file made by others: finds its state, packs it, proves it, writes it."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import helper

from sluice_export.delivery import TOLERANCE, Progress, deliver, notify, set_minimums
from sluice_export.errors import ExportError, InputError, NoRecurrentLayerError
from sluice_export.onnx.axes import BATCH, Axes, Layout, declare_axes, find_layout
from sluice_export.onnx.editing import (
    constants_of,
    inputs_of,
    keep_batch,
    read_attribute,
)
from sluice_export.onnx.hidden_states import expose_states
from sluice_export.onnx.loading import load_file
from sluice_export.onnx.packing import Part, check_state_type
from sluice_export.onnx.pairing import StatePair, could_be_states, pair_states
from sluice_export.onnx.reference import Original
from sluice_export.onnx.unpacked_model import Draft
from sluice_export.proof.explanation import explain_failure
from sluice_export.proof.proofs import Evidence, prove_ragged
from sluice_export.ranges import require_range
from sluice_model.errors import ModelError
from sluice_model.model import Model
from sluice_protos.contract_pb2 import ModelContract

# How many ways of placing the batch axis are tried before rows run one by one.
_PLACEMENTS_MAX: Final = 64


def export_onnx(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    states: Mapping[str, str] | None = None,
    fixed: Mapping[str, float] | None = None,
    axes: Mapping[str, Axes] | None = None,
    valid: Mapping[str, tuple[int, int]] | None = None,
    tolerance: float = TOLERANCE,
    on_progress: Progress | None = None,
) -> ModelContract:
    """Write the ONNX file `source` to `path` in the form that Sluice serves, once proven equal.

    states      which input is the state that comes out of which output, where the file
                does not tell: {"h": "h_out"}, or "stack[0]" for a part of an output
    fixed       inputs of a single value, and that value: {"sr": 16000}
    axes        of inputs whose shape does not tell: {"x": ("batch", "steps", 80)}
    valid       the first and last valid value of integer inputs, by name
    tolerance   the largest difference to the file as it was, relative to the largest value

    Returns the contract that the new file carries. Raises ExportError, and writes
    nothing then.
    """
    tell = on_progress or (lambda what, share: None)
    tell("looking at the file", 0.0)
    proto = load_file(Path(source), fixed or {})
    try:
        return _export(
            proto,
            Path(path),
            name or Path(path).stem,
            states=states or {},
            axes=axes or {},
            valid=valid or {},
            tolerance=tolerance,
            tell=tell,
        )
    except (ModelError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            f"{source}: does not run in ONNX Runtime, which serves it ({error}); export it again "
            "with standard operators and opset 17, and see what onnx.checker says of it"
        ) from error


def _export(
    proto: onnx.ModelProto,
    path: Path,
    name: str,
    *,
    states: Mapping[str, str],
    axes: Mapping[str, Axes],
    valid: Mapping[str, tuple[int, int]],
    tolerance: float,
    tell: Progress,
) -> ModelContract:
    """As export_onnx, of a file that was read. Raises ModelError where it does not run."""
    pairs = pair_states(proto, states)
    layout = find_layout(proto.graph, [pair.input for pair in pairs], axes)
    known = layout.inputs | layout.states
    declare_axes(proto.graph.input, known, has_batch=layout.has_batch)
    ranges = _find_ranges(proto.graph, layout, valid)
    given = _parts(proto.graph, layout, pairs)
    kept = {pair.output for pair in pairs}
    outputs = [value.name for value in proto.graph.output if value.name not in kept]
    original = Original(proto, layout, given, outputs)
    found = original.learn(ranges)
    _tell_doubts(proto.graph, pairs)
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    hidden: list[StatePair] = []
    if layout.has_time:
        hidden = expose_states(bare, layout)
    if not pairs and not hidden:
        raise NoRecurrentLayerError(
            "no state was found in the file: no input comes back as an output, and no LSTM, "
            "GRU or RNN runs over a time axis; name it: --state input=output"
        )
    layout.states.update({pair.input: (1, BATCH, _hidden(bare.graph, pair)) for pair in hidden})
    parts = _parts(bare.graph, layout, [*pairs, *hidden])
    draft = Draft(bare, name, layout, parts, found, ranges)
    tell("packing the state", 0.1)
    proto, contract = _choose_form(draft, original, tolerance)
    noted = onnx.shape_inference.infer_shapes(proto)
    deliver(
        proto,
        contract,
        original,
        path,
        explain=partial(explain_failure, noted),
        tolerance=tolerance,
        tell=tell,
    )
    return contract


def _parts(graph: onnx.GraphProto, layout: Layout, pairs: Sequence[StatePair]) -> list[Part]:
    """Where each state lies in the packed row."""
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


def _find_ranges(
    graph: onnx.GraphProto, layout: Layout, valid: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """The valid values of the integer inputs: those told, or those of the tables they index."""
    unknown = valid.keys() - layout.inputs.keys()
    if unknown:
        raise InputError(f"--valid names {sorted(unknown)}; the inputs are {[*layout.inputs]}")
    values, constants = inputs_of(graph), constants_of(graph)
    producers = {name: node for node in graph.node for name in node.output}
    ranges = dict(valid)
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in constants:
            name = node.input[1]
            while name in producers and producers[name].op_type in _MOVES:
                name = producers[name].input[0]
            axis = read_attribute(node, "axis", 0)
            rows = constants[node.input[0]].shape[axis]
            if name in layout.inputs and name not in valid:
                ranges[name] = (0, min(rows - 1, ranges.get(name, (0, rows))[1]))
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


_MOVES: Final = {"Cast", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Identity", "Flatten"}


def _hidden(graph: onnx.GraphProto, pair: StatePair) -> int:
    value = next(value for value in graph.input if value.name == pair.input)
    return int(value.type.tensor_type.shape.dim[2].dim_value)


def _tell_doubts(graph: onnx.GraphProto, pairs: Sequence[StatePair]) -> None:
    """Say what was decided where it could be thought otherwise."""
    for name in could_be_states(graph, pairs) if pairs else ():
        notify(
            f"input {name!r} is taken for data: an output has its shape, but nothing else says "
            "that it comes back. If it is a state, name all states: --state input=output"
        )


def _choose_form(
    draft: Draft, original: Original, tolerance: float
) -> tuple[onnx.ModelProto, ModelContract]:
    """The graph in the form that serves best of those that give what the file gives."""
    candidates = _with_lengths(draft) if draft.layout.has_batch else _widened(draft, original)
    for proto, contract in candidates:
        if _is_equal(proto, contract, original, tolerance):
            return proto, contract
    proto, contract = draft.build()
    if contract.batch_max:
        notify(
            "the file takes one row at a time, and no way was found to give it several that "
            "gives the same: its sequences run one by one, which is slower"
        )
    elif not contract.is_one_step:
        notify("the file does not tell steps from padding: only chunks of equal length share a run")
    return proto, contract


def _with_lengths(draft: Draft) -> Iterator[tuple[onnx.ModelProto, ModelContract]]:
    """The graph with lengths for its recurrent operators, where all of the state is theirs."""
    if draft.layout.has_time:
        built = draft.build(has_lengths=True)
        if built[1].lengths_input:
            yield built


def _widened(draft: Draft, original: Original) -> Iterator[tuple[onnx.ModelProto, ModelContract]]:
    """A graph of one row as one of many, in each way that its batch axes might lie."""
    names = [*draft.layout.inputs, *(part.pair.input for part in draft.parts)]
    choices = [_placements(draft.layout.inputs[name]) for name in draft.layout.inputs]
    choices += [_placements(part.axes) for part in draft.parts]
    for chosen in itertools.islice(itertools.product(*choices), _PLACEMENTS_MAX):
        axes = dict(zip(names, chosen, strict=True))
        layout = Layout(
            {name: axes[name] for name in draft.layout.inputs},
            {part.pair.input: axes[part.pair.input] for part in draft.parts},
        )
        parts = [replace(part, axes=axes[part.pair.input]) for part in draft.parts]
        for proto in _loosened(draft.proto, layout):
            try:
                wide = Original(proto, layout, parts, list(draft.outputs))
                found = wide.learn(draft.ranges)
                yield replace(draft, proto=proto, layout=layout, parts=parts, outputs=found).build()
            except (ExportError, ModelError):
                continue


def _placements(axes: Axes) -> list[Axes]:
    """Every way in which an axis of size 1 may be the batch axis, the likeliest first."""
    bare = tuple(1 if axis == BATCH else axis for axis in axes)
    places = [place for place, axis in enumerate(bare) if axis == 1]
    return [(*bare[:place], BATCH, *bare[place + 1 :]) for place in places]


def _loosened(proto: onnx.ModelProto, layout: Layout) -> Iterator[onnx.ModelProto]:
    """The graph with a batch of any size: as it is, and with its reshapes keeping the batch."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    declare_axes(wide.graph.input, layout.inputs | layout.states, has_batch=True)
    for value in wide.graph.output:
        value.type.tensor_type.ClearField("shape")
    yield wide
    if keep_batch(wide):
        yield wide


def _is_equal(
    proto: onnx.ModelProto, contract: ModelContract, original: Original, tolerance: float
) -> bool:
    """Whether rows of many lengths in one run give what each gives alone, in any batch."""
    try:
        sizes = set_minimums(proto, contract)
        model = Model(proto.SerializeToString(), contract)
        is_equal = prove_ragged(Evidence(model, original, tolerance=tolerance)).passed
    except ModelError:
        return False
    return is_equal and (sizes.passed or bool(contract.lengths_input))
