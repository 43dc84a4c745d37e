"""Models whose values depend on how large a run is, which a real one's last bits may."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from sluice_model import Model
from tests.models import scalar_model

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
    weights = {f"n{limit}": np.array([limit], np.int64) for limit in LIMITS}
    proto, contract = scalar_model("sizes", nodes, weights)
    return Model(proto.SerializeToString(), contract)


def less(name: str, limit: int) -> list[onnx.NodeProto]:
    return [helper.make_node("Less", [name, f"n{limit}"], ["found"])]


def at_least(name: str, limit: int) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Less", [name, f"n{limit}"], ["less"]),
        helper.make_node("Not", ["less"], ["found"]),
    ]
