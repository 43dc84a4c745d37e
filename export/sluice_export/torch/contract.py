"""Describes a module in the contract of the graph to be made from it."""

from collections.abc import Sequence

import torch

from sluice_export.contract import LENGTHS, STATE, STATE_OUT, add_state_part, record_versions
from sluice_export.torch.analysis import Analysis
from sluice_protos.contract_pb2 import Cell, ModelContract, TensorSpec, ValueRange
from sluice_protos.datatypes import DATATYPES


def describe(analysis: Analysis, name: str) -> ModelContract:
    """The contract of a model called `name`, without proofs."""
    contract = ModelContract(name=name, lengths_input=LENGTHS, batch_min=1, length_min=1)
    contract.state_input, contract.state_output = STATE, STATE_OUT
    signature = analysis.signature.as_float()
    for leaf in signature.inputs:
        spec = _tensor_spec(leaf.name, leaf.dtype, leaf.shape)
        if leaf.valid:
            spec.valid.CopyFrom(ValueRange(min=leaf.valid[0], max=leaf.valid[1]))
        contract.inputs.append(spec)
    for output in signature.outputs:
        contract.outputs.append(_tensor_spec(output.name, output.dtype, output.shape))
    for layer in analysis.layers:
        contract.cells.append(
            Cell(
                name=layer.name,
                kind=layer.kind.name,
                layers=layer.depth,
                input_size=layer.module.input_size,
                hidden_size=layer.module.hidden_size,
                gates=layer.kind.gates,
            )
        )
    for stateful in analysis.stateful_layers:
        for part, shape in stateful.parts.items():
            initial = analysis.initial.get(part, torch.empty(0))
            add_state_part(contract, part, shape, initial.flatten().float().tolist())
    record_versions(contract, "sluice-serving", "torch", "onnx", "onnxscript", "onnxruntime")
    return contract


def _tensor_spec(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorSpec:
    datatype = DATATYPES[torch.empty(0, dtype=dtype).numpy().dtype]
    return TensorSpec(name=name, datatype=datatype, shape=shape, batch_axis=0, time_axis=1)
