"""What a contract says about bits holds at the sizes that a server runs."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sluice_export import export
from sluice_export.proof.sizes import measure_minimums
from sluice_model import Model, example_inputs
from tests.export.plain_onnxruntime import run_alone
from tests.sized import at_least, less, sizes_model


class WideConvolution(nn.Module):
    """A causal convolution that adds 320 products for each value, and a GRU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(64, 8, 5)
        self.gru = nn.GRU(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.conv(functional.pad(x.mT, (4, 0))).mT)[0]


def test_a_wide_convolution_has_the_same_bits_in_chunks_of_any_length(tmp_path):
    """ONNX Runtime's own convolution adds in another order from some length on."""
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    contract = export(WideConvolution(), torch.zeros(1, 5, 64), path)
    assert (contract.batch_min, contract.length_min) == (1, 1)
    model = Model.load(path)
    x = example_inputs(model.contract, 1, 160, seed=1)[0]
    whole = run_alone(path, {"x": x[0]})["y"]
    for chunk in (1, 2, 33, 64, 128):
        state, pieces = model.initial_state[np.newaxis], []
        for start in range(0, 160, chunk):
            outputs, state = model.run([x[:, start : start + chunk]], None, state)
            pieces.append(outputs[0][0])
        assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("condition", [at_least("batch", 1000), at_least("steps", 60)])
def test_bits_that_change_in_the_largest_runs_of_a_server_are_not_called_exact(condition):
    _, _, proof = measure_minimums(sizes_model(condition), [])
    assert not proof.passed


def test_the_proof_says_up_to_which_sizes_it_holds():
    model = sizes_model(less("batch", 1))
    _, _, proof = measure_minimums(model, [])
    assert proof.passed
    assert proof.detail.endswith("runs of 1 to 1024 rows and 1 to 64 steps")
    model.contract.outputs[0].shape[:] = [2**15]
    _, _, proof = measure_minimums(model, [])
    assert "1 to 257 rows and 1 to 64 steps, the largest of 771 steps in all" in proof.detail
