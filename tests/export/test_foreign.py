"""ONNX files made by others give, served, the bits they give when they are run by hand."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sluice_client import Client
from sluice_export import export_onnx
from sluice_model import Model, example_inputs
from tests.client.server_process import ServerProcess
from tests.export import foreign_models as made


@dataclass(frozen=True)
class Case:
    """A file, what is said of it, and what must be found."""

    write: Callable[[Path], Path]
    # Each state input: its shape for one row, and where it comes out.
    states: dict[str, tuple[list[int], str, int | None]]
    options: dict[str, Any] = field(default_factory=dict)
    # The batch and time axis of each input and output; no time axis: None.
    axes: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    batch_max: int = 0
    has_lengths: bool = False
    is_exact: bool = True
    fixed: dict[str, Any] = field(default_factory=dict)


RATE = {"sr": np.array(16000)}
LSTMS = {name: ([1, 1, 12], "states", at) for at, name in enumerate(("h1", "c1", "h2", "c2"))}
CASES = {
    "voice": Case(
        made.write_voice_detector,
        {"state": ([2, 1, 128], "stateN", None)},
        {"fixed": {"sr": 16000}, "axes": {"input": ("batch", 576)}},
        {"input": (0, None), "output": (0, None)},
        fixed=RATE,
    ),
    "mask": Case(
        made.write_noise_mask,
        {"input_3": ([1, 2, 128, 2], "Identity_1", None)},
        axes={"input_2": (0, None), "Identity": (0, None)},
    ),
    "enhancer": Case(
        made.write_speech_enhancer,
        {
            "conv_cache": ([2, 1, 8, 2, 33], "conv_cache_out", None),
            "tra_cache": ([1, 1, 8], "tra_cache_out", None),
            "inter_cache": ([1, 33, 8], "inter_cache_out", None),
        },
        axes={"mix": (0, None), "enh": (0, None)},
        batch_max=1,
    ),
    "stacked": Case(
        made.write_stacked_states,
        LSTMS,
        axes={"features": (0, 1), "scores": (0, 1)},
        has_lengths=True,
    ),
    "predictor": Case(
        made.write_predictor,
        {"h": ([2, 1, 16], "next_h", None), "c": ([2, 1, 16], "next_c", None)},
        axes={"y": (0, None), "decoder_out": (0, None)},
    ),
    "hidden": Case(made.write_hidden_state, {}, axes={"x": (0, 1), "y": (0, 1)}, has_lengths=True),
    "convolution": Case(
        made.write_causal_convolution,
        {"cache_in": ([1, 4, 2], "cache_out", None)},
        axes={"x": (0, 2), "y": (0, 2)},
        is_exact=False,
    ),
    "lone": Case(
        made.write_one_row_only,
        {"h": ([1, 1, 6], "h_out", None)},
        axes={"x": (0, None), "y": (0, None)},
        batch_max=1,
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    served = {}
    for name, case in CASES.items():
        source = case.write(folder / f"{name}.onnx")
        served[name] = folder / f"{name}.served.onnx"
        export_onnx(source, served[name], **case.options)
    return served


@pytest.fixture(scope="module")
def server(files) -> Iterator[ServerProcess]:
    process = ServerProcess(files)
    yield process
    process.stop()


def drive(path: Path, case: Case, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One sequence by hand through the file as it was made: [steps, …] to [steps, …]."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    kinds = {value.name: types[value.type] for value in session.get_inputs()}
    feed = {name: np.zeros(shape, kinds[name]) for name, (shape, _, _) in case.states.items()}
    feed |= case.fixed
    steps = len(next(iter(inputs.values())))
    width = steps if any(time is not None for _, time in case.axes.values()) else 1
    pieces: dict[str, list[np.ndarray]] = {}
    for start in range(0, steps, width):
        for name, array in inputs.items():
            batch, time = case.axes[name]
            row = array[start : start + width]
            if time is None:
                feed[name] = np.expand_dims(row[0], batch)
            else:
                feed[name] = np.moveaxis(row[np.newaxis], (0, 1), (batch, time))
        names = [value.name for value in session.get_outputs()]
        results = dict(zip(names, session.run(names, feed), strict=True))
        for name, (_, output, index) in case.states.items():
            feed[name] = results[output] if index is None else results[output][index]
        for name in names:
            if name in case.axes:
                batch, time = case.axes[name]
                row = results[name].take(0, batch)
                row = (
                    row[np.newaxis] if time is None else np.moveaxis(row, time - (batch < time), 0)
                )
                pieces.setdefault(name, []).append(row)
    return {name: np.concatenate(rows) for name, rows in pieces.items()}


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


@pytest.mark.parametrize("name", CASES)
def test_a_served_stream_gives_what_the_file_gives_by_hand(name, files, server):
    case, contract = CASES[name], Model.load(files[name]).contract
    source = files[name].with_name(f"{name}.onnx")
    drawn = example_inputs(contract, 3, 7, seed=2)
    with Client(server.address) as client:
        sequences = [client.sequence(name, f"{name}-{row}") for row in range(3)]
        for row, sequence in enumerate(sequences):
            given = {
                spec.name: array[row] for spec, array in zip(contract.inputs, drawn, strict=True)
            }
            with sequence:
                pieces = [
                    sequence.step({name: array[cut] for name, array in given.items()})
                    for cut in (slice(0, 4), slice(4, 5), slice(5, 7))
                ]
            by_hand = drive(source, case, given)
            for output in contract.outputs:
                streamed = np.concatenate([_output(piece, output.name) for piece in pieces])
                if case.is_exact:
                    assert np.array_equal(streamed, by_hand[output.name])
                else:
                    np.testing.assert_allclose(streamed, by_hand[output.name], rtol=1e-4, atol=1e-5)


def _output(piece: Any, name: str) -> np.ndarray:
    return piece[name] if isinstance(piece, dict) else piece


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
