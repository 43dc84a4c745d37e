"""The offline run of a whole sequence is the reference, whatever the file is like."""

import numpy as np
import pytest

from sluice_cli.reference import OfflineError, run_offline
from sluice_export import export_onnx
from sluice_model import Model, example_inputs
from tests.export.foreign_cases import CASES, drive


def named(contract, inputs, row):
    """The inputs of one row, by name."""
    return {spec.name: array[row] for spec, array in zip(contract.inputs, inputs, strict=True)}


def compare_with_batch(path):
    """One row at a time offline, and all of them in one run of the model."""
    model = Model.load(path)
    inputs = example_inputs(model.contract, 5, 6)
    together, _ = model.run(inputs, None, np.tile(model.initial_state, (5, 1)))
    offline = run_offline(path, [named(model.contract, inputs, row) for row in range(5)])
    for row, outputs in enumerate(offline):
        for spec, array in zip(model.contract.outputs, together, strict=True):
            assert np.array_equal(outputs[spec.name], array[row])


@pytest.mark.parametrize("name", ["lstm_file", "rnn_file", "multi_file"])
def test_a_sequence_alone_has_the_bits_of_one_in_a_batch(name, request):
    compare_with_batch(request.getfixturevalue(name).path)


def test_a_model_without_state_or_lengths_is_run(stateless_file):
    compare_with_batch(stateless_file)


# One has steps without a time axis and a state called state, one its time axis last, one a
# state that does not begin with zeros.
@pytest.mark.parametrize("name", ["voice", "convolution", "constant"])
def test_a_file_of_others_is_run_as_it_would_be_by_hand(name, tmp_path):
    case = CASES[name]
    source = case.write(tmp_path / "source.onnx")
    contract = export_onnx(source, tmp_path / "served.onnx", **case.options)
    given = named(contract, example_inputs(contract, 1, 6), 0)
    (outputs,) = run_offline(tmp_path / "served.onnx", [given])
    by_hand = drive(source, case, given)
    for spec in contract.outputs:
        if case.is_exact:
            assert np.array_equal(outputs[spec.name], by_hand[spec.name])
        else:
            np.testing.assert_allclose(outputs[spec.name], by_hand[spec.name], rtol=1e-4, atol=1e-5)


def test_inputs_that_are_not_the_files_are_named(stateless_file):
    with pytest.raises(OfflineError, match=r"the model takes \['x'\], not \['z'\]"):
        run_offline(stateless_file, [{"z": np.zeros((1, 2), np.float32)}])


def test_a_file_without_contract_is_told_so(tmp_path):
    source = CASES["constant"].write(tmp_path / "source.onnx")
    with pytest.raises(OfflineError, match="has no contract; give the file that is served"):
        run_offline(source, [{"x": np.zeros((1, 2), np.float32)}])
