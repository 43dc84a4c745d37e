"""The model that examples of the field use: sums over int32."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from sluice_model import read_contract, write_contract


def write_integer_accumulator(source: Path, path: Path) -> None:
    """Write the accumulator at `source` anew with int32 in and out: INPUT [1] to OUTPUT [1]."""
    model = onnx.load(source)
    contract = read_contract(source)
    graph = model.graph
    graph.node.insert(0, helper.make_node("Cast", ["INPUT"], ["x"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("Cast", ["y"], ["OUTPUT"], to=TensorProto.INT32))
    for values, name in ((graph.input, "INPUT"), (graph.output, "OUTPUT")):
        shape = ["batch", "steps", 1]
        values[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.INT32, shape))
    contract.name = "integers"
    for spec, name in ((contract.inputs[0], "INPUT"), (contract.outputs[0], "OUTPUT")):
        spec.name, spec.datatype = name, "INT32"
    write_contract(model, contract)
    path.write_bytes(model.SerializeToString())
