"""Every form gives the same from its source, from the file alone, and from the served stream."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sluice_client import Client
from sluice_export import InputError, verify
from sluice_model import example_inputs, read_contract
from tests.client.server_process import ServerProcess
from tests.export.forms import FORMS, TorchForm
from tests.export.plain_onnxruntime import run_alone

# The first of them waits for the export of all.
pytestmark = pytest.mark.timeout(600)
NAMES = {title: f"form-{place}" for place, title in enumerate(FORMS)}
STEPS = 7
# One of each mechanism; test_foreign.py runs every ONNX file by hand.
EVERYDAY = {
    "LSTM and GRU, two inputs and outputs",
    "called with (h, c), time first",
    "a learned initial state",
    "nn.GRUCell and nn.RNNCell in a loop, called with h",
    "a head on the last h, beside every step",
    "causal convolutions alone",
    "LSTM with proj_size",
    "ONNX: a batch of 1 made variable (as DTLN)",
    "ONNX: tokens, one step a run (as an RNN-T predictor)",
}
assert FORMS.keys() >= EVERYDAY
TITLES = [pytest.param(one, marks=[pytest.mark.slow] * (one not in EVERYDAY)) for one in FORMS]


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory) -> dict[str, Path]:
    """Where each form that is tested in this session was exported to, as model.onnx."""
    tests = [item for item in request.session.items if item.path == request.path]
    made = {}
    for title in dict.fromkeys(item.callspec.params["title"] for item in tests):
        made[title] = tmp_path_factory.mktemp(NAMES[title])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FORMS[title].export(made[title])
    return made


@pytest.fixture(scope="module")
def server(folders) -> Iterator[ServerProcess]:
    process = ServerProcess({NAMES[title]: at / "model.onnx" for title, at in folders.items()})
    yield process
    process.stop()


@pytest.fixture(scope="module")
def client(server) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.mark.parametrize("title", TITLES)
def test_source_file_and_served_stream_agree(title, folders, client):
    form, folder, name = FORMS[title], folders[title], NAMES[title]
    contract = read_contract(folder / "model.onnx")
    drawn = example_inputs(contract, 2, STEPS, seed=2)
    cuts = [slice(0, 4), slice(4, 5), slice(5, STEPS)]
    given = [
        {spec.name: array[row] for spec, array in zip(contract.inputs, drawn, strict=True)}
        for row in range(2)
    ]
    for row, rows in enumerate(given):
        with client.sequence(name, f"{name}-{row}") as sequence:
            streamed = [
                sequence.step({key: array[cut] for key, array in rows.items()}) for cut in cuts
            ]
        expected = form.run(folder, rows)
        alone = run_alone(folder / "model.onnx", rows)
        assert expected.keys() == alone.keys() == {spec.name for spec in contract.outputs}
        for key, array in expected.items():
            served = np.concatenate(
                [piece[key] if isinstance(piece, dict) else piece for piece in streamed]
            )
            is_exact = all(p.passed for p in contract.proofs if p.name.startswith("bits"))
            assert_same(served, alone[key], is_exact=is_exact)
            assert_same(served, array, is_exact=form.is_exact)


@pytest.mark.parametrize(
    "title", ["a head on the last h, beside every step", "causal convolutions alone"]
)
def test_a_file_is_verified_against_its_module_and_no_other(title, folders):
    form, path = FORMS[title], folders[title] / "model.onnx"
    assert isinstance(form, TorchForm)
    module = form.module()
    assert all(proof.passed for proof in verify(path, module, form.example))
    with torch.no_grad():
        next(module.parameters()).add_(0.1)
    failed = {proof.name for proof in verify(path, module, form.example) if not proof.passed}
    assert {"parity.whole", "parity.stepwise"} <= failed
    other = FORMS["one layer called twice"]
    assert isinstance(other, TorchForm)
    with pytest.raises(
        InputError, match=r"the module's states are \['again\[0\].h.0'.*not the same"
    ):
        verify(path, other.module(), other.example)
    with pytest.raises(InputError, match=r"the module takes .* not the same model"):
        verify(path, nn.GRU(3, 4, batch_first=True), torch.zeros(1, 5, 3))


def assert_same(one: np.ndarray, two: np.ndarray, *, is_exact: bool) -> None:
    if is_exact:
        assert np.array_equal(one, two)
    else:
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
