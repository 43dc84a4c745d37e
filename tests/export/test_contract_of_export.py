"""The contract that an export writes says what the file is, and nothing of the machine."""

import copy
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from sluice_export import ExportNotice, export
from sluice_model import read_contract
from tests.models import gru_module, lstm_module

PROOFS = [
    "parity.whole",
    "parity.stepwise",
    "parity.chunked",
    "parity.ragged",
    "leak.rows",
    "leak.padding",
    "bits.chunks",
    "bits.ragged",
    "drift.long",
    "bits.sizes",
]


def test_cells_gates_and_state_parts_are_told(multi_file):
    contract = read_contract(multi_file.path)
    cells = [
        (c.name, c.kind, c.layers, c.input_size, c.hidden_size, "".join(c.gates))
        for c in contract.cells
    ]
    assert cells == [("lstm", "LSTM", 1, 10, 12, "iofc"), ("gru", "GRU", 1, 12, 8, "zrh")]
    parts = [(p.name, p.offset, list(p.shape), list(p.initial)) for p in contract.state]
    assert parts == [
        ("lstm.h.0", 0, [12], []),
        ("lstm.c.0", 12, [12], []),
        ("gru.h.0", 24, [8], []),
    ]
    assert contract.state_size == 32
    assert contract.name == "multi"
    assert contract.lengths_input == "lengths"


def test_inputs_and_outputs_are_told_with_type_shape_and_range(multi_file):
    contract = read_contract(multi_file.path)
    features, tokens = contract.inputs
    assert (features.name, features.datatype, list(features.shape)) == ("features", "FP32", [6])
    assert not features.HasField("valid")
    assert (tokens.name, tokens.datatype, list(tokens.shape)) == ("tokens", "INT64", [])
    assert (tokens.valid.min, tokens.valid.max) == (0, 9)
    scores, choice = contract.outputs
    assert (scores.name, scores.datatype, list(scores.shape)) == ("scores", "FP32", [5])
    assert (choice.name, choice.datatype, list(choice.shape)) == ("choice", "INT64", [])


def test_every_proof_is_told_with_its_figure(lstm_file):
    contract = read_contract(lstm_file.path)
    assert [proof.name for proof in contract.proofs] == PROOFS
    for proof in contract.proofs:
        assert proof.passed and proof.detail
        is_parity = proof.name.startswith(("parity", "drift"))
        assert (0 < proof.figure < proof.tolerance) if is_parity else proof.figure == 0
        assert (proof.ulps > 0) == is_parity
    assert set(contract.made_with) == {
        "sluice-serving",
        "torch",
        "onnx",
        "onnxscript",
        "onnxruntime",
    }


def test_the_file_is_one_valid_file_without_paths_of_this_machine(lstm_file):
    onnx.checker.check_model(str(lstm_file.path), full_check=True)
    content = lstm_file.path.read_bytes()
    for folder in {Path(__file__).parents[2], Path(sys.prefix), Path(torch.__file__).parent}:
        assert str(folder).encode() not in content


def test_two_exports_of_one_module_have_one_digest(tmp_path):
    module = gru_module()
    first = export(module, torch.zeros(1, 5, 8), tmp_path / "a.onnx")
    second = export(module, torch.zeros(3, 9, 8), tmp_path / "b.onnx")
    assert first.digest == second.digest
    assert (first.name, second.name) == ("a", "b")


def test_other_weights_have_another_digest(lstm_file, tmp_path):
    module = copy.deepcopy(lstm_file.module)
    with torch.no_grad():
        module.head.bias[0] += 1e-3
    contract = export(module, torch.zeros(1, 5, 8), tmp_path / "model.onnx")
    assert contract.digest != read_contract(lstm_file.path).digest


def test_the_module_is_left_as_it_was(tmp_path):
    module = lstm_module().train()
    before = copy.deepcopy(module.state_dict())
    layer = module.cell
    export(module, torch.zeros(1, 5, 8), tmp_path / "model.onnx")
    assert module.training and module.cell is layer and layer.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_an_export_prints_nothing_and_tells_its_progress(tmp_path, capfd):
    told: list[tuple[str, float]] = []
    export(
        gru_module(),
        torch.zeros(1, 5, 8),
        tmp_path / "model.onnx",
        on_progress=lambda what, share: told.append((what, share)),
    )
    assert capfd.readouterr() == ("", "")
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert all(what for what, _ in told)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


def test_a_module_in_training_mode_is_exported_without_dropout_and_told_so(tmp_path):
    with pytest.warns(ExportNotice, match="dropout off, also between recurrent layers") as notices:
        export(WithDropout().train(), torch.zeros(1, 5, 4), tmp_path / "model.onnx")
    assert {notice.filename for notice in notices} == {__file__}
