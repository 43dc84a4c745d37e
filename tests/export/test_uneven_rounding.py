"""Operators that round the last values of a run another way are never called exact."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from sluice_export import ExportNotice, export
from sluice_export.proof.rounding import PACKET, find_uneven_operators
from sluice_export.verification import verify

UNEVEN = ("Acos", "Asin", "Atan", "Celu", "Cos", "Elu", "Log", "Mish", "Selu", "Sin", "Softplus")
EVEN = (
    *("Abs", "Acosh", "Asinh", "Atanh", "Ceil", "Cosh", "Erf", "Exp", "Floor", "Gelu"),
    *("HardSigmoid", "HardSwish", "LeakyRelu", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid"),
    *("Sign", "Sinh", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu"),
)


def make_graph(nodes: list[onnx.NodeProto], shape: list[str | int]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "element_wise",
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("operator", [*UNEVEN, *EVEN])
def test_the_operators_found_are_those_whose_last_values_differ_in_onnxruntime(operator):
    proto = make_graph([helper.make_node(operator, ["x"], ["y"])], ["rows"])
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    x = np.random.default_rng(0).uniform(-0.99, 0.99, 4000).astype(np.float32)
    x = abs(x) + (operator == "Acosh") if operator in ("Acosh", "Log", "Sqrt") else x

    def differ(size: int) -> bool:
        parts = [session.run(None, {"x": x[i : i + size]})[0] for i in range(0, len(x), size)]
        return not np.array_equal(np.concatenate(parts), session.run(None, {"x": x})[0])

    assert [size for size in (PACKET, 2 * PACKET, 5 * PACKET) if differ(size)] == []
    assert any(differ(size) for size in (1, 5, 10, 25)) == (operator in UNEVEN)
    assert bool(find_uneven_operators(proto)) == (operator in UNEVEN)


@pytest.mark.parametrize(
    "shape, is_uneven",
    [
        (["batch", "steps", 1], True),
        (["batch", "steps", 6], True),
        (["batch", "steps", 12], False),
        (["batch", 2, "steps", 2], False),
        ([3], False),
    ],
)
def test_what_has_whole_packets_or_one_size_at_every_batch_is_even(shape, is_uneven):
    nodes = [helper.make_node("Neg", ["x"], ["n"]), helper.make_node("Elu", ["n"], ["y"], "e")]
    assert find_uneven_operators(make_graph(nodes, shape)) == (["Elu 'e'"] if is_uneven else [])


def test_operators_are_found_inside_branches_and_functions():
    value = helper.make_tensor_value_info
    branch = helper.make_graph(
        [helper.make_node("Log", ["x"], ["z"], "inner")],
        "branch",
        [],
        [value("z", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Constant", [], ["always"], value_int=1),
        helper.make_node("Cast", ["always"], ["choice"], to=TensorProto.BOOL),
        helper.make_node("If", ["choice"], ["y"], then_branch=branch, else_branch=branch),
    ]
    assert find_uneven_operators(make_graph(nodes, ["batch", 1]))[0] == "Log 'inner'"
    opsets = [helper.make_opsetid("", 20)]
    proto = make_graph([helper.make_node("Own", ["x"], ["y"], domain="own")], ["batch", 1])
    inner = [helper.make_node("Sin", ["a"], ["b"])]
    proto.functions.append(helper.make_function("own", "Own", ["a"], ["b"], inner, opsets))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    assert len(find_uneven_operators(proto)) == 1


class Positive(nn.Module):
    """A GRU, and ELU of each step's `features`."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.elu(self.head(self.gru(x)[0]))


def test_a_module_with_an_uneven_operator_is_not_called_exact(tmp_path):
    path = tmp_path / "model.onnx"
    torch.manual_seed(0)
    with pytest.warns(ExportNotice, match=r"bits.sizes does not hold.*Elu.* a multiple of 4"):
        contract = export(Positive(1), torch.zeros(2, 5, 4), path)
    assert not contract.proofs[-1].passed
    assert not verify(path)[-1].passed


def test_a_module_whose_steps_have_whole_packets_is_called_exact(tmp_path):
    contract = export(Positive(4), torch.zeros(2, 5, 4), tmp_path / "model.onnx")
    assert contract.proofs[-1].passed
