"""The models that other tests rely on are what they are said to be."""

import numpy as np
import pytest
import torch

from sluice_model import Model, example_inputs, run_self_test
from tests.models import run_offline

NAMES = ["lstm_file", "gru_file", "rnn_file", "embedding_file", "multi_file"]


def test_the_accumulator_gives_running_sums_of_ragged_rows_in_chunks(accumulator_file):
    model = Model.load(accumulator_file)
    x = np.arange(1, 13, dtype=np.float32).reshape(2, 6, 1)
    first, state = model.run([x[:, :4]], np.array([4, 3], np.int32), np.zeros((2, 1), np.float32))
    assert state[:, 0].tolist() == [10, 24]
    second, state = model.run([x[:, 4:]], np.array([2, 1], np.int32), state)
    assert first[0][0, :, 0].tolist() == [1, 3, 6, 10]
    assert first[0][1, :3, 0].tolist() == [7, 15, 24]
    assert second[0][0, :, 0].tolist() == [15, 21]
    assert second[0][1, 0, 0] == 35
    assert state[:, 0].tolist() == [21, 35]


def test_the_accumulator_gives_the_same_bits_for_any_floats_in_any_chunks(accumulator_file):
    assert run_self_test(Model.load(accumulator_file)).is_bit_exact


def test_the_stateless_model_has_no_state(stateless_file):
    model = Model.load(stateless_file)
    outputs, state = model.run(
        [np.zeros((3, 2, 2), np.float32)], np.full(3, 2, np.int32), np.empty((3, 0), np.float32)
    )
    assert outputs[0].tolist() == np.ones((3, 2, 2)).tolist()
    assert state.shape == (3, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_model_equals_its_module_and_itself_however_it_is_run(name, request):
    exported = request.getfixturevalue(name)
    model = Model.load(exported.path)
    assert run_self_test(model).is_bit_exact
    inputs = example_inputs(model.contract, 1, 9)
    names = [spec.name for spec in model.contract.inputs]
    offline = run_offline(exported.path, {n: a[0] for n, a in zip(names, inputs, strict=True)})
    with torch.no_grad():
        expected = exported.module(*map(torch.from_numpy, inputs))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, theirs in zip(offline, expected, strict=True):
        np.testing.assert_allclose(mine, theirs[0].numpy(), rtol=1e-4, atol=1e-5)
