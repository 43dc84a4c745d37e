"""Models whose values depend on how large a run is, which a real one's last bits may."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from sluice_model import Model, write_contract
from sluice_protos.contract_pb2 import ModelContract, StatePart, TensorSpec

LIMITS = (1, 2, 3, 30, 60, 1000)


def sizes_model(condition: list[onnx.NodeProto]) -> Model:
    """y = x, plus one where `condition` (from the scalars `batch` and `steps`) is one."""
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Shape", ["x"], ["steps"], start=1, end=2),
        *condition,
        helper.make_node("Cast", ["found"], ["addend"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "addend"], ["y"]),
        helper.make_node("Identity", ["state"], ["state_out"]),
    ]
    shape = ["batch", "steps", 1]
    graph = helper.make_graph(
        nodes,
        "sizes",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", 1]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, ["batch", 1]),
        ],
        [onnx.numpy_helper.from_array(np.array([n], np.int64), f"n{n}") for n in LIMITS],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    spec = {"datatype": "FP32", "shape": [1], "batch_axis": 0, "time_axis": 1}
    contract = ModelContract(
        name="sizes",
        inputs=[TensorSpec(name="x", **spec)],
        outputs=[TensorSpec(name="y", **spec)],
        state_input="state",
        state_output="state_out",
        lengths_input="lengths",
        state_size=1,
        state=[StatePart(name="sum", shape=[1])],
        batch_min=1,
        length_min=1,
    )
    write_contract(proto, contract)
    return Model(proto.SerializeToString(), contract)


def less(name: str, limit: int) -> list[onnx.NodeProto]:
    return [helper.make_node("Less", [name, f"n{limit}"], ["found"])]


def at_least(name: str, limit: int) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Less", [name, f"n{limit}"], ["less"]),
        helper.make_node("Not", ["less"], ["found"]),
    ]
