"""The self-test at load reaches the sizes at which a server runs."""

import pytest

from sluice_model import run_self_test
from tests.sized import at_least, less, sizes_model


@pytest.mark.parametrize("condition", [at_least("batch", 1000), at_least("steps", 60)])
def test_values_that_change_in_large_runs_alone_are_found(condition):
    found = run_self_test(sizes_model(condition))
    assert not found.is_bit_exact


def test_a_server_that_rounds_large_runs_another_way_has_another_hash():
    same = run_self_test(sizes_model(less("batch", 1)))
    other = run_self_test(sizes_model(at_least("batch", 1000)))
    assert same.is_bit_exact
    assert other.arithmetic != same.arithmetic


def test_a_model_of_few_rows_a_run_is_tested_with_no_more():
    model = sizes_model(less("batch", 1))
    model.contract.batch_max = 3
    assert run_self_test(model).is_bit_exact


def test_a_model_of_large_inputs_is_tested_with_few_rows_and_steps():
    model = sizes_model(less("batch", 1))
    model.contract.outputs[0].shape[:] = [2**21]
    assert model.affordable_cells(2**28, at_least=1021) == 15
    assert run_self_test(model).is_bit_exact


def test_a_model_whose_export_did_not_prove_its_bits_is_not_called_exact():
    """Where so few values differ that a sample may miss them, the contract knows better."""
    model = sizes_model(less("batch", 1))
    model.contract.proofs.add(name="bits.sizes", passed=False)
    assert not run_self_test(model).is_bit_exact
