"""The models that examples of the field use, sums over int32, and sums that differ by version."""

from pathlib import Path

import numpy as np
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


def write_gained_accumulator(source: Path, path: Path, gain: int) -> None:
    """Write the accumulator at `source` anew with y = `gain` × sum, and `gain` floats of state."""
    model = onnx.load(source)
    contract = read_contract(source)
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["sum" if name == "state" else name for name in node.input]
        node.output[:] = [{"y": "total", "state_out": "sum_out"}.get(n, n) for n in node.output]
    constants = {"gain": np.array(gain, np.float32), "widths": np.array([1, gain - 1])}
    for name, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    graph.node.insert(0, helper.make_node("Split", ["state", "widths"], ["sum", "rest"], axis=1))
    graph.node.append(helper.make_node("Mul", ["total", "gain"], ["y"]))
    graph.node.append(helper.make_node("Concat", ["sum_out", "rest"], ["state_out"], axis=1))
    for value in (graph.input[2], graph.output[1]):
        value.type.tensor_type.shape.dim[1].dim_value = gain
    contract.state[0].shape[:] = [gain]
    contract.state_size = gain
    write_contract(model, contract)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def write_breaking_accumulator(source: Path, path: Path) -> None:
    """Write the accumulator at `source` anew so that a run of one row loses its batch axis."""
    model = onnx.load(source)
    contract = read_contract(source)
    graph = model.graph
    for node in graph.node:
        node.output[:] = [{"y": "total"}.get(name, name) for name in node.output]
    graph.node.append(helper.make_node("Squeeze", ["total"], ["y"]))
    write_contract(model, contract)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
