"""What an argument is for, and what a result is, follows from numbers; a doubt is never hidden."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sluice_export import ExportNotice, InputError, LayerError, export
from sluice_export.torch.example_inputs import guess_inputs
from sluice_model import Model
from sluice_protos.contract_pb2 import ModelContract

X = torch.zeros(1, 5, 4)
H = torch.zeros(1, 1, 6)


class Carries(nn.Module):
    """Takes a state and returns what a test makes of it."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 6, batch_first=True)
        self.after = after

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.cell(x, h)
        return y, self.after(h)


class SharesState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.GRU(4, 6, batch_first=True)
        self.upper = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.lower(x, h)
        return self.upper(y, h)


class StacksState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.cell(x, tuple(state))
        return y, torch.stack(state)


class Returns(nn.Module):
    """Returns, beside every step, what a test makes of the steps and the last state."""

    def __init__(self, make: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.cell = nn.RNN(4, 6, batch_first=True, nonlinearity="relu")
        self.make = make

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        y, h = self.cell(x)
        return y, self.make(y, h)


def names_of(contract: ModelContract) -> list[str]:
    return [spec.name for spec in contract.outputs]


def test_a_state_that_is_changed_before_it_is_returned_is_refused(tmp_path):
    with pytest.raises(LayerError, match=r"takes 'h' as a state.*return the state as the layer"):
        export(Carries(lambda h: h * 0.5), (X, H), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_two_layers_start_from_is_refused(tmp_path):
    message = "'h' reaches both the h of lower and the h of upper.*a state of its own"
    with pytest.raises(LayerError, match=message):
        export(SharesState(), (X, H), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "module, state",
    [(Carries(lambda h: h), H), (StacksState(), torch.zeros(2, 1, 1, 6))],
    ids=["alone", "stacked"],
)
def test_a_state_that_is_returned_as_it_is_is_no_output(tmp_path, module, state):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExportNotice)
        contract = export(module, (X, state), tmp_path / "model.onnx")
    assert names_of(contract) == ["y"]


MADE = {
    "the last step": lambda y, h: y[:, -1],
    "a truth of the state": lambda y, h: h[-1] > 0,
    "integers that are all zero, as some of a relu's states": lambda y, h: (
        h[-1].sum(-1) > 1e9
    ).long(),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_what_only_has_the_numbers_of_a_state_stays_an_output(tmp_path, make):
    torch.manual_seed(0)
    module = Returns(make)
    contract = export(module, X, tmp_path / "model.onnx")
    assert names_of(contract) == ["y_0", "y_1"]
    model = Model.load(tmp_path / "model.onnx")
    x = torch.randn(1, 3, 4)
    outputs, _ = model.run([x.numpy()], None, model.initial_state[None])
    with torch.no_grad():
        expected = module(x)[1]
    np.testing.assert_allclose(outputs[1][:, -1], expected.numpy(), rtol=1e-4, atol=1e-5)


class StacksCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.cell(x)
        return y, torch.stack(state)


def test_states_that_are_put_together_and_left_out_are_told(tmp_path):
    with pytest.warns(ExportNotice, match="result 1 of forward is made of states"):
        contract = export(StacksCells(), X, tmp_path / "model.onnx")
    assert names_of(contract) == ["y"]


class Tables(nn.Module):
    """Looks up what a test makes of its integers in tables of the sizes it is given."""

    def __init__(self, sizes: list[int], take: Callable[[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 4) for size in sizes)
        self.cell = nn.GRU(4, 4, batch_first=True)
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.tables, self.take(x), strict=True)
        return self.cell(sum(table(indices) for table, indices in pairs))[0]


UNKNOWN = {
    "two sizes": ([10, 1000], lambda x: [x[..., 0], x[..., 1]], (1, 5, 2)),
    "modulo": ([10], lambda x: [x % 10], (1, 5)),
    "one column": ([10], lambda x: [x[..., 0]], (1, 5, 2)),
}


@pytest.mark.parametrize("sizes, take, shape", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_range_that_no_table_tells_is_asked_for(tmp_path, sizes, take, shape):
    example = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(InputError, match="range is unknown; name it: valid="):
        export(Tables(sizes, take), example, tmp_path / "model.onnx")


def test_columns_that_go_into_tables_of_one_size_have_its_range(tmp_path):
    module = Tables([10, 10], lambda x: [x[..., 0], x[..., 1]])
    example = torch.zeros(1, 5, 2, dtype=torch.int64)
    contract = export(module, example, tmp_path / "model.onnx")
    assert (contract.inputs[0].valid.min, contract.inputs[0].valid.max) == (0, 9)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Embedding(10, 4), nn.Embedding(1000, 4)
        self.cell = nn.GRU(4, 4, batch_first=True)

    def forward(self, few: Tensor, many: Tensor) -> Tensor:
        return self.cell(self.few(few.long()) + self.many(many.long()))[0]


def test_inputs_that_are_zero_in_the_example_keep_the_ranges_of_their_own_tables(tmp_path):
    example = torch.zeros(1, 5, dtype=torch.int32)
    contract = export(TwoInputs(), (example, example.clone()), tmp_path / "model.onnx")
    assert [spec.valid.max for spec in contract.inputs] == [9, 999]


class TakesBatch(nn.Module):
    def __init__(self, read: Callable[[object], Tensor]) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 4, batch_first=True)
        self.read = read

    def forward(self, batch: object) -> Tensor:
        return self.cell(self.read(batch))[0]


@pytest.mark.parametrize(
    "read", [lambda batch: batch.features, lambda batch: {}["features"]], ids=["field", "key"]
)
def test_a_forward_that_takes_no_tensor_is_refused_with_the_fix(tmp_path, read):
    with pytest.raises(InputError, match="describe each argument, in order"):
        guess_inputs(TakesBatch(read))
    with pytest.raises(InputError, match="forward failed on the example inputs"):
        export(TakesBatch(read), X, tmp_path / "model.onnx")
