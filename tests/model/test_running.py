"""Running a model is a pure function of inputs, lengths and state."""

import hashlib
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice_model import Model, RunError, example_inputs, read_contract, run_self_test
from tests.models import run_offline


@pytest.fixture(scope="module", params=["lstm_file", "gru_file", "multi_file"])
def model(request):
    return Model.load(request.getfixturevalue(request.param).path)


def initial(model, batch):
    return np.tile(model.initial_state, (batch, 1))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_of_any_ragged_batch_equals_each_sequence_alone(model, data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    inputs = example_inputs(model.contract, len(lengths), max(lengths), seed=len(lengths))
    state = initial(model, len(lengths))
    done = np.zeros(len(lengths), int)
    got = [[] for _ in lengths]
    while (done < lengths).any():
        # Whoever still has steps may take part, each with a chunk of its own length.
        alive = [row for row in range(len(lengths)) if done[row] < lengths[row]]
        rows = data.draw(st.lists(st.sampled_from(alive), min_size=1, unique=True))
        chunk = np.array(
            [data.draw(st.integers(1, int(lengths[row] - done[row]))) for row in rows], np.int32
        )
        padded = [np.zeros((len(rows), chunk.max(), *a.shape[2:]), a.dtype) for a in inputs]
        for place, (row, size) in enumerate(zip(rows, chunk, strict=True)):
            for target, source in zip(padded, inputs, strict=True):
                target[place, :size] = source[row, done[row] : done[row] + size]
        outputs, state[rows] = model.run(padded, chunk, state[rows])
        for place, (row, size) in enumerate(zip(rows, chunk, strict=True)):
            got[row].append([array[place, :size] for array in outputs])
            done[row] += size
    for row, length in enumerate(lengths):
        alone, after = model.run(
            [array[row : row + 1, :length] for array in inputs],
            np.array([length], np.int32),
            initial(model, 1),
        )
        for place, array in enumerate(alone):
            pieces = np.concatenate([outputs[place] for outputs in got[row]])
            assert np.array_equal(pieces, array[0])
        assert np.array_equal(after[0], state[row])


def test_a_run_changes_nothing_it_was_given(model):
    inputs = example_inputs(model.contract, 2, 3)
    state = initial(model, 2) + 0.5
    copies = [array.copy() for array in inputs], state.copy()
    model.run(inputs, np.array([3, 1], np.int32), state)
    assert all(map(np.array_equal, inputs, copies[0]))
    assert np.array_equal(state, copies[1])


@pytest.mark.parametrize("lengths", [[0, 3], [3, 4], [-1, 2]])
def test_lengths_that_onnxruntime_does_not_survive_are_refused(model, lengths):
    inputs = example_inputs(model.contract, 2, 3)
    with pytest.raises(RunError, match="rows of 1 to 3 steps"):
        model.run(inputs, np.array(lengths, np.int32), initial(model, 2))


def test_a_batch_of_nobody_is_refused(model):
    inputs = [array[:0] for array in example_inputs(model.contract, 1, 3)]
    with pytest.raises(RunError):
        model.run(inputs, np.array([], np.int32), initial(model, 0))


def test_what_onnxruntime_refuses_is_a_run_error(lstm_file):
    model = Model.load(lstm_file.path)
    with pytest.raises(RunError, match="lstm: the run failed"):
        model.run([np.zeros((1, 2, 9), np.float32)], np.array([2], np.int32), initial(model, 1))


def test_a_token_beyond_the_table_is_a_run_error(embedding_file):
    model = Model.load(embedding_file.path)
    with pytest.raises(RunError, match="the run failed"):
        model.run([np.full((1, 2), 32)], np.array([2], np.int32), initial(model, 1))


def test_a_lone_row_of_an_rnn_has_the_bits_it_has_in_company(rnn_file):
    model = Model.load(rnn_file.path)
    inputs = example_inputs(model.contract, 5, 7)
    lengths = np.full(5, 7, np.int32)
    together, state = model.run(inputs, lengths, initial(model, 5))
    for row in range(5):
        alone, after = model.run([inputs[0][row : row + 1]], lengths[:1], initial(model, 1))
        assert alone[0].shape == (1, 7, 4)
        assert np.array_equal(alone[0][0], together[0][row])
        assert np.array_equal(after[0], state[row])


def test_a_model_padded_to_its_smallest_length_gives_only_what_was_asked(accumulator_file):
    contract = read_contract(accumulator_file)
    contract.batch_min, contract.length_min = 3, 4
    model = Model(accumulator_file.read_bytes(), contract)
    outputs, state = model.run(
        [np.ones((2, 2, 1), np.float32)], np.array([2, 1], np.int32), np.zeros((2, 1), np.float32)
    )
    assert outputs[0].shape == (2, 2, 1)
    assert outputs[0][0, :, 0].tolist() == [1, 2]
    assert state[:, 0].tolist() == [2, 1]


def test_threads_may_share_a_model(lstm_file):
    model = Model.load(lstm_file.path)
    inputs = example_inputs(model.contract, 4, 20)
    lengths = np.full(4, 20, np.int32)
    expected, _ = model.run(inputs, lengths, initial(model, 4))
    wrong = []

    def work():
        for _ in range(20):
            outputs, _ = model.run(inputs, lengths, initial(model, 4))
            if not np.array_equal(outputs[0], expected[0]):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_gives_the_bits_of_a_plain_run_of_its_file(lstm_file):
    model = Model.load(lstm_file.path)
    x = example_inputs(model.contract, 3, 12)[0]
    outputs, _ = model.run([x], np.full(3, 12, np.int32), initial(model, 3))
    for row in range(3):
        assert np.array_equal(outputs[0][row], run_offline(lstm_file.path, {"x": x[row]})[0])


def test_examples_are_valid_and_drawn_from_their_seed(multi_file):
    contract = Model.load(multi_file.path).contract
    features, tokens = example_inputs(contract, 50, 40, seed=3)
    assert features.shape == (50, 40, 6) and features.dtype == np.float32
    assert tokens.shape == (50, 40) and tokens.dtype == np.int64
    assert set(np.unique(tokens)) == set(range(10))
    again = example_inputs(contract, 50, 40, seed=3)
    assert np.array_equal(features, again[0]) and np.array_equal(tokens, again[1])
    assert not np.array_equal(features, example_inputs(contract, 50, 40, seed=4)[0])


def test_the_self_test_hashes_outputs_and_state(lstm_file, gru_file):
    one, two = (run_self_test(Model.load(file.path)) for file in (lstm_file, gru_file))
    assert one.is_bit_exact and two.is_bit_exact
    assert one.arithmetic != two.arithmetic
    assert one == run_self_test(Model.load(lstm_file.path))
    assert len(one.arithmetic) == len(hashlib.sha256().hexdigest())


def test_the_self_test_finds_bits_that_depend_on_the_batch(rnn_file):
    contract = read_contract(rnn_file.path)
    contract.batch_min = 1
    assert not run_self_test(Model(rnn_file.path.read_bytes(), contract)).is_bit_exact


def test_more_threads_give_the_same_bits(lstm_file):
    one, four = (run_self_test(Model.load(lstm_file.path, threads=n)) for n in (1, 4))
    assert one == four


@pytest.mark.parametrize("batch_max", [1, 2, 3])
def test_a_batch_beyond_the_largest_runs_in_pieces_with_the_same_bits(lstm_file, batch_max):
    whole = Model.load(lstm_file.path)
    contract = read_contract(lstm_file.path)
    contract.batch_max = batch_max
    pieces = Model(lstm_file.path.read_bytes(), contract)
    inputs, lengths = example_inputs(contract, 5, 6), np.array([6, 1, 3, 6, 2], np.int32)
    one, first = whole.run(inputs, lengths, initial(whole, 5))
    two, second = pieces.run(inputs, lengths, initial(whole, 5))
    assert np.array_equal(first, second)
    for row, length in enumerate(lengths):
        assert np.array_equal(one[0][row, :length], two[0][row, :length])
