"""Names the operation of a graph that makes a step depend on other steps, or a row on others."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sluice_export.proof.comparison import measure_difference
from sluice_export.proof.proofs import LENGTHS, Evidence
from sluice_export.torch.tracing import is_of_user
from sluice_model.model import Model
from sluice_protos.contract_pb2 import ModelContract, TensorSpec

Array = NDArray[Any]

# A frame of the exporter's notes on where in the source a node comes from.
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]+)')


def explain_failure(proto: onnx.ModelProto, evidence: Evidence) -> str:
    """Where a graph first computes something that a stream cannot: a sentence with the fix.

    `proto` is the graph with the exporter's notes. Every value of the graph is
    compared between runs that must agree: whole and in chunks, together and
    alone, ragged and alone. The first in order of computation is the culprit.
    """
    exposed, specs = _expose(proto, evidence.model.contract)
    model = Model(exposed.SerializeToString(), _contract_of(evidence.model.contract, specs))
    producers = {name: node for node in proto.graph.node for name in node.output}
    for what, one, two in _comparisons(model, evidence):
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


# Marks values without time axis, which are exposed with one of size 1.
_ONCE = ".once"


def _expose(
    proto: onnx.ModelProto, contract: ModelContract
) -> tuple[onnx.ModelProto, list[TensorSpec]]:
    """`proto` with every float value that follows from the inputs as an output, in order."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
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
            spec = _spec(described.get(name), is_one_step=contract.is_one_step)
            if spec is not None:
                specs.append(spec)
                axes = [spec.time_axis]
                if spec.name.endswith(_ONCE):
                    new_nodes += [
                        onnx.helper.make_node(
                            "Constant", [], [f"{spec.name}.axes"], value_ints=axes
                        ),
                        onnx.helper.make_node(
                            "Unsqueeze", [name, f"{spec.name}.axes"], [spec.name]
                        ),
                    ]
    graph.node.extend(new_nodes)
    del graph.output[:]
    names = [*(spec.name for spec in specs), contract.state_output]
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return exposed, specs


def _spec(value: onnx.ValueInfoProto | None, *, is_one_step: bool) -> TensorSpec | None:
    """How to read a float value with a batch axis; None for all others."""
    if value is None or value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        return None
    dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    # Steps against steps, as attention has them: no rows of steps to compare.
    if dims.count("batch") != 1 or dims.count("steps") > 1:
        return None
    if any(d not in {"batch", "steps"} for d in dims if _is_text(d)):
        return None
    if is_one_step:
        return TensorSpec(name=value.name, datatype="FP32", batch_axis=dims.index("batch"))
    has_steps = "steps" in dims
    return TensorSpec(
        name=value.name if has_steps else value.name + _ONCE,
        datatype="FP32",
        batch_axis=dims.index("batch"),
        time_axis=dims.index("steps") if has_steps else len(dims),
    )


def _is_text(dimension: str | int) -> bool:
    return isinstance(dimension, str)


def _contract_of(contract: ModelContract, specs: Sequence[TensorSpec]) -> ModelContract:
    """`contract` with other outputs."""
    changed = ModelContract()
    changed.CopyFrom(contract)
    del changed.outputs[:]
    changed.outputs.extend(specs)
    return changed


def _comparisons(
    model: Model, evidence: Evidence
) -> Iterator[tuple[str, list[Array], list[Array]]]:
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
            continue  # rows of other lengths never share a run
        short, _ = model.run([a[:, :length] for a in mine], LENGTHS[row : row + 1], state[:1] * 0)
        padded = [a[row : row + 1, :length] for a in ragged]
        yield "between a row with padding behind it and the same row without", padded, short


def _locate(node: onnx.NodeProto) -> str:
    """What a node is, in which module, and which line of the user's source it comes from."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    frames = [
        frame
        for frame in _FRAME.finditer(notes.get("pkg.torch.onnx.stack_trace", ""))
        if is_of_user(frame["file"])
    ]
    if not frames:
        return f"{node.op_type} (node {node.name or node.output[0]})"
    last = frames[-1]
    return f"{node.op_type} in {Path(last['file']).name}, line {last['line']}: {last['code']}"
