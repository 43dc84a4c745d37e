"""What is unusual in a module or a file ends in a model that is right, or in a message."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from sluice_export import (
    InputError,
    LayerError,
    OutputError,
    ParityError,
    export,
    export_onnx,
    verify,
)
from sluice_export.graphs import constants_of
from sluice_model import Model
from tests.export.foreign_models import Builder
from tests.export.test_foreign_refusals import RESULT, SEQUENCE, gru_over_time

X = torch.zeros(1, 5, 4)


class Makes(nn.Module):
    """Returns what a test makes of the steps of a layer."""

    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 6, batch_first=True)
        self.make = make

    def forward(self, x: Tensor) -> object:
        return self.make(self.cell(x)[0])


NOT_CAUSAL = {
    "beside large values": lambda y: torch.cat([y.softmax(1), 20_000 + y], dim=2),
    "on top of a large constant": lambda y: 20_000 + y.softmax(1),
    "of tiny values": lambda y: (y - y.mean(1, keepdim=True)) * 1e-6,
}


@pytest.mark.parametrize("make", NOT_CAUSAL.values(), ids=NOT_CAUSAL.keys())
def test_what_looks_along_time_is_refused_however_small_it_is(tmp_path, make):
    torch.manual_seed(0)
    with pytest.raises(ParityError, match=r"test_unusual_modules.py, line"):
        export(Makes(make), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_large_constant_that_rounds_off_the_last_bits_is_no_failure(tmp_path):
    torch.manual_seed(0)
    contract = export(Makes(lambda y: 20_000 + y), X, tmp_path / "model.onnx")
    assert all(proof.passed for proof in contract.proofs)


def test_attention_of_steps_to_steps_is_refused_with_its_line(tmp_path):
    torch.manual_seed(0)
    attend = Makes(lambda y: torch.softmax(y @ y.transpose(1, 2), -1) @ y)  # the line named
    with pytest.raises(ParityError, match=r"comes from .*test_unusual_modules.py, line \d+"):
        export(attend, X, tmp_path / "model.onnx")


def test_a_search_for_the_cause_that_fails_does_not_hide_the_failure(tmp_path, monkeypatch):
    def fail(*_: object) -> str:
        raise ValueError("no such axis")

    monkeypatch.setattr("sluice_export.torch.conversion.explain_failure", fail)
    with pytest.raises(ParityError, match=r"parity.*failed.*not found out \(no such axis\)"):
        export(Makes(lambda y: y - y.mean(1, keepdim=True)), X, tmp_path / "model.onnx")


class MinimalGatedCell(nn.RNNCellBase):
    def __init__(self) -> None:
        super().__init__(4, 6, bias=True, num_chunks=2)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        h = x.new_zeros(x.shape[0], 6) if h is None else h
        rows = functional.linear(x, self.weight_ih, self.bias_ih)
        gate, new = (rows + functional.linear(h, self.weight_hh, self.bias_hh)).chunk(2, 1)
        return torch.lerp(h, torch.tanh(new), torch.sigmoid(gate))


class NormalisedCell(nn.GRUCell):
    def __init__(self) -> None:
        super().__init__(4, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return self.norm(super().forward(x, h))


class Loops(nn.Module):
    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = None, []
        for row in x.unbind(1):
            h = self.cell(row, h)
            outputs.append(h)
        return torch.stack(outputs, dim=1)


def test_a_cell_of_another_kind_is_refused(tmp_path):
    with pytest.raises(LayerError, match="cell is a MinimalGatedCell, a cell of another kind"):
        export(Loops(MinimalGatedCell()), X, tmp_path / "model.onnx")


def test_a_cell_with_a_forward_of_its_own_is_named_where_it_differs(tmp_path):
    with pytest.raises(ParityError, match="cell is a NormalisedCell with a forward of its own"):
        export(Loops(NormalisedCell()), X, tmp_path / "model.onnx")


class WeightNormed(nn.Module):
    """A convolution whose weight is an attribute that is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv1d(4, 4, 3)
        self.cell = nn.GRU(4, 6, batch_first=True)
        torch.nn.utils.weight_norm(self.before)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(functional.pad(x.transpose(1, 2), (2, 0)))
        return self.cell(y.transpose(1, 2))[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_computed_into_an_attribute_are_exported_and_left_alone(tmp_path):
    module = WeightNormed()
    weight = module.before.weight
    export(module, X, tmp_path / "model.onnx")
    assert module.before.weight is weight and not weight.is_leaf
    model = Model.load(tmp_path / "model.onnx")
    x = torch.randn(1, 5, 4)
    outputs, _ = model.run([x.numpy()], None, model.initial_state[np.newaxis])
    np.testing.assert_allclose(outputs[0], module(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda y: y.bfloat16(), lambda y: torch.complex(y, y)], ids=["bfloat16", "complex"]
)
def test_an_output_of_a_type_that_no_client_reads_is_refused(tmp_path, make):
    with pytest.raises(OutputError, match=r"result 0 of forward is of torch.*to\(torch.float32\)"):
        export(Makes(make), X, tmp_path / "model.onnx")


def test_a_module_with_other_outputs_is_not_verified(tmp_path):
    export(Makes(lambda y: y), X, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"the module returns .* not the same model"):
        verify(tmp_path / "model.onnx", Makes(lambda y: (y, y * 2)), X)


def scaled_steps(b: Builder) -> None:
    b.nodes.append(helper.make_node("Constant", [], ["two"], value=TWO))
    b.add("Mul", gru_over_time(b), "two", gives=["y"])


TWO = onnx.numpy_helper.from_array(np.full(4, 2, np.float32), "two")


def write_scaled(path: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    """A file whose steps are multiplied by a Constant, changed after it was checked."""
    builder = Builder()
    scaled_steps(builder)
    proto = onnx.load(builder.save(path, SEQUENCE, RESULT))
    change(proto.graph)
    path.write_bytes(proto.SerializeToString())
    return path


def node_of(graph: onnx.GraphProto, operator: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == operator)


def unknown_operator(graph: onnx.GraphProto) -> None:
    node_of(graph, "Mul").op_type = "Mystery"


def dangling_input(graph: onnx.GraphProto) -> None:
    node_of(graph, "Mul").input[1] = "nowhere"


def constant_without_value(graph: onnx.GraphProto) -> None:
    node_of(graph, "Constant").ClearField("attribute")


@pytest.mark.parametrize("change", [unknown_operator, dangling_input, constant_without_value])
def test_a_file_that_does_not_run_is_refused(tmp_path, change):
    source = write_scaled(tmp_path / "model.onnx", change)
    with pytest.raises(InputError, match=r"(?s)does not run in ONNX Runtime.*standard operators"):
        export_onnx(source, tmp_path / "served.onnx")


def move_value(graph: onnx.GraphProto) -> None:
    tensor = node_of(graph, "Constant").attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="two.bin")


def test_a_constant_whose_value_lies_in_another_file_is_taken_in(tmp_path):
    (tmp_path / "two.bin").write_bytes(TWO.raw_data)
    source = write_scaled(tmp_path / "model.onnx", move_value)
    export_onnx(source, tmp_path / "served.onnx")
    graph = onnx.load(tmp_path / "served.onnx", load_external_data=False).graph
    assert constants_of(graph)["two"].tolist() == [2, 2, 2, 2]
