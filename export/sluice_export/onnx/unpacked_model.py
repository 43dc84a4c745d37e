"""Holds an ONNX file whose states are still apart, and packs it into the form that is served."""

import copy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper

from sluice_export.contract import add_state_part, record_versions
from sluice_export.errors import InputError
from sluice_export.graphs import RECURRENT, constants_of, inputs_of, read_attribute
from sluice_export.onnx.axes import BATCH, TIME, Axes, Layout, declare_axes
from sluice_export.onnx.packing import Part, add_lengths, pack_states
from sluice_model.contract import write_contract
from sluice_protos.contract_pb2 import Cell, ModelContract, TensorSpec, ValueRange
from sluice_protos.datatypes import DATATYPES

_GATES: Final = {"LSTM": ("i", "o", "f", "c"), "GRU": ("z", "r", "h"), "RNN": ("i",)}


@dataclass(frozen=True)
class UnpackedModel:
    """What is known of a file before its state is packed."""

    proto: onnx.ModelProto
    name: str
    layout: Layout
    parts: list[Part]
    # The axes and the type of each output.
    outputs: dict[str, tuple[Axes, np.dtype[Any]]]
    # (first, last) of each integer input.
    ranges: dict[str, tuple[int, int]]

    def pack(self, *, has_lengths: bool = False) -> tuple[onnx.ModelProto, ModelContract]:
        """The graph with its state packed, and its contract without proofs.

        With `has_lengths` also with lengths for its recurrent operators, where it can have them.
        """
        proto = copy.deepcopy(self.proto)
        graph = proto.graph
        contract = self._describe()
        known = {name: axes for name, (axes, _) in self.outputs.items()} | self.layout.inputs
        declare_axes([*graph.input, *graph.output], known, has_batch=self.layout.has_batch)
        contract.state_input, contract.state_output = pack_states(graph, self.parts)
        if has_lengths:
            contract.lengths_input = add_lengths(graph)
        write_contract(proto, contract)
        return proto, contract

    def _describe(self) -> ModelContract:
        """The contract, without the names that packing chooses and without proofs."""
        layout = self.layout
        contract = ModelContract(name=self.name, batch_min=1, length_min=1)
        contract.is_one_step = not layout.has_time
        contract.batch_max = 0 if layout.has_batch else 1
        values = inputs_of(self.proto.graph)
        for name, axes in layout.inputs.items():
            dtype = helper.tensor_dtype_to_np_dtype(values[name].type.tensor_type.elem_type)
            spec = _tensor_spec(name, axes, dtype)
            if name in self.ranges:
                first, last = self.ranges[name]
                spec.valid.CopyFrom(ValueRange(min=first, max=last))
            contract.inputs.append(spec)
        for name, (axes, dtype) in self.outputs.items():
            contract.outputs.append(_tensor_spec(name, axes, dtype))
        for part in self.parts:
            add_state_part(contract, part.pair.input, part.shape, part.initial)
        contract.cells.extend(_describe_cells(self.proto.graph))
        record_versions(contract, "sluice-serving", "onnx", "onnxruntime")
        if self.proto.producer_name:
            contract.made_with[self.proto.producer_name] = self.proto.producer_version or "?"
        return contract


def _tensor_spec(name: str, axes: Axes, dtype: np.dtype[Any]) -> TensorSpec:
    if dtype not in DATATYPES:
        raise InputError(f"{name!r} is of type {dtype}, which a stream does not carry")
    return TensorSpec(
        name=name,
        datatype=DATATYPES[dtype],
        shape=[axis for axis in axes if isinstance(axis, int)],
        batch_axis=axes.index(BATCH),
        time_axis=axes.index(TIME) if TIME in axes else 0,
    )


def _describe_cells(graph: onnx.GraphProto) -> list[Cell]:
    """The recurrent operators of a graph."""
    weights = constants_of(graph)
    cells = []
    for node in graph.node:
        if node.op_type not in RECURRENT or node.input[1] not in weights:
            continue
        activation = read_attribute(node, "activations", [b"Tanh"])[0].decode().upper()
        kind = f"RNN_{activation}" if node.op_type == "RNN" else node.op_type
        cells.append(
            Cell(
                name=node.name or node.output[0],
                kind=kind,
                layers=1,
                input_size=weights[node.input[1]].shape[2],
                hidden_size=read_attribute(node, "hidden_size", 0),
                gates=_GATES[node.op_type],
            )
        )
    return cells
