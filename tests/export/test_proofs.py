"""Each proof refuses a file with the defect that it is there for."""

import pytest
import torch
from torch import Tensor, nn

from sluice_export import ExportNotice, ParityError, TraceError, export
from sluice_export.proof.sizes import measure_minimums
from sluice_export.torch import layers, native_layers
from sluice_model import Model
from tests.export.torch_models import ConvolutionsOnly, LastStep, Projected
from tests.models import gru_module, lstm_module, rnn_module
from tests.sized import less, sizes_model

X = torch.zeros(1, 5, 8)


def test_gates_in_the_wrong_order_are_refused_and_the_layer_named(tmp_path, monkeypatch):
    monkeypatch.setattr(native_layers, "reorder_gates", lambda weight, kind: weight)
    for module in (lstm_module(), gru_module()):
        with pytest.raises(ParityError, match=r"parity.whole failed.*largest in cell.[hc].[01]"):
            export(module, X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_reset_gate_applied_before_the_bias_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(layers.GRU.attributes, "linear_before_reset", 0)
    with pytest.raises(ParityError, match=r"parity.whole failed"):
        export(gru_module(), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lstm_module, gru_module, rnn_module])
def test_a_lost_bias_is_refused(tmp_path, monkeypatch, make):
    reorder = layers.reorder_gates

    def lose_bias(weight: Tensor, kind: layers.CellKind) -> Tensor:
        return reorder(weight, kind) * (weight.dim() > 1)

    monkeypatch.setattr(native_layers, "reorder_gates", lose_bias)
    with pytest.raises(ParityError, match=r"parity.whole failed"):
        export(make(), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_lost_between_chunks_is_refused(tmp_path, monkeypatch):
    def forget(self: native_layers.NativeLayer, *arguments: object) -> object:
        exchange = self._exchange[0]
        exchange.before = {name: part * 0 for name, part in exchange.before.items()}
        return forward(self, *arguments)

    forward = native_layers.NativeLayer.forward
    monkeypatch.setattr(native_layers.NativeLayer, "forward", forget)
    with pytest.raises(ParityError, match=r"parity.stepwise failed"):
        export(gru_module(), X, tmp_path / "model.onnx")


def test_swapped_h_and_c_are_refused(tmp_path, monkeypatch):
    def swap(self: native_layers.NativeLayer, *arguments: object) -> object:
        before = self._exchange[0].before
        self._exchange[0].before = {
            name: before[name.replace(".h.", ".?.").replace(".c.", ".h.").replace(".?.", ".c.")]
            for name in before
        }
        return forward(self, *arguments)

    forward = native_layers.NativeLayer.forward
    monkeypatch.setattr(native_layers.NativeLayer, "forward", swap)
    with pytest.raises(ParityError, match=r"parity.stepwise failed"):
        export(lstm_module(), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_time_axis_that_is_frozen_is_refused(tmp_path, monkeypatch):
    def freeze(*arguments, dynamic_shapes, **options):
        fixed = [tuple({0: axes[0]} for axes in dynamic_shapes[0]), *dynamic_shapes[1:]]
        return trace(*arguments, dynamic_shapes=tuple(fixed), **options)

    trace = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", freeze)
    with pytest.raises(TraceError, match="froze an axis of 'x'"):
        export(gru_module(), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_are_ignored_are_refused(tmp_path, monkeypatch):
    def ignore(self: native_layers.NativeLayer, sequence: Tensor, *rest: object) -> object:
        exchange = self._exchange[0]
        steps = sequence.shape[1]
        exchange.lengths = (exchange.lengths * 0 + steps).to(torch.int32)
        return forward(self, sequence, *rest)

    forward = native_layers.NativeLayer.forward
    monkeypatch.setattr(native_layers.NativeLayer, "forward", ignore)
    with pytest.raises(ParityError, match=r"parity.ragged failed.*largest in cell.h.0"):
        export(gru_module(), X, tmp_path / "model.onnx")


def test_a_head_that_reads_the_last_step_of_the_batch_is_refused(tmp_path, monkeypatch):
    """As y[:, -1] reads the padding of shorter rows."""
    fold = native_layers._merge_axes
    monkeypatch.setattr(
        native_layers, "_merge_axes", lambda steps: fold(steps[-1:].expand_as(steps))
    )
    with pytest.raises(ParityError, match=r"parity.whole failed.*largest in y"):
        export(LastStep(), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_is_taken_from_the_padding_is_refused(tmp_path, monkeypatch):
    def ignore(self: native_layers.NativeConvolution, steps: Tensor) -> Tensor:
        exchange = self._exchange[0]
        assert exchange.merged is not None
        exchange.lengths = (exchange.lengths * 0 + exchange.merged[1]).to(torch.int32)
        return forward(self, steps)

    forward = native_layers.NativeConvolution.forward
    monkeypatch.setattr(native_layers.NativeConvolution, "forward", ignore)
    with pytest.raises(ParityError, match=r"parity\.\w+ failed.*largest in \w+.context"):
        export(ConvolutionsOnly(), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_projection_that_is_lost_is_refused(tmp_path, monkeypatch):
    def lose(self: native_layers.NativeLayer, *arguments: object) -> None:
        take(self, *arguments)
        self.r0 = nn.Parameter(self.r0 * 0)

    take = native_layers.NativeLayer._take_weights
    monkeypatch.setattr(native_layers.NativeLayer, "_take_weights", lose)
    with pytest.raises(ParityError, match=r"parity.whole failed"):
        export(Projected(), X, tmp_path / "model.onnx")


class Touches(nn.Module):
    """Computes what its layer does, but lets NaN spread along an axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 4, batch_first=True)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x)[0]
        return y + torch.clamp(x.sum(self.axis, keepdim=True)[..., :1], 0, 0)


def test_nan_that_reaches_other_rows_is_refused(tmp_path):
    with pytest.raises(ParityError, match=r"leak.rows failed"):
        export(Touches(axis=0), X, tmp_path / "model.onnx")


def test_nan_that_comes_out_of_the_padding_is_refused(tmp_path):
    with pytest.raises(ParityError, match=r"leak.padding failed"):
        export(Touches(axis=1), X, tmp_path / "model.onnx")


def test_a_refused_export_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was there")
    monkeypatch.setattr(native_layers, "reorder_gates", lambda weight, kind: weight)
    with pytest.raises(ParityError):
        export(gru_module(), X, path)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_a_smaller_tolerance_than_arithmetic_allows_is_refused(tmp_path):
    with pytest.raises(ParityError, match=r"at most 1e-12 is allowed"):
        export(lstm_module(), X, tmp_path / "model.onnx", tolerance=1e-12)


@pytest.mark.parametrize(
    "condition, expected",
    [
        (less("batch", 1), (1, 1)),
        (less("batch", 2), (2, 1)),
        (less("batch", 3), (3, 1)),
        (less("steps", 3), (1, 3)),
    ],
)
def test_the_smallest_exact_batch_and_length_are_measured(condition, expected):
    batch_min, length_min, proof = measure_minimums(sizes_model(condition), [])
    assert (batch_min, length_min) == expected
    assert proof.passed


def test_bits_that_depend_on_every_batch_are_not_called_exact():
    batch_min, length_min, proof = measure_minimums(sizes_model(less("batch", 30)), [])
    assert (batch_min, length_min) == (1, 1)
    assert not proof.passed
    assert proof.figure > 0


def test_a_lone_row_of_an_rnn_is_never_called_exact_even_where_a_sample_agrees():
    model = sizes_model(less("batch", 1))
    model.contract.cells.add(kind="RNN_RELU")
    batch_min, _, proof = measure_minimums(model, [])
    assert batch_min == 2
    assert proof.passed


def test_an_rnn_is_padded_to_a_batch_of_two(rnn_file):
    contract = Model.load(rnn_file.path).contract
    assert (contract.batch_min, contract.length_min) == (2, 1)


class DependsOnBatch(nn.Module):
    """Rounds otherwise in other batches, within the tolerance."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0] + x.shape[0] * 1e-7


def test_bits_that_are_not_exact_are_noticed_and_written_into_the_contract(tmp_path):
    torch.manual_seed(0)
    with pytest.warns(ExportNotice) as notices:
        contract = export(DependsOnBatch(), X, tmp_path / "model.onnx")
    assert [str(notice.message).split(":")[0] for notice in notices] == [
        "bits.ragged does not hold",
        "bits.sizes does not hold",
    ]
    assert [proof.name for proof in contract.proofs if not proof.passed] == [
        "bits.ragged",
        "bits.sizes",
    ]
