"""ONNX files made by others give, served, the bits they give when they are run by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from sluice_export import export_onnx
from sluice_model import Model, example_inputs
from tests.export import foreign_models as made
from tests.export.foreign_cases import CASES, drive


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    served = {}
    for name, case in CASES.items():
        source = case.write(folder / f"{name}.onnx")
        served[name] = folder / f"{name}.served.onnx"
        export_onnx(source, served[name], **case.options)
    return served


@pytest.mark.parametrize("name", CASES)
def test_ragged_chunks_in_one_run_give_what_the_file_gives_by_hand(name, files):
    case, model = CASES[name], Model.load(files[name])
    contract = model.contract
    assert contract.batch_max == case.batch_max
    assert bool(contract.lengths_input) == case.has_lengths
    assert contract.is_one_step == all(time is None for _, time in case.axes.values())
    lengths = np.array([5, 2, 5, 1, 3], np.int32)
    inputs = example_inputs(contract, len(lengths), 9)
    state = np.tile(model.initial_state, (len(lengths), 1))
    first, state = model.run([array[:, :5] for array in inputs], lengths, state)
    rest = np.array([4, 1, 2, 3, 4], np.int32)
    tail = [
        np.stack([row[at : at + 4] for row, at in zip(array, lengths, strict=True)])
        for array in inputs
    ]
    second, _ = model.run(tail, rest, state)
    source = files[name].with_name(f"{name}.onnx")
    for row in range(len(lengths)):
        total = lengths[row] + rest[row]
        given = {
            spec.name: array[row, :total]
            for spec, array in zip(contract.inputs, inputs, strict=True)
        }
        by_hand = drive(source, case, given)
        for spec, one, two in zip(contract.outputs, first, second, strict=True):
            streamed = np.concatenate([one[row, : lengths[row]], two[row, : rest[row]]])
            if case.is_exact:
                assert np.array_equal(streamed, by_hand[spec.name])
            else:
                np.testing.assert_allclose(streamed, by_hand[spec.name], rtol=1e-4, atol=1e-5)


def test_a_state_is_found_by_structure_where_names_and_shapes_say_nothing(files):
    """Input and output of the mask model have one shape, as have its state's two."""
    contract = Model.load(files["mask"]).contract
    assert [spec.name for spec in contract.inputs] == ["input_2"]
    assert [(part.name, list(part.shape)) for part in contract.state] == [("input_3", [2, 128, 2])]


def test_every_proof_of_a_foreign_file_is_against_the_file_as_it_was(files):
    for proof in Model.load(files["voice"]).contract.proofs:
        assert proof.passed and proof.figure == 0
        if proof.name.startswith("parity"):
            assert "against the file as it was" in proof.detail


def test_the_range_of_tokens_is_that_of_the_table(files):
    (spec,) = Model.load(files["predictor"]).contract.inputs
    assert (spec.valid.min, spec.valid.max) == (0, 39)


def test_an_operator_with_the_batch_first_gives_what_the_reference_gives(tmp_path):
    """ONNX Runtime does not run layout=1; onnx's own evaluator does."""
    source = made.write_batch_first(tmp_path / "model.onnx")
    contract = export_onnx(source, tmp_path / "served.onnx")
    assert [(part.name, list(part.shape)) for part in contract.state] == [
        ("h", [1, 8]),
        ("c", [1, 8]),
    ]
    model = Model.load(tmp_path / "served.onnx")
    (x,) = example_inputs(contract, 3, 6)
    outputs, state = model.run([x], None, np.zeros((3, 16), np.float32))
    zeros = np.zeros((3, 1, 8), np.float32)
    evaluator = ReferenceEvaluator(onnx.load(source))
    y, h, c = evaluator.run(["y", "h_out", "c_out"], {"x": x, "h": zeros, "c": zeros})
    np.testing.assert_allclose(outputs[0], y.reshape(3, 6, 8), rtol=1e-4, atol=1e-5)
    after = np.concatenate([h.reshape(3, 8), c.reshape(3, 8)], axis=1)
    np.testing.assert_allclose(state, after, rtol=1e-4, atol=1e-5)


def test_weights_beside_the_file_are_taken_into_it(tmp_path):
    source = made.write_voice_detector(tmp_path / "model.onnx")
    options = CASES["voice"].options
    whole = export_onnx(source, tmp_path / "whole.onnx", **options)
    proto = onnx.load(source)
    onnx.save_model(
        proto, source, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert (tmp_path / "weights.bin").stat().st_size > 1000
    assert export_onnx(source, tmp_path / "served.onnx", **options).digest == whole.digest


def test_a_state_of_half_floats_and_one_of_truths_are_carried_exactly(tmp_path):
    b = made.Builder()
    half = b.add("Cast", "x", to=onnx.TensorProto.FLOAT16)
    b.add("Add", "sum_in", half, gives=["sum_out"])
    b.add("Or", "seen_in", b.add("Greater", "x", b.put(1, np.float32)), gives=["seen_out"])
    total = b.add("Cast", "sum_out", to=onnx.TensorProto.FLOAT)
    b.add("Mul", total, b.add("Cast", "seen_out", to=onnx.TensorProto.FLOAT), gives=["y"])
    shape = ["batch", 3]
    states = {"sum": (onnx.TensorProto.FLOAT16, shape), "seen": (onnx.TensorProto.BOOL, shape)}
    source = b.save(
        tmp_path / "model.onnx",
        {"x": shape, **{f"{name}_in": value for name, value in states.items()}},
        {"y": shape, **{f"{name}_out": value for name, value in states.items()}},
    )
    export_onnx(source, tmp_path / "served.onnx")
    model = Model.load(tmp_path / "served.onnx")
    (x,) = example_inputs(model.contract, 4, 6)
    outputs, _ = model.run([x], None, np.zeros((4, 6), np.float32))
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    feed = {"sum_in": np.zeros((4, 3), np.float16), "seen_in": np.zeros((4, 3), bool)}
    for step in range(6):
        y, feed["sum_in"], feed["seen_in"] = session.run(
            ["y", "sum_out", "seen_out"], {"x": x[:, step], **feed}
        )
        assert np.array_equal(outputs[0][:, step], y)
    assert y.any()


def test_a_file_is_exported_and_verified_without_pytorch(tmp_path):
    made.write_predictor(tmp_path / "model.onnx")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from sluice_export import export_onnx, verify\n"
        "export_onnx('model.onnx', 'served.onnx')\n"
        "print(all(proof.passed for proof in verify('served.onnx')))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "True\n"
