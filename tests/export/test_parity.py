"""An exported file computes what its module computes, however both are called."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sluice_export import export
from sluice_model import Model, example_inputs
from sluice_protos.contract_pb2 import ModelContract
from tests.models import run_offline


def run_torch(module: nn.Module, *arguments: Any) -> Any:
    with torch.no_grad():
        return module.eval()(*arguments)


def assert_streams_as(path: Path, expected: Sequence[Tensor], inputs: list[np.ndarray]) -> None:
    """The file's outputs equal `expected` [batch, steps, …]; plainly run and step by step.

    Plain ONNX Runtime on each whole sequence alone is compared by tolerance with
    PyTorch, and bit for bit with our own steps of the whole batch.
    """
    model = Model.load(path)
    names = [spec.name for spec in model.contract.inputs]
    batch, steps = inputs[0].shape[:2]
    state = np.tile(model.initial_state, (batch, 1))
    streamed = []
    for step in range(steps):
        rows = [array[:, step : step + 1] for array in inputs]
        outputs, state = model.run(rows, np.ones(batch, np.int32), state)
        streamed.append([array[:, 0] for array in outputs])
    for row in range(batch):
        if model.contract.batch_min > 1:
            offline = run_pair(path, {n: a[row] for n, a in zip(names, inputs, strict=True)})
        else:
            offline = run_offline(path, {n: a[row] for n, a in zip(names, inputs, strict=True)})
        for place, array in enumerate(offline):
            np.testing.assert_allclose(
                array, expected[place][row].numpy(), rtol=1e-4, atol=1e-5, strict=True
            )
            mine = np.stack([outputs[place][row] for outputs in streamed])
            assert np.array_equal(mine, array)


def run_pair(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """As run_offline, with the sequence twice in the batch: an RNN alone has other bits."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    steps = len(next(iter(inputs.values())))
    size = next(t.shape[1] for t in session.get_inputs() if t.name == "state")
    feed = {name: np.stack([array, array]) for name, array in inputs.items()}
    feed |= {"lengths": np.full(2, steps, np.int32), "state": np.zeros((2, size), np.float32)}
    names = [tensor.name for tensor in session.get_outputs() if tensor.name != "state_out"]
    return [array[0] for array in session.run(names, feed)]


class TakesState(nn.Module):
    """Passes the state of its two layers in and out, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(4, 6, 2, batch_first=True)
        self.second = nn.GRU(6, 5, batch_first=True)

    def forward(
        self, x: Tensor, state: tuple[tuple[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], Tensor]]:
        y, first = self.first(x, state[0])
        y, second = self.second(y, state[1])
        return y, (first, second)


def test_a_module_that_takes_its_state_streams_without_it(tmp_path):
    torch.manual_seed(0)
    module = TakesState()

    def zeros(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (torch.zeros(2, batch, 6), torch.zeros(2, batch, 6)), torch.zeros(1, batch, 5)

    path = tmp_path / "model.onnx"
    contract = export(module, (torch.zeros(2, 5, 4), zeros(2)), path)
    assert [spec.name for spec in contract.inputs] == ["x"]
    assert [spec.name for spec in contract.outputs] == ["y"]
    x = torch.randn(3, 9, 4)
    assert_streams_as(path, [run_torch(module, x, zeros(3))[0]], [x.numpy()])


class SmallTokens(nn.Module):
    """Tokens in eight bits, which are widened before the lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 5)
        self.cell = nn.GRU(5, 6, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.cell(self.embedding(tokens.long()))[0]


def test_the_range_of_narrow_integers_is_found_through_a_cast(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    example = torch.randint(0, 200, (2, 9), dtype=torch.uint8)
    contract = export(SmallTokens(), example, path)
    assert contract.inputs[0].datatype == "UINT8"
    assert (contract.inputs[0].valid.min, contract.inputs[0].valid.max) == (0, 199)


class SeparateStates(nn.Module):
    """forward(x, h, c), the states of its layer with the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous())
        y, (h, c) = self.cell(x, before)
        return y, h.transpose(0, 1), c.transpose(0, 1)


def test_states_are_recognised_wherever_their_batch_axis_is(tmp_path):
    torch.manual_seed(0)
    module = SeparateStates()
    path = tmp_path / "model.onnx"
    export(module, (torch.zeros(1, 5, 4), torch.zeros(1, 1, 6), torch.zeros(1, 1, 6)), path)
    x = torch.randn(2, 6, 4)
    expected = run_torch(module, x, torch.zeros(2, 1, 6), torch.zeros(2, 1, 6))[0]
    assert_streams_as(path, [expected], [x.numpy()])


class LanguageModel(nn.Module):
    """As in PyTorch's own example: time first, an optional state, batch and time merged."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 7)
        self.dropout = nn.Dropout(0.5)
        self.cell = nn.GRU(7, 9, 2, dropout=0.5)
        self.head = nn.Linear(9, 20)

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if hidden is None:
            hidden = next(self.parameters()).new_zeros(2, tokens.size(1), 9)
        self.cell.flatten_parameters()
        y, hidden = self.cell(self.dropout(self.embedding(tokens)), hidden)
        scores = self.head(y).view(-1, 20)
        return functional.log_softmax(scores, dim=1), hidden


def test_merged_batch_and_time_come_apart_again(tmp_path):
    torch.manual_seed(0)
    module = LanguageModel().eval()
    path = tmp_path / "model.onnx"
    contract = export(module, torch.zeros(5, 1, dtype=torch.int64), path)
    assert (contract.inputs[0].valid.min, contract.inputs[0].valid.max) == (0, 19)
    tokens = torch.randint(0, 20, (3, 8))
    expected = run_torch(module, tokens.T)[0].unflatten(0, (8, 3)).transpose(0, 1)
    assert_streams_as(path, [expected], [tokens.numpy()])


class LearnedStart(nn.Module):
    """Starts from a state that was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 6, 2, batch_first=True)
        self.start = nn.Parameter(torch.randn(2, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, self.start.expand(-1, x.size(0), -1).contiguous())[0]


def test_a_learned_initial_state_goes_into_the_contract(tmp_path):
    torch.manual_seed(0)
    module = LearnedStart()
    path = tmp_path / "model.onnx"
    export(module, torch.zeros(1, 5, 4), path)
    model = Model.load(path)
    assert np.array_equal(model.initial_state, module.start.detach().numpy().ravel())
    x = torch.randn(2, 5, 4)
    outputs, _ = model.run(
        [x.numpy()], np.full(2, 5, np.int32), np.tile(model.initial_state, (2, 1))
    )
    np.testing.assert_allclose(outputs[0], run_torch(module, x).numpy(), rtol=1e-4, atol=1e-6)


class Named(nn.Module):
    """Takes named features, returns a dict, has a residual, a batch norm and a fixed argument."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(5, 5, batch_first=True)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, features: Tensor, flags: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = features * scale + flags.float().unsqueeze(-1)
        y = x + self.cell(x)[0]
        return {"smooth": self.norm(y.transpose(1, 2)).transpose(1, 2), "is_high": y[..., 0] > 0}


def test_names_of_arguments_and_results_become_names_of_tensors(tmp_path):
    torch.manual_seed(0)
    module = Named().eval()
    path = tmp_path / "model.onnx"
    example = {
        "features": torch.zeros(1, 5, 5),
        "flags": torch.zeros(1, 5, dtype=torch.bool),
        "scale": 3.0,
    }
    contract = export(module, example, path)
    assert [(s.name, s.datatype, list(s.shape)) for s in contract.inputs] == [
        ("features", "FP32", [5]),
        ("flags", "BOOL", []),
    ]
    assert [(s.name, s.datatype, list(s.shape)) for s in contract.outputs] == [
        ("smooth", "FP32", [5]),
        ("is_high", "BOOL", []),
    ]
    features, flags = torch.randn(2, 6, 5), torch.rand(2, 6) > 0.5
    expected = run_torch(module, features, flags, 3.0)
    assert_streams_as(
        path, [expected["smooth"], expected["is_high"]], [features.numpy(), flags.numpy()]
    )


def test_float64_is_exported_in_float32_and_said_so(tmp_path):
    torch.manual_seed(0)
    module = nn.LSTM(4, 5, batch_first=True).double()
    path = tmp_path / "model.onnx"
    with pytest.warns(UserWarning, match="float64"):
        contract = export(module, torch.zeros(1, 5, 4), path)
    assert contract.inputs[0].datatype == "FP32"
    x = torch.randn(2, 5, 4)
    expected = run_torch(module, x.double())[0].float()
    assert_streams_as(path, [expected], [x.numpy()])


def test_the_state_after_a_ragged_run_is_that_of_each_row_alone(lstm_file):
    model = Model.load(lstm_file.path)
    inputs = example_inputs(model.contract, 3, 7)
    lengths = np.array([7, 1, 4], np.int32)
    _, state = model.run(inputs, lengths, np.zeros((3, model.contract.state_size), np.float32))
    for row, length in enumerate(lengths):
        x = torch.from_numpy(inputs[0][row : row + 1, :length])
        _, (h, c) = run_torch(lstm_file.module.cell, x)
        expected = torch.cat([h[0, 0], c[0, 0], h[1, 0], c[1, 0]]).numpy()
        np.testing.assert_allclose(state[row], expected, rtol=1e-4, atol=1e-6)
    assert [part.name for part in model.contract.state] == [
        "cell.h.0",
        "cell.c.0",
        "cell.h.1",
        "cell.c.1",
    ]


@pytest.mark.parametrize("batch, steps", [(1, 1), (2, 1), (1, 30), (70, 2)])
def test_batch_and_time_are_dynamic_after_many_exports_in_one_process(
    gru_file, embedding_file, lstm_file, batch, steps
):
    for exported in (gru_file, embedding_file, lstm_file):
        session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
        contract: ModelContract = Model.load(exported.path).contract
        feed = {
            contract.inputs[0].name: example_inputs(contract, batch, steps)[0],
            "lengths": np.full(batch, steps, np.int32),
            "state": np.zeros((batch, contract.state_size), np.float32),
        }
        y, state = session.run(["y", "state_out"], feed)
        assert y.shape[:2] == (batch, steps)
        assert state.shape == (batch, contract.state_size)
