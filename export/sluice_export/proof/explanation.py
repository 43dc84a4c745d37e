"""Names the first operation of a graph by which a step depends on other steps, or a row on others.

What `torch.explanation` is for modules that are traced one step at a time.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import onnx

from sluice_export.graphs import producers_of
from sluice_export.proof.comparison import Array, measure_difference
from sluice_export.proof.evidence import LENGTHS, Evidence
from sluice_export.source_lines import describe_line, is_user_file
from sluice_model.model import Model
from sluice_protos.contract_pb2 import ModelContract, TensorSpec

# A stack frame among PyTorch's notes on which source line a node comes from.
_FRAME: Final = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]+)'
)
# Marks values without time axis, which are returned with one of size 1.
_ONCE: Final = ".once"


def explain_failure(proto: onnx.ModelProto, evidence: Evidence) -> str:
    """Where a graph first computes something that a stream cannot: a sentence with the fix.

    `proto` is the graph with the exporter's notes. Every value of the graph is compared
    between runs that must agree: whole and in chunks, together and alone, padded and not.
    The first value that differs, in order of computation, is at fault.
    """
    exposed, specs = _return_all_values(proto, evidence.model.contract)
    model = Model(exposed.SerializeToString(), _replace_outputs(evidence.model.contract, specs))
    producers = producers_of(proto.graph)
    for what, one, two in _run_pairs(model, evidence):
        for spec, first, second in zip(specs, one, two, strict=True):
            if not measure_difference(first, second) <= evidence.tolerance:
                node = producers[spec.name.removesuffix(_ONCE)]
                return (
                    f"The first value that differs {what} comes from {_locate(node)}. A step may "
                    "depend on earlier steps only through a recurrent layer, or an nn.Conv1d that "
                    "is padded in front, and on no other row"
                )
    return (
        "The graph agrees with itself in chunks, alone and padded, so it computes something else "
        "than the module from the first step on: does the module give a layer another state than "
        "the one it returned, or change a layer's weights or forward?"
    )


def _return_all_values(
    proto: onnx.ModelProto, contract: ModelContract
) -> tuple[onnx.ModelProto, list[TensorSpec]]:
    """`proto` with every float value that depends on the inputs as an output, in order."""
    exposed = copy.deepcopy(proto)
    graph = exposed.graph
    described = {value.name: value for value in (*graph.value_info, *graph.output)}
    reached = {spec.name for spec in contract.inputs}
    specs: list[TensorSpec] = []
    new_nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if not reached.intersection(node.input):
            continue
        reached.update(node.output)
        for name in node.output:
            spec = _describe(described.get(name), is_one_step=contract.is_one_step)
            if spec is None:
                continue
            specs.append(spec)
            if spec.name.endswith(_ONCE):
                axes = f"{spec.name}.axes"
                new_nodes += [
                    onnx.helper.make_node("Constant", [], [axes], value_ints=[spec.time_axis]),
                    onnx.helper.make_node("Unsqueeze", [name, axes], [spec.name]),
                ]
    graph.node.extend(new_nodes)
    del graph.output[:]
    names = [*(spec.name for spec in specs), contract.state_output]
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return exposed, specs


def _describe(value: onnx.ValueInfoProto | None, *, is_one_step: bool) -> TensorSpec | None:
    """How to read a float value with a batch axis; None for any other value."""
    if value is None or value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        return None
    dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    # Two axes of steps, as attention has them, are no rows of steps to compare.
    if dims.count("batch") != 1 or dims.count("steps") > 1:
        return None
    if any(isinstance(dim, str) and dim not in {"batch", "steps"} for dim in dims):
        return None
    spec = TensorSpec(name=value.name, datatype="FP32", batch_axis=dims.index("batch"))
    if not is_one_step:
        has_steps = "steps" in dims
        spec.name += "" if has_steps else _ONCE
        spec.time_axis = dims.index("steps") if has_steps else len(dims)
    return spec


def _replace_outputs(contract: ModelContract, specs: Sequence[TensorSpec]) -> ModelContract:
    """A copy of `contract` with other outputs."""
    changed = copy.deepcopy(contract)
    del changed.outputs[:]
    changed.outputs.extend(specs)
    return changed


def _run_pairs(model: Model, evidence: Evidence) -> Iterator[tuple[str, list[Array], list[Array]]]:
    """Pairs of runs that must agree: what they are, and the values of each, [batch, steps, …]."""
    steps = evidence.inputs[0].shape[1]
    full = np.full(evidence.batch, steps, np.int32)
    whole, _ = model.run(evidence.inputs, full, evidence.initial)
    cut = steps // 2
    head, state = model.run([a[:, :cut] for a in evidence.inputs], full * 0 + cut, evidence.initial)
    tail, _ = model.run([a[:, cut:] for a in evidence.inputs], full - cut, state)
    chunked = [
        np.concatenate([a, b], axis=1) if a.shape[1] == cut else b
        for a, b in zip(head, tail, strict=True)
    ]
    yield "between a whole run and one in chunks", whole, chunked
    ragged, _ = model.run(evidence.inputs, LENGTHS, evidence.initial)
    for row, length in enumerate(LENGTHS):
        mine = [a[row : row + 1] for a in evidence.inputs]
        alone, _ = model.run(mine, full[:1], evidence.initial[:1])
        together = [a[row : row + 1] for a in whole]
        yield "between a row among others and the same row alone", together, alone
        if not model.contract.lengths_input:
            continue  # rows of different lengths never share a run
        short, _ = model.run([a[:, :length] for a in mine], LENGTHS[row : row + 1], state[:1] * 0)
        padded = [a[row : row + 1, :length] for a in ragged]
        yield "between a row with padding behind it and the same row without", padded, short


def _locate(node: onnx.NodeProto) -> str:
    """A node's operation, and the line of the user's source that it comes from where known."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    frames = [
        frame
        for frame in _FRAME.finditer(notes.get("pkg.torch.onnx.stack_trace", ""))
        if is_user_file(frame["file"])
    ]
    if not frames:
        return f"{node.op_type} (node {node.name or node.output[0]})"
    last = frames[-1]
    return describe_line(node.op_type, last["file"], last["line"], last["code"])
